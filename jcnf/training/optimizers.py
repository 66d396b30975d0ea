"""Optimizers with schedules."""

import jax.numpy as jnp
import optax

from jcnf._checks import check_int, check_number


def make_optimizer(
    learning_rate: float,
    steps: int,
    *,
    warmup: int = 0,
    weight_decay: float = 0.0,
    clip: float = jnp.inf,
    schedule: str = "cosine",
) -> optax.GradientTransformation:
    """AdamW under global-norm clipping; linear warm-up, then a cosine to zero at `steps`.

    With `schedule="constant"` the rate stays after the warm-up. The decay is decoupled, and of all
    parameters, biases included.

    **Raises:** `ValueError` for another schedule, and for numbers out of range.
    """
    check_number("(0, inf)", learning_rate=learning_rate)
    check_number("(0, inf]", clip=clip)
    check_number("[0, inf)", weight_decay=weight_decay)
    check_int(steps=steps)
    check_int(0, warmup=warmup)
    start = learning_rate if warmup == 0 else 0.0
    if schedule == "cosine":
        rate = optax.schedules.warmup_cosine_decay_schedule(
            start, learning_rate, warmup, max(steps, warmup + 1)
        )
    elif schedule == "constant":
        rate = optax.schedules.warmup_constant_schedule(start, learning_rate, warmup)
    else:
        raise ValueError(f"unknown schedule {schedule!r}: use cosine or constant")
    return optax.chain(
        optax.clip_by_global_norm(clip), optax.adamw(rate, weight_decay=weight_decay)
    )
