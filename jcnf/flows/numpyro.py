"""A flow as a numpyro distribution: a prior, a likelihood or a guide.

```python
import jax.random as jr
import numpyro
from numpyro import distributions as dist
from numpyro.infer import MCMC, NUTS

from jcnf.flows.numpyro import FlowDistribution

def model(y):
    x = numpyro.sample("x", FlowDistribution(flow))  # x (dim,)
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)  # y (dim,)

chain = MCMC(NUTS(model), num_warmup=500, num_samples=1000)
chain.run(jr.key(0), y)
chain.get_samples()["x"]  # (1000, dim)
```

NUTS differentiates the log-density by the solve's adjoint and needs no options. In a guide, the
flow may come from `numpyro.contrib.module.eqx_module`, whose parameters SVI trains. Install the
extra `numpyro`, and import this module explicitly: `import jcnf` does not need numpyro.
"""

import equinox as eqx
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.distributions import Distribution, constraints

from jcnf.divergence import Divergence, Exact
from jcnf.flows._events import batch_shape, check_settings, draw_events, log_prob_of_events
from jcnf.flows.base import Flow
from jcnf.flows.functional import sample
from jcnf.ode import Solve


class FlowDistribution(Distribution):
    """The distribution of a flow's data: events of shape (dim,), log-densities in nats.

    `sample` and `log_prob` take one solve for any batch.

    **Arguments:**

    - `flow`: a `jcnf.Flow`, such as `jcnf.CNF(field, base)`.
    - `context`: (*batch, context) for a conditional flow; it gives the batch shape (*batch,).
    - `solve`: solver and accuracy.
    - `divergence`: one without noise, such as `Exact()`.

    **Raises:** `ValueError` for a context of the wrong size, a divergence with noise or events of
    the wrong shape; `equinox.EquinoxRuntimeError` if a solve fails.
    """

    arg_constraints: dict = {}  # noqa: RUF012 (as numpyro has it)
    pytree_data_fields = ("_arrays", "context")
    pytree_aux_fields = ("_rest", "solve", "divergence")

    def __init__(
        self,
        flow: Flow,
        context: Float[Array, "*batch context"] | None = None,
        solve: Solve = Solve(),  # noqa: B008 (frozen)
        divergence: Divergence = Exact(),  # noqa: B008 (frozen)
        *,
        validate_args: bool | None = None,
    ):
        check_settings(flow, context, solve, divergence)
        if flow.bijection.manifold is not None:
            raise ValueError(
                "the samplers of numpyro need a flow in R^dim; got one on a manifold: use "
                "jcnf.log_prob and jcnf.sample"
            )
        self._arrays, self._rest = eqx.partition(flow, eqx.is_array)
        self.context = None if context is None else jnp.asarray(context)
        self.solve, self.divergence = solve, divergence
        super().__init__(batch_shape(self.context), (flow.dim,), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """All vectors."""
        return constraints.real_vector

    @property
    def flow(self) -> Flow:
        """The flow."""
        return eqx.combine(self._arrays, self._rest)

    def sample(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()
    ) -> Float[Array, "*samples dim"]:
        """Draw samples (*sample_shape, *batch_shape, dim). Consumes `key`."""
        return draw_events(sample, self.flow, key, sample_shape, self.context, solve=self.solve)

    def log_prob(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, value: Float[ArrayLike, "*samples dim"]
    ) -> Float[Array, "*batch"]:
        """Return the log-density of each event in nats.

        The batch shape of the events broadcasts with `batch_shape`.
        """
        return log_prob_of_events(self.flow, value, self.context, self.solve, self.divergence)
