"""Training objectives: `objective(flow, x, key, *, context=None, ...) -> (loss, metrics)`.

A new objective is one function of this form; see `Objective`.
"""

from jcnf.objectives.base import Loss as Loss
from jcnf.objectives.base import Objective as Objective
from jcnf.objectives.combine import cast_fields as cast_fields
from jcnf.objectives.combine import weighted_sum as weighted_sum
from jcnf.objectives.combine import with_context as with_context
from jcnf.objectives.combine import without_solve as without_solve
from jcnf.objectives.elbo import elbo as elbo
from jcnf.objectives.likelihood import RESERVED as RESERVED
from jcnf.objectives.likelihood import likelihood as likelihood
from jcnf.objectives.matching import flow_matching as flow_matching
from jcnf.objectives.matching import rectified as rectified
from jcnf.objectives.reverse_kl import reverse_kl as reverse_kl
from jcnf.objectives.trajectory import Windows as Windows
from jcnf.objectives.trajectory import sample_windows as sample_windows
from jcnf.objectives.trajectory import trajectory_fit as trajectory_fit
