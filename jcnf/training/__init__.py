"""Training: compiled loops, optimizers and checkpoints."""

from jcnf.training.fit import FitResult as FitResult
from jcnf.training.fit import Progress as Progress
from jcnf.training.fit import fit as fit
from jcnf.training.loop import DrawBatch as DrawBatch
from jcnf.training.loop import MetricSums as MetricSums
from jcnf.training.loop import Objective as Objective
from jcnf.training.loop import TrainState as TrainState
from jcnf.training.loop import differentiator as differentiator
from jcnf.training.loop import draw_rows as draw_rows
from jcnf.training.loop import init as init
from jcnf.training.loop import make_train_loop as make_train_loop
from jcnf.training.loop import means as means
from jcnf.training.loop import partition as partition
from jcnf.training.loop import restart as restart
from jcnf.training.loop import with_params as with_params
from jcnf.training.optimizers import make_optimizer as make_optimizer
