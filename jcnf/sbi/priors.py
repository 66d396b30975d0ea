"""Priors: distributions of parameters whose supports are known column by column."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.random as jr
import numpy as np
from distrax import Distribution
from jaxtyping import Array, Float, Key

from jcnf._checks import InputError, check_int, check_key
from jcnf.sklearn import Column

ADVICE = (
    "pass a numpyro distribution, a mapping of names to distributions, jcnf.sbi.box(lower, upper), "
    "or a jcnf.sbi.Prior"
)


class Prior(NamedTuple):
    """A prior of `dim` parameters, in the form that this package uses.

    `as_prior` makes one of a distribution. Write one by hand for a distribution whose supports
    cannot be read from it.
    """

    names: tuple[str, ...]
    supports: tuple[Column, ...]  # of each parameter; their product is the support of the prior
    draw: Callable[[Key[Array, ""], int], Any]  # (key, n) -> parameters (n, dim)
    density: Callable[[Any], Any]  # parameters (n, dim) -> log-densities (n,), in nats

    @property
    def dim(self) -> int:
        """The number of parameters."""
        return len(self.names)

    def sample(self, key: Key[Array, ""], n: int) -> Float[np.ndarray, "n dim"]:
        """Draw parameters, strictly inside the support. Consumes `key`."""
        check_key(key)
        check_int(n=n)
        theta = np.array(self.draw(key, n), np.float64)
        if theta.shape != (n, self.dim):
            raise InputError(
                f"the prior drew an array of shape {theta.shape}; expected ({n}, {self.dim})"
            )
        return np.stack([s.finish(x) for s, x in zip(self.supports, theta.T, strict=True)], axis=1)

    def log_prob(self, theta: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, " n"]:
        """Return the log-density of parameters in nats, -inf outside the support."""
        theta = np.asarray(theta, np.float64)
        inside = self.contains(theta)
        safe = theta[np.argmax(inside)] if inside.any() else None
        if safe is None:
            return np.full(len(theta), -np.inf)
        found = np.asarray(self.density(np.where(inside[:, None], theta, safe)), np.float64)
        return np.where(inside, found, -np.inf)

    def contains(self, theta: Float[np.ndarray, "n dim"]) -> np.ndarray:
        """Return which parameters are inside the support, (n,) booleans."""
        columns = zip(self.supports, np.asarray(theta).T, strict=True)
        return np.all([support.contains(x) for support, x in columns], axis=0)


def box(lower: Any, upper: Any, names: Sequence[str] | None = None) -> Prior:
    """Return the uniform prior on a box with these corners, each (dim,).

    **Raises:** `ValueError` if the corners differ in shape or are not finite, or if a lower bound
    is not below its upper bound.
    """
    lower, upper = np.atleast_1d(np.asarray(lower, float)), np.atleast_1d(np.asarray(upper, float))
    if lower.ndim != 1 or lower.shape != upper.shape:
        raise InputError(
            f"lower and upper must be lists of one length; got shapes {lower.shape} and "
            f"{upper.shape}"
        )
    if not np.isfinite([lower, upper]).all():
        raise InputError("the bounds of a box must be finite")
    names = _names("theta", (len(lower),)) if names is None else tuple(map(str, names))
    supports = tuple(Column(*bounds) for bounds in zip(lower, upper, strict=True))
    log_volume = np.log(upper - lower).sum()

    def draw(key, n):
        unit = _generator(key).random((n, len(lower)))
        return lower + (upper - lower) * unit

    return Prior(names, supports, draw, lambda theta: np.full(len(theta), -log_volume))


def as_prior(prior: Any) -> Prior:
    """Return a `Prior`, of a distribution or of several that are independent.

    - A numpyro distribution of a number or a vector; its `support` has the bounds.
    - A mapping of names to such distributions, which are independent.
    - A distrax distribution of which the support is known: normal distributions of all kinds,
      `Uniform`, `Beta`, `Gamma`, `Laplace`, `Logistic`, `Gumbel`, and `Independent` ones.
    - A `Prior`, which is returned as it is.

    **Raises:** `ValueError` for anything else, such as discrete parameters, and supports that are
    not a product of intervals, such as a simplex.
    """
    if isinstance(prior, Prior):
        return prior
    if isinstance(prior, Mapping):
        return _joint({str(name): _part(str(name), part) for name, part in prior.items()})
    return _part("theta", prior)


def _part(name, distribution):
    if isinstance(distribution, Prior):
        return distribution
    if isinstance(distribution, Distribution):
        lower, upper, circular = _distrax_bounds(distribution)
        draw = distribution.sample
        arguments = {"seed", "sample_shape"}
    elif _is_numpyro(distribution):
        lower, upper, circular = _numpyro_bounds(distribution.support)
        draw = distribution.sample
        arguments = {"key", "sample_shape"}
    else:
        raise InputError(f"expected a distribution as the prior; got {distribution!r}: {ADVICE}")
    shape = tuple(distribution.event_shape)
    if tuple(distribution.batch_shape):
        raise InputError(
            f"the prior {type(distribution).__name__} has the batch shape "
            f"{tuple(distribution.batch_shape)}: make its parameters one event, with "
            ".to_event(1) in numpyro or distrax.Independent(..., reinterpreted_batch_ndims=1)"
        )
    if len(shape) > 1:
        raise InputError(f"expected a prior of a number or a vector; got events of shape {shape}")
    names = _names(name, shape)
    bounds = zip(*(np.broadcast_to(b, (len(names),)) for b in (lower, upper)), strict=True)
    supports = tuple(Column(float(low), float(high), circular=circular) for low, high in bounds)
    seed, number = sorted(arguments, key="sample_shape".__eq__)

    def sample(key, n):
        return np.reshape(draw(**{seed: key, number: (n,)}), (n, len(names)))

    def log_prob(theta):
        return distribution.log_prob(jax.numpy.asarray(theta).reshape(len(theta), *shape))

    return Prior(names, supports, sample, log_prob)


def _joint(parts: dict[str, Prior]) -> Prior:
    if not parts:
        raise InputError("the prior has no parameters")
    ends = np.cumsum([part.dim for part in parts.values()])[:-1]

    def draw(key, n):
        keys = jr.split(key, len(parts))
        return np.concatenate(
            [part.sample(k, n) for part, k in zip(parts.values(), keys, strict=True)], axis=1
        )

    def density(theta):
        columns = np.split(theta, ends, axis=1)
        found = [part.log_prob(x) for part, x in zip(parts.values(), columns, strict=True)]
        return np.sum(found, axis=0)

    names = tuple(name for part in parts.values() for name in part.names)
    supports = tuple(support for part in parts.values() for support in part.supports)
    return Prior(names, supports, draw, density)


def _names(name, shape):
    return tuple(f"{name}[{i}]" for i in range(shape[0])) if shape else (name,)


def _generator(key) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jr.key_data(key)))


def _is_numpyro(distribution):
    numpyro = sys.modules.get("numpyro.distributions")
    return numpyro is not None and isinstance(distribution, numpyro.Distribution)


def _numpyro_bounds(support):
    """Return the lower and upper bounds of a constraint, and whether it is a circle."""
    constraints: Any = sys.modules["numpyro.distributions"].constraints
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    lower = getattr(support, "lower_bound", None)
    upper = getattr(support, "upper_bound", None)
    if support is constraints.circular:
        return -np.pi, np.pi, True
    if support is constraints.real:
        return -np.inf, np.inf, False
    if support.is_discrete or (lower is None and upper is None):
        raise InputError(
            f"the support {support!r} of the prior is not a product of intervals: give the "
            "parameters others that are real numbers in intervals"
        )
    return -np.inf if lower is None else lower, np.inf if upper is None else upper, False


UNBOUNDED = ("Normal", "LogStddevNormal", "Laplace", "Logistic", "Gumbel")
DISTRAX_BOUNDS = {"Beta": (0.0, 1.0), "Gamma": (0.0, np.inf)}


def _distrax_bounds(distribution):
    name = type(distribution).__name__
    if name == "Independent":
        return _distrax_bounds(distribution.distribution)
    if name == "Uniform":
        return np.asarray(distribution.low), np.asarray(distribution.high), False
    if name in UNBOUNDED or name.startswith("MultivariateNormal"):
        return -np.inf, np.inf, False
    if name in DISTRAX_BOUNDS:
        return *DISTRAX_BOUNDS[name], False
    raise InputError(f"the support of distrax's {name} is not known: {ADVICE}")
