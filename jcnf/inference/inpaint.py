"""Inpainting of images: modes of p(x_missing | x_known) by noisy ascent, and masks.

`log_prob`, `x` and `known` are as in `jcnf.inference.mala`, whose `langevin` draws samples.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jcnf._checks import check_callable, check_number, check_shape
from jcnf.inference.mala import (
    LogProb,
    choose_rows,
    iterate,
    missing_entries,
    no_failures,
    spread,
    unevaluated,
    value_and_gradient,
)

SIDES = ("top", "bottom", "left", "right")


class Ascent(NamedTuple):
    """The result of `ascend`."""

    x: Float[Array, "keep batch dim"]  # after `mala.kept_steps(steps, keep)`
    log_prob: Float[Array, "keep batch"]  # at these x, in nats; -inf if it was never finite
    failed: Int[Array, " batch"]  # steps not taken because value or gradient was not finite


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
    """NICE's inpainting: x_H <- x_H + a_i s (s d log p / dx_H + e), with e ~ noise N(0, I).

    Noisy gradient ascent on the missing entries x_H, clipped to `bounds` after each step (Dinh et
    al. 2014, section 5.2). With `noise=0` it converges to a mode of p(x_H | x_known). With noise it
    ends near a mode, but not at a sample: use `mala.langevin` for samples.

    **Arguments:**

    - `x`: (batch, dim), finite; the missing entries are where it starts.
    - `known`: (dim,) or (batch, dim), True for entries to keep.
    - `key`: consumed once.
    - `keep`: number of states to return, evenly spaced and including the last.
    - `rate`: a_i as a function of the step i = 0, 1, ...; by default the paper's 10 / (100 + i).
    - `scale`: s for the missing entries, (dim,) or (batch, dim); the paper's is 1. With their
      spread as s, the paper's rule applies to x/s. Otherwise pixels that hardly vary, and so have
      large gradients, jump from one bound to the other.

    **Raises:** `ValueError` for wrong shapes and numbers.
    """
    missing = missing_entries(log_prob, x, known, key, steps, keep, bounds)
    check_callable("a function of the step, i -> a_i", rate=rate)
    check_number("[0, inf)", noise=noise)
    s = spread(scale, x)

    def step(i, state):
        current, failed = state
        x, _, gradient = current
        e = noise * jr.normal(jr.fold_in(key, i), x.shape, x.dtype)
        moved = x + rate(i.astype(x.dtype) - 1) * s * (s * gradient + e)
        moved = moved if bounds is None else jnp.clip(moved, *bounds)
        moved = jnp.where(missing & (i > 0), moved, x)
        new = (moved, *value_and_gradient(log_prob, moved))
        finite = jnp.isfinite(new[1])
        return choose_rows(finite, new, current), failed + (~finite).astype(int)

    (_, failed), kept = iterate(step, (unevaluated(x), no_failures(x)), 0, steps, keep)
    return Ascent(x=kept[0], log_prob=kept[1], failed=failed)


def half(shape: tuple[int, int, int], side: str) -> Bool[np.ndarray, " dim"]:
    """Return a mask `known` for images, True on one side: "top", "bottom", "left" or "right".

    `shape` is (height, width, channels); images are flattened row by row. If the number of rows or
    columns is odd, the middle one is not known.
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
