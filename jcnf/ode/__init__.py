"""What jcnf adds to diffrax's ODE solves, each by one of diffrax's own extension points."""

from jcnf.ode.adjoint import StepCheckpointAdjoint
from jcnf.ode.failing_rows import FreezeFailingRows, RowsState, mean_square, with_copies
from jcnf.ode.reversible import AbstractReversibleSolver, Reversible, ReversibleAdjoint
from jcnf.ode.step_plan import PARTS, PlannedSteps, next_point, unknown
from jcnf.ode.unrolled import Unrolled, is_explicit, needed

__all__ = [
    "PARTS",
    "AbstractReversibleSolver",
    "FreezeFailingRows",
    "PlannedSteps",
    "Reversible",
    "ReversibleAdjoint",
    "RowsState",
    "StepCheckpointAdjoint",
    "Unrolled",
    "is_explicit",
    "mean_square",
    "needed",
    "next_point",
    "unknown",
    "with_copies",
]
