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
    """Return AdamW with gradients clipped by their global norm, and a learning-rate schedule.

    **Arguments:**

    - `learning_rate`: the peak learning rate.
    - `steps`: the step at which the cosine schedule reaches zero.
    - `warmup`: number of steps in which the rate rises linearly from zero.
    - `weight_decay`: decoupled, and applied to all parameters, biases included.
    - `clip`: the largest global norm of a gradient.
    - `schedule`: "cosine", or "constant" for a rate that stays constant after the warm-up.

    **Raises:** `ValueError` for an unknown schedule, and for numbers out of range.
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
        raise ValueError(f"schedule must be 'cosine' or 'constant'; got {schedule!r}")
    return optax.chain(
        optax.clip_by_global_norm(clip), optax.adamw(rate, weight_decay=weight_decay)
    )
