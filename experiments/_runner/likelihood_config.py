"""Settings of maximum likelihood by ODE solves: divergence, regularizers, random end time."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from experiments._runner.config import MAX_WIDTH, SolveSettings, TrainingSettings
from jcnf import Exact, ForwardMode, Hutchinson, objectives, regularizers
from jcnf._checks import InputError
from jcnf.divergence import DIVERGENCES, Divergence

T = TypeVar("T")

# {users: settings}: settings that have an effect only with one of these objectives, divergences
# or regularizers.
USERS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("likelihood", "mixed"): (
        *("solver", "rtol", "atol", "fixed_step", "adjoint", "norm", "max_steps"),
        *("steer", "divergence", "regularizers"),
    ),
    ("hutchinson",): ("noise",),
    ("hutchinson", "hutch++", "xtrace", "jacobian", "lambda2"): ("probes",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LikelihoodSettings(TrainingSettings, SolveSettings):
    """Settings of training by maximum likelihood."""

    # half width of the random time of the base in training (STEER; 0 for a fixed time)
    steer: float = 0.0
    # divergence in training: exact, forward, hutchinson, hutch++, xtrace (not used for held-out
    # numbers)
    divergence: str = "exact"
    # number of probes of an estimated divergence and of the jacobian and lambda2 regularizers
    probes: int = 1
    # noise of Hutchinson's estimator: rademacher, gaussian, orthogonal
    noise: str = "rademacher"
    # regularizers and their weights, e.g. "kinetic 0.01 jacobian 0.01": kinetic, jacobian,
    # jacobian_exact, directional, total_derivative, taylor2 (3, ...), hjb, lambda1, lambda2
    regularizers: tuple[tuple[str, float], ...] = ()

    def check(self) -> None:
        super().check()
        self.at_least(1, "probes", most=MAX_WIDTH)
        self.at_least(0, "steer")
        for name, weight in self.regularizers:
            if not 0 <= weight <= 1e9:
                raise InputError(
                    f"--regularizers: the weight of {name} must be from 0 to 1e+09; got {weight}"
                )
        if self.lbfgs_steps and self.adjoint == "forward":
            raise InputError("L-BFGS needs reverse-mode gradients: choose another --adjoint")

    def uses(self) -> set[str]:
        """Return the keys of `USERS` that these settings put to use."""
        return {self.divergence, *dict(self.regularizers)}

    def check_use(self, users: Mapping[tuple[str, ...], tuple[str, ...]]) -> None:
        """Raise `InputError` for changed settings of `users` that would have no effect."""
        defaults, uses = type(self)(), self.uses()
        for names_of_users, names in users.items():
            given = [n for n in names if getattr(self, n) != getattr(defaults, n)]
            if given and not uses & set(names_of_users):
                flags = ", ".join("--" + name.replace("_", "-") for name in given)
                raise InputError(
                    f"{flags} would have no effect: used only with {' or '.join(names_of_users)}"
                )

    def make_divergence(self) -> Divergence:
        """Return the divergence used in training."""
        make: Any = named("divergence", self.divergence, DIVERGENCES)
        if make is ForwardMode:
            return make()
        if make is Exact:
            return make(
                self.probes if {"jacobian", "lambda2"} & dict(self.regularizers).keys() else 0
            )
        return make(self.probes, **{"noise": self.noise} if make is Hutchinson else {})

    def make_likelihood(self) -> Callable:
        """Return the likelihood objective by the training solve."""
        return functools.partial(
            objectives.likelihood,
            solve=self.make_solve(),
            divergence=self.make_divergence(),
            regularizers=self.make_regularizers(),
            steer=self.steer,
        )

    def make_regularizers(self) -> dict[Callable, float]:
        """Return the regularizers with their weights; `ValueError` if one is named twice."""
        weights = {regularizers.named(name): weight for name, weight in self.regularizers}
        if len(weights) < len(self.regularizers):
            names = ", ".join(name for name, _ in self.regularizers)
            raise ValueError(f"--regularizers must not name one twice; got {names}")
        return weights


def named(what: str, name: str, table: Mapping[str, T]) -> T:
    """Return `table[name]`; raise `ValueError` with the known names for an unknown one."""
    if name not in table:
        raise ValueError(f"unknown {what} '{name}': use one of {', '.join(table)}")
    return table[name]
