"""Simulation-based inference: checks of posteriors learned from simulations."""

from jcnf.sbi.calibration import Calibration as Calibration
from jcnf.sbi.calibration import expected_coverage as expected_coverage
from jcnf.sbi.calibration import rank_calibration as rank_calibration
from jcnf.sbi.calibration import ranks as ranks
from jcnf.sbi.calibration import sbc as sbc
from jcnf.sbi.calibration import tarp as tarp
from jcnf.sbi.two_sample import LocalC2ST as LocalC2ST
from jcnf.sbi.two_sample import c2st as c2st
from jcnf.sbi.two_sample import local_c2st as local_c2st
