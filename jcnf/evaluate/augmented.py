"""Log-densities of an augmented flow's data, with its extra dimensions marginalized out."""

from functools import partial

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from jcnf._checks import check_finite, check_int, check_key
from jcnf.evaluate.chunks import solve_in_chunks
from jcnf.evaluate.log_prob import ACCURATE, LogProbs, full_precision
from jcnf.flows import Flow
from jcnf.flows.augmented import solve_bound
from jcnf.ode import Solve


def marginal_log_prob(
    flow: Flow,
    x: Float[Array, "n dim"],
    key: Key[Array, ""],
    *,
    samples: int = 32,
    solve: Solve = ACCURATE,
    chunk: int | None = None,
) -> LogProbs:
    """Return `jcnf.flows.augmented.log_prob_bound` of each point, in chunks of one program.

    The density is unbiased, so its logarithm is too low on average, less so with more `samples`: an
    NLL computed from it is an upper bound. `key` is consumed once; the noise of a point does not
    depend on `chunk`.

    **Raises:** `ValueError` if x is not a finite floating array (n, dim), or `samples` is below 1.
    """
    shape, dtype = np.shape(x), np.asarray(x).dtype
    if len(shape) != 2 or not shape[0] or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"expected floating x of shape (n, dim); got {dtype} of shape {shape}")
    check_finite(x=x)
    check_key(key)
    check_int(samples=samples)
    x = jnp.asarray(x)
    program, rows = partial(_marginal, flow, samples), (x, jr.split(key, len(x)))
    return LogProbs(*solve_in_chunks(program, solve, rows, chunk))


@eqx.filter_jit
@full_precision
def _marginal(flow, samples, solve, x, keys):
    return solve_bound(flow, x, keys, samples=samples, solve=solve)
