"""ODE solves over whole batches, by diffrax and by its own extension points."""

from jcnf.ode.adjoint import STATES as STATES
from jcnf.ode.adjoint import StepCheckpointAdjoint as StepCheckpointAdjoint
from jcnf.ode.failing_rows import FreezeFailingRows as FreezeFailingRows
from jcnf.ode.integrate import integrate as integrate
from jcnf.ode.reversible import AbstractReversibleSolver as AbstractReversibleSolver
from jcnf.ode.reversible import Reversible as Reversible
from jcnf.ode.reversible import ReversibleAdjoint as ReversibleAdjoint
from jcnf.ode.solve import MOST_STEPS as MOST_STEPS
from jcnf.ode.solve import NORMS as NORMS
from jcnf.ode.solve import OVER_ROWS as OVER_ROWS
from jcnf.ode.solve import SOLVERS as SOLVERS
from jcnf.ode.solve import Solve as Solve
from jcnf.ode.solve import Stats as Stats
from jcnf.ode.solve import batch_norm as batch_norm
from jcnf.ode.solve import check_tolerance as check_tolerance
from jcnf.ode.solve import with_array_tolerances as with_array_tolerances
from jcnf.ode.solve import worst_norm as worst_norm
from jcnf.ode.step_plan import PARTS as PARTS
from jcnf.ode.step_plan import SHORT as SHORT
from jcnf.ode.step_plan import PlannedSteps as PlannedSteps
from jcnf.ode.step_plan import is_known as is_known
from jcnf.ode.step_plan import next_point as next_point
from jcnf.ode.step_plan import unknown as unknown
from jcnf.ode.step_plan import with_step as with_step
from jcnf.ode.unrolled import Unrolled as Unrolled
