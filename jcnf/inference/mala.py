"""The Metropolis-adjusted Langevin algorithm (MALA): samples of p(x_missing | x_known).

A sampler takes a log-density `log_prob`, x (batch, dim) -> (batch,) nats, in which each value
depends on its own row only. `Density(flow)` is the log-density of a flow; wrap it for any
preprocessing. Entries of `x` that are `known` come back unchanged, bit for bit; the others are
where the sampler starts. Conditioning needs nothing more: as a function of the missing entries,
p(x) is proportional to p(x_missing | x_known). A row does not move to a place where the value or
gradient is not finite; such steps are only counted. Each step evaluates value and gradient once.
Everything is one `lax` program without callbacks to the host; the caller jits it
(`equinox.filter_jit`).
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

from jcnf._checks import check_callable, check_finite, check_int, check_key, check_number
from jcnf.divergence import Divergence, Exact
from jcnf.flows import Flow, transform
from jcnf.ode import Solve

LogProb = Callable[[Float[Array, "batch dim"]], Float[Array, " batch"]]
OPTIMAL_ACCEPTANCE = 0.574  # of MALA in many dimensions (Roberts & Rosenthal 1998)


class Density(eqx.Module):
    """The log-density of a flow as a function of x alone, (batch,) nats; NaN if a solve failed.

    Gradients go through the solve by its adjoint. Any adjoint but "forward" works; use "backsolve"
    only if it may raise.

    An adaptive solve shares its steps among the batch, so a row's value depends on the other rows,
    within the tolerance, and the samples of `langevin` are inexact to that degree. With a fixed
    step it does not.
    """

    flow: Flow
    context: Float[Array, "batch context"] | None = None
    solve: Solve = Solve(norm="worst")
    divergence: Divergence = Exact()

    def __call__(self, x: Float[Array, "batch dim"]) -> Float[Array, " batch"]:
        result = transform(
            self.flow, x, context=self.context, solve=self.solve, divergence=self.divergence
        )
        return self.flow.base.log_prob(result.value) + result.logdet


class Chains(NamedTuple):
    """The result of `langevin`."""

    x: Float[Array, "keep batch dim"]  # after `kept_steps(steps, keep)`, not counting the burn-in
    log_prob: Float[Array, "keep batch"]  # at these x, in nats; -inf if it was never finite
    acceptance: Float[Array, " batch"]  # share of proposals accepted after the burn-in
    step: Float[Array, " batch"]  # the step size that the burn-in found
    failed: Int[Array, " batch"]  # proposals whose value or gradient was not finite


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
    """Sample p(x_missing | x_known) by the Metropolis-adjusted Langevin algorithm, MALA.

    A row proposes x' = x + (h s)^2/2 d log p/dx + h s e, e ~ N(0, I), and accepts it with
    probability min(1, p(x') q(x | x') / (p(x) q(x' | x))) (Roberts & Tweedie 1996), which leaves
    p(x_missing | x_known) invariant for any h. Each row has its own h. The burn-in finds it by
    log h <- log h + i^-0.6 (acceptance probability - 0.574), i = 1, 2, ... (Robbins & Monro;
    Andrieu & Thoms 2008, eq. 19; 0.574 is from Roberts & Rosenthal 1998), and it is fixed from then
    on.

    **Arguments:**

    - `x`: (batch, dim), finite; the missing entries are where the chains start.
    - `known`: (dim,) or (batch, dim), True for entries to keep.
    - `key`: consumed once.
    - `keep`: number of states to return, evenly spaced and including the last.
    - `bounds`: (low, high) of the missing entries. The density is 0 outside, so proposals there are
      rejected, by Metropolis's own rule. A row that starts outside stays until a proposal is
      inside.
    - `step`: the initial h.
    - `scale`: s for the missing entries, (dim,) or (batch, dim); by default 1. If the density is
      badly scaled, their spread as s makes the chains faster.

    **Raises:** `ValueError` for wrong shapes and numbers.
    """
    missing = missing_entries(log_prob, x, known, key, steps, keep, bounds)
    check_int(0, burn_in=burn_in)
    check_number("(0, inf)", step=step)
    s = spread(scale, x)
    free = jnp.any(missing, axis=1)
    start = (
        unevaluated(x),
        jnp.full(x.shape[0], np.log(step), x.dtype),
        no_failures(x),
        no_failures(x),
    )

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
        new = (moved, *value_and_gradient(log_prob, moved))
        valid = inside & jnp.isfinite(new[1])
        # The noise e' that would lead back: x = x' + (h s)^2/2 g' + h s e'. The density of a
        # proposal is that of its noise, so log q(x | x') - log q(x' | x) = (|e|^2 - |e'|^2)/2.
        back = -e - hs / 2 * (gradient + new[2])
        log_ratio = new[1] - value + jnp.sum(e**2 - back**2, axis=1) / 2
        log_ratio = jnp.where(valid, log_ratio, -jnp.inf)
        accept = jnp.log(jr.uniform(uniform_key, value.shape, x.dtype)) < log_ratio
        excess = jnp.exp(jnp.minimum(log_ratio, 0)) - jnp.asarray(OPTIMAL_ACCEPTANCE, x.dtype)
        gain = jnp.where((i > 0) & (i <= burn_in), i.astype(x.dtype) ** -0.6, 0)
        return (
            choose_rows(accept, new, current),
            log_h + jnp.where(free, gain * excess, 0),
            accepted + (accept & (i > burn_in)).astype(int),
            failed + (inside & ~valid).astype(int),
        )

    (_, log_h, accepted, failed), kept = iterate(propose, start, burn_in, steps, keep)
    return Chains(
        x=kept[0],
        log_prob=kept[1],
        acceptance=accepted.astype(x.dtype) / steps,
        step=jnp.exp(log_h),
        failed=failed,
    )


def kept_steps(steps: int, keep: int) -> np.ndarray:
    """Return the numbers of steps, (keep,), after which `ascend` and `langevin` keep a state."""
    return np.linspace(0, steps, keep + 1).round().astype(int)[1:]


def missing_entries(log_prob, x, known, key, steps, keep, bounds):
    """Check the arguments, and return which entries may move, (batch, dim)."""
    check_callable("a function of x (batch, dim), such as Density(flow)", log_prob=log_prob)
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
        raise ValueError(
            f"expected known of dtype bool, True to keep; got {jnp.result_type(known)}"
        )
    check_finite(x=x)
    if keep > steps:
        raise ValueError(f"keep must be from 1 to steps; got {keep} of {steps}")
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be (low, high) with low < high; got {bounds}")
    return jnp.broadcast_to(~jnp.asarray(known), x.shape)


def spread(scale, x):
    """Check `scale`, and return it in the shape of x."""
    if scale is not None and not isinstance(scale, Tracer) and not np.all(np.asarray(scale) > 0):
        raise ValueError("scale must be positive in every entry; got 0, negative or NaN entries")
    return jnp.broadcast_to(jnp.asarray(1.0 if scale is None else scale, x.dtype), x.shape)


def unevaluated(x):
    """Return x with a value and gradient that step 0, which does not move, replaces if finite."""
    return x, jnp.full(x.shape[0], -jnp.inf, x.dtype), jnp.zeros_like(x)


def no_failures(x):
    """Return the count 0 for each row."""
    return jnp.zeros(x.shape[0], int)


def value_and_gradient(log_prob, x):
    """Return log p (batch,) and its gradient; -inf and 0 in rows where either is not finite."""

    def total(x):
        value = log_prob(x)
        return jnp.sum(value), value

    (_, value), gradient = jax.value_and_grad(total, has_aux=True)(x)
    finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(gradient), axis=1)
    return jnp.where(finite, value, -jnp.inf), jnp.where(finite[:, None], gradient, 0)


def choose_rows(rows, new, old):
    """Take the rows of `new` where `rows` is True and of `old` elsewhere, array by array."""
    return tuple(
        jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b)
        for a, b in zip(new, old, strict=True)
    )


def iterate(step, state, first, steps, keep) -> Any:
    """Run `state <- step(i, state)` for i from 0 to `first + steps`.

    Returns the last state, and x and log p of the `keep` states.
    """
    ends = first + kept_steps(steps, keep) + 1

    def to_next(state, interval):
        after: Any = jax.lax.fori_loop(interval[0], interval[1], step, state)
        return after, after[0][:2]

    intervals = np.concatenate([[0], ends[:-1]]), ends
    return jax.lax.scan(to_next, state, jax.tree.map(jnp.asarray, intervals))
