"""Evaluation on held-out data: exact divergence, tight tolerance, fixed-size chunks compiled once.

Samples whose solve failed come back as NaN and are counted; no result is drawn from them.
"""

from jcnf.evaluate import ood as ood
from jcnf.evaluate.accuracy import AccuracyReport as AccuracyReport
from jcnf.evaluate.accuracy import accuracy_report as accuracy_report
from jcnf.evaluate.augmented import marginal_log_prob as marginal_log_prob
from jcnf.evaluate.chunks import reporting as reporting
from jcnf.evaluate.code_length import code_length as code_length
from jcnf.evaluate.elbo import ELBOSamples as ELBOSamples
from jcnf.evaluate.elbo import elbo as elbo
from jcnf.evaluate.gradients import GradientAudit as GradientAudit
from jcnf.evaluate.gradients import audit_gradients as audit_gradients
from jcnf.evaluate.gradients import loss_gradient as loss_gradient
from jcnf.evaluate.gradients import relative_error as relative_error
from jcnf.evaluate.grid import Grid as Grid
from jcnf.evaluate.grid import Quadrature as Quadrature
from jcnf.evaluate.grid import cell_centers as cell_centers
from jcnf.evaluate.grid import grid as grid
from jcnf.evaluate.grid import grid_of as grid_of
from jcnf.evaluate.grid import quadrature as quadrature
from jcnf.evaluate.log_prob import ACCURATE as ACCURATE
from jcnf.evaluate.log_prob import LogProbs as LogProbs
from jcnf.evaluate.log_prob import Trajectories as Trajectories
from jcnf.evaluate.log_prob import bits_per_dim as bits_per_dim
from jcnf.evaluate.log_prob import log_prob as log_prob
from jcnf.evaluate.log_prob import roundtrip_error as roundtrip_error
from jcnf.evaluate.log_prob import sample as sample
from jcnf.evaluate.log_prob import standard_error as standard_error
from jcnf.evaluate.log_prob import trajectory as trajectory
from jcnf.evaluate.log_prob import transform as transform
from jcnf.evaluate.precision import in_float64 as in_float64
from jcnf.evaluate.row_independence import RowIndependence as RowIndependence
from jcnf.evaluate.row_independence import row_independence as row_independence
from jcnf.evaluate.samples import Auroc as Auroc
from jcnf.evaluate.samples import auroc as auroc
from jcnf.evaluate.samples import gaussian_nll as gaussian_nll
from jcnf.evaluate.samples import mmd as mmd
