"""What is minimised: `objective(flow, x, key, *, context=None, ...) -> (loss, metrics)`, scalars.

`metrics` may have "failed", true where too many solves failed for the loss to be trained on. A new
objective is one function of that form; `functools.partial` binds its settings.
"""

from jcnf.objectives.combine import in_precision as in_precision
from jcnf.objectives.combine import mixed as mixed
from jcnf.objectives.combine import of_inner as of_inner
from jcnf.objectives.combine import with_context as with_context
from jcnf.objectives.elbo import elbo as elbo
from jcnf.objectives.likelihood import RESERVED as RESERVED
from jcnf.objectives.likelihood import likelihood as likelihood
from jcnf.objectives.matching import flow_matching as flow_matching
from jcnf.objectives.matching import rectified as rectified
from jcnf.objectives.reverse_kl import reverse_kl as reverse_kl
from jcnf.objectives.trajectory import Windows as Windows
from jcnf.objectives.trajectory import draw_windows as draw_windows
from jcnf.objectives.trajectory import trajectory_fit as trajectory_fit
