"""jcnf: continuous normalizing flows in JAX, as pure functions over Equinox modules."""

from jcnf import augmented as augmented
from jcnf import couplings as couplings
from jcnf import distributions as distributions
from jcnf import fields as fields
from jcnf import inpaint as inpaint
from jcnf import objectives as objectives
from jcnf import paths as paths
from jcnf import regularizers as regularizers
from jcnf import times as times
from jcnf import vae as vae
from jcnf.bijective import BijectiveFlow as BijectiveFlow
from jcnf.cnf import CNF as CNF
from jcnf.divergence import Exact as Exact
from jcnf.divergence import ForwardMode as ForwardMode
from jcnf.divergence import Hutchinson as Hutchinson
from jcnf.divergence import HutchPlusPlus as HutchPlusPlus
from jcnf.divergence import XTrace as XTrace
from jcnf.flow import log_prob as log_prob
from jcnf.flow import sample as sample
from jcnf.flow import sample_and_log_prob as sample_and_log_prob
from jcnf.flow import transform as transform
from jcnf.nice import NICE as NICE
from jcnf.solve import Solve as Solve
from jcnf.trajectories import trajectory as trajectory
