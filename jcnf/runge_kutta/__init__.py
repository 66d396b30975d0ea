"""Explicit Runge-Kutta solves, with gradients of the very numbers that they compute."""

from jcnf.runge_kutta.march import March
from jcnf.runge_kutta.reversible import evaluations, integrate_reversibly
from jcnf.runge_kutta.step_plan import PARTS, next_point, unknown
from jcnf.runge_kutta.stepwise import integrate_stepwise
from jcnf.runge_kutta.tableaus import is_explicit

__all__ = [
    "PARTS",
    "March",
    "evaluations",
    "integrate_reversibly",
    "integrate_stepwise",
    "is_explicit",
    "next_point",
    "unknown",
]
