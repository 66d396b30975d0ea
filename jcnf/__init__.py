"""jcnf: continuous normalizing flows in JAX, as pure functions over Equinox modules."""

from importlib.metadata import version

from jcnf import distributions as distributions
from jcnf import fields as fields
from jcnf import objectives as objectives
from jcnf import regularizers as regularizers
from jcnf.divergence import Exact as Exact
from jcnf.divergence import ForwardMode as ForwardMode
from jcnf.divergence import Hutchinson as Hutchinson
from jcnf.divergence import HutchPlusPlus as HutchPlusPlus
from jcnf.divergence import XTrace as XTrace
from jcnf.flows import CNF as CNF
from jcnf.flows import NICE as NICE
from jcnf.flows import Flow as Flow
from jcnf.flows import augmented as augmented
from jcnf.flows import log_prob as log_prob
from jcnf.flows import sample as sample
from jcnf.flows import sample_and_log_prob as sample_and_log_prob
from jcnf.flows import trajectory as trajectory
from jcnf.flows import transform as transform
from jcnf.flows import vae as vae
from jcnf.inference import inpaint as inpaint
from jcnf.objectives import couplings as couplings
from jcnf.objectives import paths as paths
from jcnf.objectives import times as times
from jcnf.ode import Solve as Solve
from jcnf.training import fit as fit

__version__ = version("jcnf")
