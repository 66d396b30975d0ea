"""jcnf: continuous normalizing flows in JAX, as pure functions over Equinox modules."""

from importlib.metadata import version

from jcnf import distributions as distributions
from jcnf import evaluate as evaluate
from jcnf import fields as fields
from jcnf import flows as flows
from jcnf import manifolds as manifolds
from jcnf import objectives as objectives
from jcnf import plot as plot
from jcnf import regularizers as regularizers
from jcnf import training as training
from jcnf.divergence import Exact as Exact
from jcnf.divergence import ForwardMode as ForwardMode
from jcnf.divergence import Hutchinson as Hutchinson
from jcnf.divergence import HutchPlusPlus as HutchPlusPlus
from jcnf.divergence import XTrace as XTrace
from jcnf.flows import CNF as CNF
from jcnf.flows import NICE as NICE
from jcnf.flows import Flow as Flow
from jcnf.flows import log_prob as log_prob
from jcnf.flows import sample as sample
from jcnf.flows import sample_and_log_prob as sample_and_log_prob
from jcnf.flows import trajectory as trajectory
from jcnf.flows import transform as transform
from jcnf.ode import Solve as Solve
from jcnf.training import fit as fit

__version__ = version("jcnf")
