"""Figures drawn with matplotlib.

All functions take arrays of numpy or jax and return a matplotlib `Figure`; nothing here evaluates a
flow. Time t = 0 is the base, t = 1 the data. matplotlib is imported inside the functions, without
pyplot and without global state. The caller saves figures (`figure.savefig(path)`); only GIFs are
written by their functions, completely or not at all. Views follow robust quantiles, so that
outliers do not squash a figure, and titles count what a panel leaves out: rows with a NaN or an
infinity, and points outside the view. Data are always blue, samples of the model vermilion, and the
base gray. A wrong shape raises `ValueError`.
"""

from jcnf.plot.calibration import calibration as calibration
from jcnf.plot.calibration import local_c2st as local_c2st
from jcnf.plot.calibration import ranks as ranks
from jcnf.plot.corner import corner as corner
from jcnf.plot.curves import CurvePanel as CurvePanel
from jcnf.plot.curves import scaling as scaling
from jcnf.plot.curves import scaling_exponent as scaling_exponent
from jcnf.plot.curves import training_curves as training_curves
from jcnf.plot.density import densities as densities
from jcnf.plot.density import pairs as pairs
from jcnf.plot.gaps import gaps_to_best as gaps_to_best
from jcnf.plot.histograms import HistogramPanel as HistogramPanel
from jcnf.plot.histograms import histogram as histogram
from jcnf.plot.histograms import score_histograms as score_histograms
from jcnf.plot.images import image_grid as image_grid
from jcnf.plot.posteriors import posteriors as posteriors
from jcnf.plot.rotations import rotations as rotations
from jcnf.plot.scatter import scatter_against_truth as scatter_against_truth
from jcnf.plot.scatter import scatter_by_class as scatter_by_class
from jcnf.plot.sphere import globe as globe
from jcnf.plot.sphere import world_map as world_map
from jcnf.plot.trajectories import MAX_PATHS as MAX_PATHS
from jcnf.plot.trajectories import Scene as Scene
from jcnf.plot.trajectories import against_time as against_time
from jcnf.plot.trajectories import animation as animation
from jcnf.plot.trajectories import learning as learning
from jcnf.plot.trajectories import learning_animation as learning_animation
from jcnf.plot.trajectories import snapshots as snapshots
from jcnf.plot.trajectories import trajectories as trajectories
