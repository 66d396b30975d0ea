"""A flow on the sphere from a mixture of von Mises-Fisher distributions to the data.

Places on the earth are crowded at scales from a few kilometers to continents. A flow from the
uniform distribution has to resolve all of them, the small ones in the last moments of its time. So
the base here is a mixture that is fitted first, and a point of the data is paired with a sample of
the component that it belongs to. Then nothing travels farther than its component is wide.
"""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from experiments._tasks.sphere_models import SPHERE, Mixture
from jcnf import CNF, Flow
from jcnf.fields import Field
from jcnf.flows import ODE
from jcnf.manifolds import Geodesic, TangentField
from jcnf.objectives import paths, times


class LocalField(Field):
    """The velocity s(x) net(t, x, p(x) E), with the components' width s and probabilities p at x.

    The probabilities tell the network where it is, in finer detail than the coordinates.

    **Arguments:**

    - `net`: a field in R^3 with a context of the size `features`.
    - `base`: the mixture.
    - `features`: number of columns of the trained matrix E.
    - `key`: consumed once, for E.
    """

    net: Field
    base: Mixture
    embedding: Float[Array, "components features"]

    def __init__(self, net: Field, base: Mixture, features: int, *, key: Key[Array, ""]):
        self.net, self.base = net, base
        self.embedding = jr.normal(key, (len(base.means), features))

    @property
    def dim(self):
        return self.net.dim

    def __call__(self, t, x, context=None):
        shares, width = local(self.base, x)
        return width * self.net(t, x, shares @ self.embedding)


def local(base: Mixture, x: Float[Array, "3"]) -> tuple[Float[Array, " components"], Array]:
    """Return the probability of each component given x, and how wide the components are there."""
    shares = jax.nn.softmax(base.joint(x))
    return shares, jnp.sqrt(jnp.sum(shares / (1 + base.concentrations)))


def local_flow(field: LocalField) -> Flow:
    """Return the untrained flow on the sphere, which is its base."""
    return CNF(TangentField(field, SPHERE), field.base)


def local_matching(flow: Flow[ODE], x: Float[Array, "batch 3"], key: Key[Array, ""]):
    """Flow matching with base samples of each row's own component, in units of its width.

    Row x1 is paired with x0 of component i with probability p_i(x1). Then x0 has the density
    sum_i mean(p_i) f_i, which is the base at a fixed point of EM. A weight that depends on x_t
    alone does not change the minimizer. Consumes `key`.
    """
    base: Any = flow.base
    field = flow.bijection.field
    component_key, base_key, time_key = jr.split(key, 3)
    components = jr.categorical(component_key, jax.vmap(base.joint)(x))
    x0 = base.sample_components(components, base_key)
    t = times.stratified(time_key, len(x)).astype(x.dtype)
    at, u = jax.vmap(lambda t, x0, x1: paths.velocity(Geodesic(SPHERE), t, x0, x1, x1))(t, x0, x)
    width = jax.vmap(lambda x: local(base, x)[1])(at)
    error = jnp.sum((jax.vmap(field)(t, at) - u) ** 2, axis=1)
    loss = jnp.mean(error / width**2)
    return loss, {"matching": loss}
