"""A flow as distrax objects: a bijector from base to data, and the distribution of the data.

Flow, context, solve and divergence are attributes of these objects. Like all distrax objects they
are pytrees, so they can be arguments of `jax.jit`, `jax.vmap` or `jax.grad`. To use
`eqx.filter_grad`, differentiate with respect to the flow and build the distribution inside. The
module has to be imported explicitly (`from jcnf.flows.distrax import FlowDistribution`), because
distrax imports TensorFlow Probability and `import jcnf` should stay light.
"""

import distrax
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from jcnf.divergence import Divergence, Exact
from jcnf.flows._events import (
    batch_shape,
    check_settings,
    draw_events,
    in_one_batch,
    log_prob_of_events,
)
from jcnf.flows.base import Direction, Flow, check_batch, error_if_failed
from jcnf.flows.functional import (
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
        check_settings(flow, context, solve, divergence)
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

        return in_one_batch(run, self.flow, x, self.context)

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

        return in_one_batch(run, self.flow, x, self.context)


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
        check_settings(flow, context, solve, divergence)
        self.flow, self.solve, self.divergence = flow, solve, divergence
        self.context = None if context is None else jnp.asarray(context)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one event, (dim,)."""
        return (self.flow.dim,)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Batch shape of the context; () without one."""
        return batch_shape(self.context)

    @property
    def dtype(self):
        """Dtype of the samples, taken from the base."""
        return jax.eval_shape(lambda: self.flow.base.sample(jr.key(0), 1)).dtype

    def log_prob(self, value: Float[ArrayLike, "*samples dim"]) -> Float[Array, "*batch"]:
        """Return the log-density of each event in nats.

        The batch shape of the events broadcasts with `batch_shape`.
        """

        return log_prob_of_events(self.flow, value, self.context, self.solve, self.divergence)

    def _sample_n(self, key: PRNGKeyArray, n: int):
        return draw_events(sample, self.flow, key, (n,), self.context, solve=self.solve)

    def _sample_n_and_log_prob(self, key: PRNGKeyArray, n: int):
        settings = {"solve": self.solve, "divergence": self.divergence}
        return draw_events(sample_and_log_prob, self.flow, key, (n,), self.context, **settings)
