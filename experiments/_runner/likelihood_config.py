"""The settings of maximum likelihood through a solve: divergence, penalties, a random end time."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from experiments._runner.config import WIDEST, SolveSettings, TrainingSettings
from jcnf import Exact, ForwardMode, Hutchinson, objectives, regularizers
from jcnf._checks import InputError
from jcnf.divergence import DIVERGENCES, Divergence

T = TypeVar("T")

# Settings, and what puts them to use: objectives, divergences, penalties, or a flag.
USERS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("likelihood", "mixed"): (
        *("solver", "rtol", "atol", "fixed_step", "adjoint", "norm", "max_steps"),
        *("steer", "divergence", "penalties"),
    ),
    ("hutchinson",): ("noise",),
    ("hutchinson", "hutch++", "xtrace", "jacobian", "lambda2"): ("probes",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LikelihoodSettings(TrainingSettings, SolveSettings):
    """Maximum likelihood."""

    # half width of the base's random time while training, 0 for none (STEER)
    steer: float = 0.0
    # divergence while training: exact, forward, hutchinson, hutch++, xtrace (held-out numbers have
    # one of their own)
    divergence: str = "exact"
    # probes of an estimated divergence, and of the jacobian and lambda2 penalties
    probes: int = 1
    # Hutchinson's noise: rademacher, gaussian, orthogonal
    noise: str = "rademacher"
    # penalties and their weights, as in "kinetic 0.01 jacobian 0.01": kinetic, jacobian,
    # jacobian_exact, directional, total_derivative, taylor2 (3, ...), hjb, lambda1, lambda2
    penalties: tuple[tuple[str, float], ...] = ()

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work, before anything is compiled."""
        super().check()
        self.at_least(1, "probes", most=WIDEST)
        self.at_least(0, "steer")
        for name, weight in self.penalties:
            if not 0 <= weight <= 1e9:
                raise InputError(f"--penalties: the weight of {name} must be from 0 to 1e+09")
        if self.lbfgs_steps and self.adjoint == "forward":
            raise InputError("L-BFGS takes gradients by reverse mode: choose another --adjoint")

    def uses(self) -> set[str]:
        """The parts of the settings that these ones put to use, by the names of their users."""
        return {self.divergence, *dict(self.penalties)}

    def check_use(self, users: Mapping[tuple[str, ...], tuple[str, ...]]) -> None:
        """Refuse settings that would change nothing: those of `users` that nothing uses."""
        defaults, uses = type(self)(), self.uses()
        for names_of_users, names in users.items():
            given = [n for n in names if getattr(self, n) != getattr(defaults, n)]
            if given and not uses & set(names_of_users):
                flags = ", ".join("--" + name.replace("_", "-") for name in given)
                raise InputError(
                    f"{flags} would change nothing: of use with {' or '.join(names_of_users)} alone"
                )

    def make_divergence(self) -> Divergence:
        """The training divergence."""
        make: Any = named("divergence", self.divergence, DIVERGENCES)
        if make is ForwardMode:
            return make()
        if make is Exact:
            return make(self.probes if {"jacobian", "lambda2"} & dict(self.penalties).keys() else 0)
        return make(self.probes, **{"noise": self.noise} if make is Hutchinson else {})

    def make_likelihood(self) -> Callable:
        """Likelihood by the training solve."""
        return functools.partial(
            objectives.likelihood,
            solve=self.make_solve(),
            divergence=self.make_divergence(),
            penalties=self.make_penalties(),
            steer=self.steer,
        )

    def make_penalties(self) -> dict[Callable, float]:
        """Regularizers and their weights."""
        penalties = {regularizers.named(name): weight for name, weight in self.penalties}
        if len(penalties) < len(self.penalties):
            raise ValueError(f"a penalty is named twice: {', '.join(dict(self.penalties))}")
        return penalties


def named(what: str, name: str, table: Mapping[str, T]) -> T:
    """`table[name]`; `ValueError` for an unknown name, with the known ones."""
    if name not in table:
        raise ValueError(f"unknown {what} '{name}': use one of {', '.join(table)}")
    return table[name]
