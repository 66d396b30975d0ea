"""ODE solves over whole batches, built on diffrax through its extension points."""

from jcnf.ode.adjoint import MIN_KEPT_STATES as MIN_KEPT_STATES
from jcnf.ode.adjoint import StepCheckpointAdjoint as StepCheckpointAdjoint
from jcnf.ode.failing_rows import FreezeFailingRows as FreezeFailingRows
from jcnf.ode.integrate import integrate as integrate
from jcnf.ode.reversible import AbstractReversibleSolver as AbstractReversibleSolver
from jcnf.ode.reversible import Reversible as Reversible
from jcnf.ode.reversible import ReversibleAdjoint as ReversibleAdjoint
from jcnf.ode.solve import MAX_STEPS_LIMIT as MAX_STEPS_LIMIT
from jcnf.ode.solve import NORMS as NORMS
from jcnf.ode.solve import OVER_ROWS as OVER_ROWS
from jcnf.ode.solve import SOLVERS as SOLVERS
from jcnf.ode.solve import Solve as Solve
from jcnf.ode.solve import Stats as Stats
from jcnf.ode.solve import check_tolerance as check_tolerance
from jcnf.ode.solve import max_sample_rms_norm as max_sample_rms_norm
from jcnf.ode.solve import rms_norm as rms_norm
from jcnf.ode.solve import with_array_tolerances as with_array_tolerances
from jcnf.ode.step_plan import MIN_STEP_FRACTION as MIN_STEP_FRACTION
from jcnf.ode.step_plan import NUM_BINS as NUM_BINS
from jcnf.ode.step_plan import PlannedSteps as PlannedSteps
from jcnf.ode.step_plan import is_known as is_known
from jcnf.ode.step_plan import next_point as next_point
from jcnf.ode.step_plan import unknown as unknown
from jcnf.ode.step_plan import with_step as with_step
from jcnf.ode.unrolled import Unrolled as Unrolled
