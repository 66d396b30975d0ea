"""A flow as distrax objects: a bijector from base to data, and the distribution of the data.

Flow, context, solve and divergence are attributes of these objects. Like all distrax objects they
are pytrees, so they can be arguments of `jax.jit`, `jax.vmap` or `jax.grad`. To use
`eqx.filter_grad`, differentiate with respect to the flow and build the distribution inside. The
module has to be imported explicitly (`from jcnf.flows.distrax import FlowDistribution`), because
distrax imports TensorFlow Probability and `import jcnf` should stay light.
"""

import math

import distrax
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from jcnf.divergence import Divergence, Exact
from jcnf.flows.base import (
    Direction,
    Flow,
    check_batch,
    check_flow,
    check_strategy,
    error_if_failed,
)
from jcnf.flows.functional import (
    log_prob,
    sample,
    sample_and_log_prob,
    transform,
    transform_without_logdet,
)
from jcnf.ode import Solve


class FlowBijector(distrax.Bijector):
    """The map of a flow on events of shape (dim,), forward from base to data.

    Events of any batch shape (..., dim) take one solve. `forward` and `inverse` do not compute the
    log-det, which makes them cheaper. `distrax.Transformed` samples with `jax.vmap`, so it needs a
    solve per sample; if its base is the flow's own, `FlowDistribution` does the same in one solve.

    **Arguments:**

    - `flow`: a `jcnf.Flow`, such as `jcnf.CNF(field, base)`.
    - `context`: `(*batch, context)` for a conditional flow. Each context gives one map, and the
      batch shape of the events broadcasts with that of the contexts.
    - `solve`: solver and accuracy.
    - `divergence`: one without noise, such as `Exact()`.

    **Raises:** `ValueError` for a context of the wrong size, a divergence with noise or events of
    the wrong shape; `equinox.EquinoxRuntimeError` if a solve fails.
    """

    def __init__(
        self,
        flow: Flow,
        context: Float[Array, "*batch context"] | None = None,
        solve: Solve = Solve(),  # noqa: B008 (frozen)
        divergence: Divergence = Exact(),  # noqa: B008 (frozen)
    ):
        super().__init__(event_ndims_in=1)
        _check(flow, context, solve, divergence)
        self.flow, self.solve, self.divergence = flow, solve, divergence
        self.context = None if context is None else jnp.asarray(context)

    def forward(self, x: Float[ArrayLike, "*samples dim"]) -> Float[Array, "*batch dim"]:
        """Return the data y for base samples x."""
        return self._carry(x, "to_data")

    def inverse(self, y: Float[ArrayLike, "*samples dim"]) -> Float[Array, "*batch dim"]:
        """Return the base samples x for data y."""
        return self._carry(y, "to_base")

    def forward_and_log_det(
        self, x: Float[ArrayLike, "*samples dim"]
    ) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"]]:
        """Return the data y for base samples x, and log|det dy/dx| in nats."""
        return self._transform(x, "to_data")

    def inverse_and_log_det(
        self, y: Float[ArrayLike, "*samples dim"]
    ) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"]]:
        """Return the base samples x for data y, and log|det dx/dy| in nats."""
        return self._transform(y, "to_base")

    def same_as(self, other: distrax.Bijector) -> bool:
        """Return True if both hold the very same arrays and equal settings."""
        # The tree structure of a distrax object includes everything that is not an array.
        (mine, structure), (theirs, other_structure) = map(jax.tree.flatten, (self, other))
        return structure == other_structure and all(
            a is b for a, b in zip(mine, theirs, strict=True)
        )

    def _carry(self, x, direction: Direction):
        def run(x, context):
            check_batch(self.flow, x, context)
            return transform_without_logdet(self.flow, x, direction, context, self.solve)

        return _in_one_batch(run, self.flow, x, self.context)

    def _transform(self, x, direction: Direction):
        def run(x, context):
            result = transform(
                self.flow,
                x,
                direction=direction,
                context=context,
                solve=self.solve,
                divergence=self.divergence,
            )
            return error_if_failed((result.value, result.logdet), result.stats.failed)

        return _in_one_batch(run, self.flow, x, self.context)


class FlowDistribution(distrax.Distribution):
    """The distribution of a flow's data: events of shape (dim,), log-densities in nats.

    `log_prob`, `sample` and `sample_and_log_prob` are the functions of `jcnf`, with one solve for
    any batch; `seed` is a key, old-style or typed, or a whole number. Arguments and errors are the
    same as for `FlowBijector`. Contexts `(*batch, context)` give the `batch_shape` `(*batch,)`.
    """

    def __init__(
        self,
        flow: Flow,
        context: Float[Array, "*batch context"] | None = None,
        solve: Solve = Solve(),  # noqa: B008 (frozen)
        divergence: Divergence = Exact(),  # noqa: B008 (frozen)
    ):
        super().__init__()
        _check(flow, context, solve, divergence)
        self.flow, self.solve, self.divergence = flow, solve, divergence
        self.context = None if context is None else jnp.asarray(context)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one event, (dim,)."""
        return (self.flow.dim,)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Batch shape of the context; () without one."""
        return _batch_shape(self.context)

    @property
    def dtype(self):
        """Dtype of the samples, taken from the base."""
        return jax.eval_shape(lambda: self.flow.base.sample(jr.key(0), 1)).dtype

    def log_prob(self, value: Float[ArrayLike, "*samples dim"]) -> Float[Array, "*batch"]:
        """Return the log-density of each event in nats.

        The batch shape of the events broadcasts with `batch_shape`.
        """

        def run(x, context):
            settings = {"solve": self.solve, "divergence": self.divergence}
            return log_prob(self.flow, x, context=context, **settings)

        return _in_one_batch(run, self.flow, value, self.context)

    def _sample_n(self, key: PRNGKeyArray, n: int):
        return self._draw(sample, key, n)

    def _sample_n_and_log_prob(self, key: PRNGKeyArray, n: int):
        return self._draw(sample_and_log_prob, key, n, divergence=self.divergence)

    def _draw(self, how, key, n, **settings):
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jr.wrap_key_data(key)
        shape = (n, *self.batch_shape)
        context = _rows(self.context, shape)
        drawn = how(self.flow, key, math.prod(shape), context=context, solve=self.solve, **settings)
        return _shaped(drawn, shape)


def _in_one_batch(run, flow, x, context):
    """Call `run(x, context)` on rows, made from events and a context of any batch shape."""
    x, dim = jnp.asarray(x), flow.dim
    if x.shape[-1:] != (dim,):
        hint = ": add the event's axis with x[..., None]" if dim == 1 else ""
        raise ValueError(f"expected events of shape (..., {dim}); got {x.shape}{hint}")
    try:
        shape = jnp.broadcast_shapes(x.shape[:-1], _batch_shape(context))
    except ValueError:
        raise ValueError(
            f"events of shape {x.shape} do not broadcast with a context of shape {context.shape}: "
            f"samples come first, as in (samples, {', '.join(map(str, context.shape[:-1]))}, {dim})"
        ) from None
    return _shaped(run(_rows(x, shape), _rows(context, shape)), shape)


def _rows(a, shape):
    # The flow takes (batch, dim) and no other rank, so the batch dimensions are flattened.
    return a if a is None else jnp.broadcast_to(a, (*shape, a.shape[-1])).reshape(-1, a.shape[-1])


def _shaped(rows, shape):
    return jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), rows)


def _batch_shape(context):
    return () if context is None else context.shape[:-1]


def _check(flow, context, solve, divergence):
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
