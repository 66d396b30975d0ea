"""Training objectives: `objective(flow, x, key, *, context=None, ...) -> (loss, metrics)`.

The loss, a scalar, is minimized; the metrics are a dict of scalars. They may include "failed", true
if too many solves failed for the loss to be trained on. A new objective is one function of this
form; bind its settings with `functools.partial`.
"""

from jcnf.objectives.combine import cast_fields as cast_fields
from jcnf.objectives.combine import for_first_ode as for_first_ode
from jcnf.objectives.combine import weighted_sum as weighted_sum
from jcnf.objectives.combine import with_context as with_context
from jcnf.objectives.elbo import elbo as elbo
from jcnf.objectives.likelihood import RESERVED as RESERVED
from jcnf.objectives.likelihood import likelihood as likelihood
from jcnf.objectives.matching import flow_matching as flow_matching
from jcnf.objectives.matching import rectified as rectified
from jcnf.objectives.reverse_kl import reverse_kl as reverse_kl
from jcnf.objectives.trajectory import Windows as Windows
from jcnf.objectives.trajectory import sample_windows as sample_windows
from jcnf.objectives.trajectory import trajectory_fit as trajectory_fit
