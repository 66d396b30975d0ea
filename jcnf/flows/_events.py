"""Events of any batch shape in one batch of a flow, for the adapters to other libraries."""

import math

import jax
import jax.numpy as jnp
import jax.random as jr

from jcnf.flows.base import check_flow, check_strategy
from jcnf.flows.functional import log_prob


def check_settings(flow, context, solve, divergence):
    """Raise `ValueError` for a context of the wrong size, and for a divergence with noise."""
    check_flow(flow)
    check_strategy(solve, divergence)
    size, shape = flow.context_dim, (0,) if context is None else jnp.shape(context)
    if not shape or size not in (None, shape[-1]):
        got = "none" if context is None else f"one of shape {shape}"
        raise ValueError(
            f"the flow takes a context of size {size}; got {got}: "
            "give context of shape (*batch, context)"
        )
    if jax.eval_shape(lambda: divergence.draw_noise(jr.key(0), 1, flow.dim, float)) is not None:
        raise ValueError(
            f"divergence must be deterministic, but {divergence} draws noise: use Exact(), or "
            "jcnf.log_prob with a key"
        )


def batch_shape(context):
    """Return the batch shape of a context, () without one."""
    return () if context is None else context.shape[:-1]


def in_one_batch(run, flow, x, context):
    """Call `run(x, context)` on rows, made from events and a context of any batch shape."""
    x, dim = jnp.asarray(x), flow.dim
    if x.shape[-1:] != (dim,):
        hint = ": add the event's axis with x[..., None]" if dim == 1 else ""
        raise ValueError(f"expected events of shape (..., {dim}); got {x.shape}{hint}")
    try:
        shape = jnp.broadcast_shapes(x.shape[:-1], batch_shape(context))
    except ValueError:
        raise ValueError(
            f"events of shape {x.shape} do not broadcast with a context of shape {context.shape}: "
            f"samples come first, as in (samples, {', '.join(map(str, context.shape[:-1]))}, {dim})"
        ) from None
    return _shaped(run(_rows(x, shape), _rows(context, shape)), shape)


def log_prob_of_events(flow, value, context, solve, divergence):
    """Return the log-density of events (..., dim) in nats, by one solve."""

    def run(x, context):
        return log_prob(flow, x, context=context, solve=solve, divergence=divergence)

    return in_one_batch(run, flow, value, context)


def draw_events(how, flow, key, samples, context, **settings):
    """Draw `samples` (a shape) for each context by `how(flow, key, num, ...)`, in one solve."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jr.wrap_key_data(key)
    shape = (*samples, *batch_shape(context))
    drawn = how(flow, key, math.prod(shape), context=_rows(context, shape), **settings)
    return _shaped(drawn, shape)


def _rows(a, shape):
    # The flow takes (batch, dim) and no other rank, so the batch dimensions are flattened.
    return a if a is None else jnp.broadcast_to(a, (*shape, a.shape[-1])).reshape(-1, a.shape[-1])


def _shaped(rows, shape):
    return jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), rows)
