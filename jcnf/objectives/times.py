"""Random times for flow matching, one per sample's path: `times(key, num) -> (num,)` in [0, 1).

The loss is an average over these times, so a density other than the uniform one weights it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from jcnf._checks import check_int, check_key

Times = Callable[[Key[Array, ""], int], Float[Array, " num"]]


def uniform(key: Key[Array, ""], num: int) -> Float[Array, " num"]:
    """Draw independent uniform times; consumes `key`."""
    _check(key, num)
    return jr.uniform(key, (num,))


def stratified(key: Key[Array, ""], num: int) -> Float[Array, " num"]:
    """Draw evenly spread times, u + i/num modulo 1 with one uniform u; consumes `key`.

    Each time is uniform, and the average over a batch has less variance than with independent times
    (Kingma et al. 2021, variational diffusion).
    """
    _check(key, num)
    return (jr.uniform(key) + jnp.arange(num) / num) % 1


def data_biased(key: Key[Array, ""], num: int) -> Float[Array, " num"]:
    """Draw times 1 - u^(3/2), more of them near the data, where details arise; consumes `key`."""
    share = stratified(key, num) ** 1.5
    # A small share must not round the time to 1, where a velocity may be undefined.
    return 1 - jnp.maximum(share, jnp.finfo(share.dtype).eps)


def logit_normal(key: Key[Array, ""], num: int) -> Float[Array, " num"]:
    """Draw sigmoids of normals, most near the middle (Esser et al. 2024); consumes `key`."""
    _check(key, num)
    return jax.nn.sigmoid(jr.normal(key, (num,)))


def _check(key, num):
    check_key(key)
    check_int(num=num)


TIMES: dict[str, Times] = {
    "uniform": uniform,
    "stratified": stratified,
    "data_biased": data_biased,
    "logit_normal": logit_normal,
}
