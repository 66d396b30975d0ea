"""Filling in what is missing: the modes and the samples of p(x_missing | x_known).

A sampler takes a log-density `log_prob`, x (batch, dim) -> (batch,) nats, each row's a function of
that row: `Density(flow)` is a flow's, and a preprocessing goes around it. Entries of `x` that are
`known` come back as they were, bit for bit; the others are where the sampler starts. Conditioning
takes no more than this: as a function of the missing entries, p(x) is p(x_missing | x_known) but
for a factor. A value or gradient that is not finite is a place where the row does not go, counted
and nothing worse. Each step takes value and gradient once; everything is one `lax` program without
callbacks to the host, to be jitted by whoever calls it (`equinox.filter_jit`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from jcnf._checks import (
    check_callable,
    check_finite,
    check_int,
    check_key,
    check_number,
    check_shape,
)
from jcnf.divergence import Divergence, Exact
from jcnf.flows import Flow, transform
from jcnf.ode import Solve

LogProb = Callable[[Float[Array, "batch dim"]], Float[Array, " batch"]]
SIDES = ("top", "bottom", "left", "right")
OPTIMAL = 0.574  # acceptance of Langevin proposals in many dimensions (Roberts & Rosenthal 1998)


class Density(eqx.Module):
    """log p of a flow as a function of x alone, nats (batch,): NaN where a solve failed.

    Gradients go through the solve by its adjoint: any but "forward", and "backsolve" only where
    raising is welcome.

    The steps of an adaptive solve are the batch's, so that a row's value depends on the others'
    within the tolerance, by which the samples of `langevin` are then out; under a fixed step it
    does not.
    """

    flow: Flow
    context: Float[Array, "batch context"] | None = None
    solve: Solve = Solve(norm="worst")
    divergence: Divergence = Exact()

    def __call__(self, x: Float[Array, "batch dim"]) -> Float[Array, " batch"]:
        """log p of each row."""

        result = transform(
            self.flow, x, context=self.context, solve=self.solve, divergence=self.divergence
        )
        return self.flow.base.log_prob(result.x) + result.logdet


class Ascent(NamedTuple):
    """What `ascend` returns."""

    x: Float[Array, "keep batch dim"]  # after `kept_steps(steps, keep)`
    log_prob: Float[Array, "keep batch"]  # nats, of these; -inf where it was never finite
    failed: Int[Array, " batch"]  # steps not taken: value or gradient were not finite there


class Chains(NamedTuple):
    """What `langevin` returns."""

    x: Float[Array, "keep batch dim"]  # after `kept_steps(steps, keep)`, the burn-in not counted
    log_prob: Float[Array, "keep batch"]  # nats, of these; -inf where it was never finite
    acceptance: Float[Array, " batch"]  # share of proposals accepted after the burn-in
    step: Float[Array, " batch"]  # the step size that the burn-in came to
    failed: Int[Array, " batch"]  # proposals whose value or gradient was not finite


def ascend(
    log_prob: LogProb,
    x: Float[Array, "batch dim"],
    known: Bool[Array | np.ndarray, "*rows dim"],
    key: Key[Array, ""],
    *,
    steps: int,
    keep: int = 1,
    bounds: tuple[float, float] | None = None,
    rate: Callable[[Float[Array, ""]], Any] = lambda i: 10 / (100 + i),
    noise: float = 1.0,
    scale: Float[Array | np.ndarray, "*rows dim"] | None = None,
) -> Ascent:
    """NICE's inpainting: x_H <- x_H + a_i s (s d log p / dx_H + e), e ~ noise N(0, I).

    Noisy gradient ascent on the missing entries x_H, clipped to `bounds` after each step (Dinh et
    al. 2014, section 5.2). With `noise=0` it goes to a mode of p(x_H | x_known); with noise about
    one, but not to samples: those are `langevin`'s.

    **Arguments:**

    - `x`: (batch, dim), finite; the missing entries are where it starts.
    - `known`: (dim,) or (batch, dim), True for entries to keep.
    - `key`: consumed once.
    - `keep`: how many states to return, at even distances, the last among them.
    - `rate`: a_i of step i = 0, 1, ..., unless given the paper's 10 / (100 + i).
    - `scale`: s, of x's missing entries, (dim,) or (batch, dim); the paper's is 1. Their spread
      makes the rule that of x/s: without it steps of a_i throw pixels that hardly vary, whose
      gradients are large, from one bound to the other.

    **Raises:** `ValueError` for bad shapes and numbers.
    """
    missing = _missing(log_prob, x, known, key, steps, keep, bounds)
    check_callable("a function of the step, i -> a_i", rate=rate)
    check_number("[0, inf)", noise=noise)
    s = _spread(scale, x)

    def step(i, state):
        current, failed = state
        x, _, gradient = current
        e = noise * jr.normal(jr.fold_in(key, i), x.shape, x.dtype)
        moved = x + rate(i.astype(x.dtype) - 1) * s * (s * gradient + e)
        moved = moved if bounds is None else jnp.clip(moved, *bounds)
        moved = jnp.where(missing & (i > 0), moved, x)
        new = (moved, *_value_and_gradient(log_prob, moved))
        arrived = jnp.isfinite(new[1])
        return _choose(arrived, new, current), failed + (~arrived).astype(int)

    (_, failed), kept = _march(step, (_start(x), _none(x)), 0, steps, keep)
    return Ascent(x=kept[0], log_prob=kept[1], failed=failed)


def langevin(
    log_prob: LogProb,
    x: Float[Array, "batch dim"],
    known: Bool[Array | np.ndarray, "*rows dim"],
    key: Key[Array, ""],
    *,
    steps: int,
    burn_in: int,
    keep: int = 1,
    bounds: tuple[float, float] | None = None,
    step: float = 1.0,
    scale: Float[Array | np.ndarray, "*rows dim"] | None = None,
) -> Chains:
    """Samples of p(x_missing | x_known) by the Metropolis-adjusted Langevin algorithm, MALA.

    A row proposes x' = x + (h s)^2/2 d log p/dx + h s e, e ~ N(0, I), and accepts it with
    probability min(1, p(x') q(x | x') / (p(x) q(x' | x))) (Roberts & Tweedie 1996), so that it
    leaves p(x_missing | x_known) invariant whatever h is. Each row has an h of its own, found in
    the burn-in by log h <- log h + i^-0.6 (acceptance probability - 0.574), i = 1, 2, ...
    (Robbins & Monro; Andrieu & Thoms 2008, eq. 19; 0.574 is Roberts & Rosenthal's, 1998) and
    fixed from then on.

    **Arguments:**

    - `x`: (batch, dim), finite; the missing entries are where the chains start.
    - `known`: (dim,) or (batch, dim), True for entries to keep.
    - `key`: consumed once.
    - `keep`: how many states to return, at even distances, the last among them.
    - `bounds`: of the missing entries. The density is 0 outside: proposals there are rejected,
      which is Metropolis's own rule. Where x starts outside, it stays till a proposal is inside.
    - `step`: h at first.
    - `scale`: s, of x's missing entries, (dim,) or (batch, dim), 1 unless given: their spread
      makes the chains of a badly scaled density faster.

    **Raises:** `ValueError` for bad shapes and numbers.
    """
    missing = _missing(log_prob, x, known, key, steps, keep, bounds)
    check_int(0, burn_in=burn_in)
    check_number("(0, inf)", step=step)
    s = _spread(scale, x)
    free = jnp.any(missing, axis=1)
    start = (_start(x), jnp.full(x.shape[0], np.log(step), x.dtype), _none(x), _none(x))

    def propose(i, state):
        current, log_h, accepted, failed = state
        x, value, gradient = current
        noise_key, uniform_key = jr.split(jr.fold_in(key, i))
        e = jnp.where(missing, jr.normal(noise_key, x.shape, x.dtype), 0)
        hs = jnp.where(missing & (i > 0), jnp.exp(log_h)[:, None] * s, 0)
        moved = jnp.where(hs > 0, x + hs**2 / 2 * gradient + hs * e, x)
        inside = jnp.ones(x.shape[0], bool)
        if bounds is not None:
            low, high = bounds
            inside = jnp.all(~missing | ((low <= moved) & (moved <= high)), axis=1)
        moved = jnp.where(inside[:, None], moved, x)
        new = (moved, *_value_and_gradient(log_prob, moved))
        valid = inside & jnp.isfinite(new[1])
        # The noise that would lead back: x = x' + (h s)^2/2 g' + h s e'.
        back = -e - hs / 2 * (gradient + new[2])
        log_ratio = new[1] - value + jnp.sum(e**2 - back**2, axis=1) / 2
        log_ratio = jnp.where(valid, log_ratio, -jnp.inf)
        accept = jnp.log(jr.uniform(uniform_key, value.shape, x.dtype)) < log_ratio
        excess = jnp.exp(jnp.minimum(log_ratio, 0)) - jnp.asarray(OPTIMAL, x.dtype)
        gain = jnp.where((i > 0) & (i <= burn_in), i.astype(x.dtype) ** -0.6, 0)
        return (
            _choose(accept, new, current),
            log_h + jnp.where(free, gain * excess, 0),
            accepted + (accept & (i > burn_in)).astype(int),
            failed + (inside & ~valid).astype(int),
        )

    (_, log_h, accepted, failed), kept = _march(propose, start, burn_in, steps, keep)
    return Chains(
        x=kept[0],
        log_prob=kept[1],
        acceptance=accepted.astype(x.dtype) / steps,
        step=jnp.exp(log_h),
        failed=failed,
    )


def kept_steps(steps: int, keep: int) -> np.ndarray:
    """The numbers of steps, (keep,), after which `ascend` and `langevin` keep a state."""
    return np.linspace(0, steps, keep + 1).round().astype(int)[1:]


def half(shape: tuple[int, int, int], side: str) -> Bool[np.ndarray, " dim"]:
    """A mask `known` for pictures: True on that side, "top", "bottom", "left" or "right".

    `shape`: (height, width, channels), in which pictures are flattened row by row. Of an odd
    number of rows or columns the middle one is not known.
    """
    check_shape("shape", shape)
    if side not in SIDES:
        raise ValueError(f"unknown side {side!r}: use one of {', '.join(SIDES)}")
    mask = np.zeros(shape, bool)
    axis = SIDES.index(side) // 2
    count = shape[axis] // 2
    chosen = slice(0, count) if side in ("top", "left") else slice(shape[axis] - count, None)
    mask[(slice(None),) * axis + (chosen,)] = True
    return mask.ravel()


def _missing(log_prob, x, known, key, steps, keep, bounds):
    """Which entries may move, (batch, dim)."""
    check_callable("a function of x (batch, dim), as Density(flow) is", log_prob=log_prob)
    check_key(key)
    check_int(steps=steps, keep=keep)
    if jnp.ndim(x) != 2 or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise ValueError(
            f"expected floating x of shape (batch, dim); got {jnp.shape(x)}, {jnp.result_type(x)}"
        )
    if jnp.shape(known) not in (x.shape, x.shape[1:]):
        raise ValueError(
            f"expected known of shape {x.shape} or {x.shape[1:]}; got {jnp.shape(known)}"
        )
    if not jnp.issubdtype(jnp.result_type(known), jnp.bool_):
        raise ValueError(f"expected known of bool, True to keep; got {jnp.result_type(known)}")
    check_finite(x=x)
    if keep > steps:
        raise ValueError(f"keep must be from 1 to steps; got {keep} of {steps}")
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be (low, high) with low < high; got {bounds}")
    return jnp.broadcast_to(~jnp.asarray(known), x.shape)


def _spread(scale, x):
    if scale is not None and not isinstance(scale, Tracer) and not np.all(np.asarray(scale) > 0):
        raise ValueError("scale must be positive, for it is a spread; got 0, less or NaN in it")
    return jnp.broadcast_to(jnp.asarray(1.0 if scale is None else scale, x.dtype), x.shape)


def _start(x):
    """x with a value and a gradient that any finite ones replace: step 0 is to stay and look."""
    return x, jnp.full(x.shape[0], -jnp.inf, x.dtype), jnp.zeros_like(x)


def _none(x):
    return jnp.zeros(x.shape[0], int)


def _value_and_gradient(log_prob, x):
    """log p (batch,), -inf where it or its gradient is not finite, and the gradient, 0 there."""

    def total(x):
        value = log_prob(x)
        return jnp.sum(value), value

    (_, value), gradient = jax.value_and_grad(total, has_aux=True)(x)
    finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(gradient), axis=1)
    return jnp.where(finite, value, -jnp.inf), jnp.where(finite[:, None], gradient, 0)


def _choose(rows, new, old):
    """Of each array the new rows where `rows`, the old ones elsewhere."""
    return tuple(
        jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b)
        for a, b in zip(new, old, strict=True)
    )


def _march(step, state, first, steps, keep) -> Any:
    """`state <- step(i, state)`, i from 0 to `first + steps`; the last, and x and log p of some."""
    ends = first + kept_steps(steps, keep) + 1

    def to_next(state, interval):
        after: Any = jax.lax.fori_loop(interval[0], interval[1], step, state)
        return after, after[0][:2]

    intervals = np.concatenate([[0], ends[:-1]]), ends
    return jax.lax.scan(to_next, state, jax.tree.map(jnp.asarray, intervals))
