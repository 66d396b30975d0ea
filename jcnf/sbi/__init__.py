"""Simulation-based inference: posteriors of the parameters of a simulator, and their checks.

It needs the extra `tables`. Import it explicitly: `import jcnf` does not.
"""

from jcnf.sbi.calibration import Calibration as Calibration
from jcnf.sbi.calibration import expected_coverage as expected_coverage
from jcnf.sbi.calibration import rank_calibration as rank_calibration
from jcnf.sbi.calibration import ranks as ranks
from jcnf.sbi.calibration import sbc as sbc
from jcnf.sbi.calibration import tarp as tarp
from jcnf.sbi.embeddings import SetEmbedding as SetEmbedding
from jcnf.sbi.posterior import Posterior as Posterior
from jcnf.sbi.posterior import WeightedSamples as WeightedSamples
from jcnf.sbi.posterior import fit_posterior as fit_posterior
from jcnf.sbi.priors import Prior as Prior
from jcnf.sbi.priors import as_prior as as_prior
from jcnf.sbi.priors import box as box
from jcnf.sbi.rounds import fit_in_rounds as fit_in_rounds
from jcnf.sbi.simulate import Simulations as Simulations
from jcnf.sbi.simulate import Simulator as Simulator
from jcnf.sbi.simulate import SimulatorError as SimulatorError
from jcnf.sbi.simulate import simulate as simulate
from jcnf.sbi.two_sample import LocalC2ST as LocalC2ST
from jcnf.sbi.two_sample import c2st as c2st
from jcnf.sbi.two_sample import local_c2st as local_c2st
