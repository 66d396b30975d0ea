"""Held-out numbers: exact divergence, tight tolerance, fixed-size chunks compiled once.

Nothing here draws conclusions from a solve that failed: its samples come back as NaN, counted.
"""

from jcnf.evaluate import ood as ood
from jcnf.evaluate.accuracy import Certificate as Certificate
from jcnf.evaluate.accuracy import certify as certify
from jcnf.evaluate.augmented import score_marginal as score_marginal
from jcnf.evaluate.chunks import reporting as reporting
from jcnf.evaluate.code_length import code_length as code_length
from jcnf.evaluate.elbo import Bounds as Bounds
from jcnf.evaluate.elbo import bounds as bounds
from jcnf.evaluate.gradients import GradientAudit as GradientAudit
from jcnf.evaluate.gradients import audit_gradients as audit_gradients
from jcnf.evaluate.gradients import loss_gradient as loss_gradient
from jcnf.evaluate.gradients import relative_error as relative_error
from jcnf.evaluate.grid import Grid as Grid
from jcnf.evaluate.grid import cell_centres as cell_centres
from jcnf.evaluate.grid import gaussian_nll as gaussian_nll
from jcnf.evaluate.grid import grid as grid
from jcnf.evaluate.grid import grid_of as grid_of
from jcnf.evaluate.log_prob import ACCURATE as ACCURATE
from jcnf.evaluate.log_prob import Scores as Scores
from jcnf.evaluate.log_prob import Transport as Transport
from jcnf.evaluate.log_prob import carry as carry
from jcnf.evaluate.log_prob import draw as draw
from jcnf.evaluate.log_prob import roundtrip_error as roundtrip_error
from jcnf.evaluate.log_prob import score as score
from jcnf.evaluate.log_prob import standard_error as standard_error
from jcnf.evaluate.log_prob import transport as transport
from jcnf.evaluate.precision import in_float64 as in_float64
from jcnf.evaluate.row_independence import RowIndependence as RowIndependence
from jcnf.evaluate.row_independence import row_independence as row_independence
from jcnf.evaluate.samples import Auroc as Auroc
from jcnf.evaluate.samples import auroc as auroc
from jcnf.evaluate.samples import mmd as mmd
