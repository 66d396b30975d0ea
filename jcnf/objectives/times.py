"""Where along its path a sample is looked at: `times(key, num) -> (num,)` in [0, 1).

Flow matching is an average over these times: a density other than the uniform one weights them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from jcnf._checks import check_int, check_key

Times = Callable[[Key[Array, ""], int], Float[Array, " num"]]


def uniform(key: Key[Array, ""], num: int) -> Float[Array, " num"]:
    """Independent and uniform; consumes `key`."""
    _check(key, num)
    return jr.uniform(key, (num,))


def lattice(key: Key[Array, ""], num: int) -> Float[Array, " num"]:
    """Each uniform, and together evenly spread: u + i/num modulo 1 with one u; consumes `key`.

    The average over a batch then has less variance (Kingma et al. 2021, variational diffusion).
    """
    _check(key, num)
    return (jr.uniform(key) + jnp.arange(num) / num) % 1


def late(key: Key[Array, ""], num: int) -> Float[Array, " num"]:
    """1 - u^(3/2): more of them near the data, where details arise; consumes `key`."""
    share = lattice(key, num) ** 1.5
    # Not 1 itself, which small ones are rounded to: there a velocity may have no value.
    return 1 - jnp.maximum(share, jnp.finfo(share.dtype).eps)


def logit_normal(key: Key[Array, ""], num: int) -> Float[Array, " num"]:
    """sigmoid of a standard normal: most around the middle (Esser et al. 2024); consumes `key`."""
    _check(key, num)
    return jax.nn.sigmoid(jr.normal(key, (num,)))


def _check(key, num):
    check_key(key)
    check_int(num=num)


TIMES: dict[str, Times] = {
    "uniform": uniform,
    "lattice": lattice,
    "late": late,
    "logit_normal": logit_normal,
}
