"""Training: `jcnf.fit`, the compiled loops under it, optimizers and checkpoints."""

from jcnf.training.batches import DrawBatch as DrawBatch
from jcnf.training.batches import draw_rows as draw_rows
from jcnf.training.fit import FitResult as FitResult
from jcnf.training.fit import Progress as Progress
from jcnf.training.fit import Snapshot as Snapshot
from jcnf.training.fit import fit as fit
from jcnf.training.lbfgs import fit_lbfgs as fit_lbfgs
from jcnf.training.loop import differentiator as differentiator
from jcnf.training.loop import make_train_loop as make_train_loop
from jcnf.training.optimizers import make_optimizer as make_optimizer
from jcnf.training.state import MetricSums as MetricSums
from jcnf.training.state import TrainState as TrainState
from jcnf.training.state import init as init
from jcnf.training.state import means as means
from jcnf.training.state import partition as partition
from jcnf.training.state import with_params as with_params
