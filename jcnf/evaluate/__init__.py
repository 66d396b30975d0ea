"""Held-out numbers: exact divergence, tight tolerance, fixed-size chunks compiled once.

Nothing here draws conclusions from a solve that failed: its samples come back as NaN, counted.
"""

from jcnf.evaluate import strangeness as strangeness
from jcnf.evaluate.bounds import Bounds as Bounds
from jcnf.evaluate.bounds import bounds as bounds
from jcnf.evaluate.certificate import Certificate as Certificate
from jcnf.evaluate.certificate import certify as certify
from jcnf.evaluate.chunks import reporting as reporting
from jcnf.evaluate.compression import code_length as code_length
from jcnf.evaluate.density import Grid as Grid
from jcnf.evaluate.density import cell_centres as cell_centres
from jcnf.evaluate.density import gaussian_nll as gaussian_nll
from jcnf.evaluate.density import grid as grid
from jcnf.evaluate.density import grid_of as grid_of
from jcnf.evaluate.discrepancy import mmd as mmd
from jcnf.evaluate.doubled import in_float64 as in_float64
from jcnf.evaluate.gradients import GradientAudit as GradientAudit
from jcnf.evaluate.gradients import audit_gradients as audit_gradients
from jcnf.evaluate.gradients import loss_gradient as loss_gradient
from jcnf.evaluate.gradients import relative_error as relative_error
from jcnf.evaluate.marginal import score_marginal as score_marginal
from jcnf.evaluate.row_independence import RowIndependence as RowIndependence
from jcnf.evaluate.row_independence import row_independence as row_independence
from jcnf.evaluate.scores import ACCURATE as ACCURATE
from jcnf.evaluate.scores import Scores as Scores
from jcnf.evaluate.scores import Transport as Transport
from jcnf.evaluate.scores import carry as carry
from jcnf.evaluate.scores import draw as draw
from jcnf.evaluate.scores import roundtrip_error as roundtrip_error
from jcnf.evaluate.scores import score as score
from jcnf.evaluate.scores import standard_error as standard_error
from jcnf.evaluate.scores import transport as transport
from jcnf.evaluate.separation import Auroc as Auroc
from jcnf.evaluate.separation import auroc as auroc
