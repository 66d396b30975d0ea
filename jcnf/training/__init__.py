"""Training: compiled loops, optimizers and checkpoints."""

from jcnf.training.loop import DrawBatch as DrawBatch
from jcnf.training.loop import Objective as Objective
from jcnf.training.loop import Totals as Totals
from jcnf.training.loop import TrainState as TrainState
from jcnf.training.loop import differentiator as differentiator
from jcnf.training.loop import draw_rows as draw_rows
from jcnf.training.loop import init as init
from jcnf.training.loop import make_run as make_run
from jcnf.training.loop import means as means
from jcnf.training.loop import partition as partition
from jcnf.training.loop import restart as restart
from jcnf.training.loop import with_params as with_params
from jcnf.training.optimizers import make_optimizer as make_optimizer
