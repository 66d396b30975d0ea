"""Flow matching: the field learns the velocities of random paths, without an ODE solve."""

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from jcnf._checks import check_callable, check_key, check_number
from jcnf.flows import ODE, Composition, Fixed, Flow, check_batch, ode_of
from jcnf.objectives import couplings, paths, times
from jcnf.objectives.base import Loss
from jcnf.ode import Solve


def flow_matching(
    flow: Flow[ODE],
    x: Float[Array, "batch dim"],
    key: Key[Array, ""],
    *,
    context: Float[Array, "batch context"] | None = None,
    path: paths.Path = paths.linear,
    coupling: couplings.Coupling = couplings.independent,
    time: times.Times = times.data_biased,
    drop_context: float = 0.0,
) -> Loss:
    """Mean of |v(t, x_t, c) - dx_t/dt|^2, with x_t on a path from a base sample to the data x.

    Its minimizer carries the base to the data, as that of the likelihood does (Lipman et al. 2023,
    theorem 2; Albergo & Vanden-Eijnden 2023; Liu et al. 2023), so `log_prob` and `sample` work as
    for any flow. The loss is summed over coordinates; it is not in nats, and its minimum is unknown
    and positive.

    The flow may be a chain of an ODE and `jcnf.flows.Fixed` bijections, such as preprocessing. They
    carry x to the ODE, which is matched to the result; they are not trained.

    `path`, `coupling` and `time` are functions as described in the modules `paths`, `couplings` and
    `times` of `jcnf.objectives`. With `drop_context` = p > 0, each context is replaced by 0 with
    probability p, as guidance requires (`jcnf.fields.Guided`). `key` is consumed once. The only
    metric is "matching", the loss.

    **Raises:** `ValueError` for bad shapes, if the path returns another shape than x has, and if
    `drop_context` is not in [0, 1) or there is no context to drop.
    """
    flow, x = _at_ode(flow, x, context, key)
    check_callable("a function such as those in jcnf.objectives.paths", path=path)
    check_callable("a function such as those in jcnf.objectives.couplings", coupling=coupling)
    check_callable("a function such as those in jcnf.objectives.times", time=time)
    check_number("[0, 1)", drop_context=drop_context)
    base_key, coupling_key, drop_key, key = jr.split(key, 4)
    x0 = flow.base.sample(base_key, len(x), x.dtype)
    partners = coupling(coupling_key, x0, x, context)
    if partners.shape != (len(x),) or not jnp.issubdtype(partners.dtype, jnp.integer):
        raise ValueError(
            f"coupling must return whole numbers of shape ({len(x)},); "
            f"got {partners.dtype} of shape {partners.shape}"
        )
    x0 = x0[partners]
    if drop_context:
        if context is None:
            raise ValueError(f"drop_context={drop_context} needs a context; got none: pass context")
        kept = jr.bernoulli(drop_key, 1 - drop_context, (len(x), 1))
        context = jnp.where(kept, context, 0)
    return _match(flow, x0, x, key, context, path, time)


def rectified(
    flow: Flow[ODE],
    pairs: tuple[Float[Array, "batch dim"], Float[Array, "batch dim"]],
    key: Key[Array, ""],
    *,
    context: Float[Array, "batch context"] | None = None,
    time: times.Times = times.data_biased,
) -> Loss:
    """Flow matching along straight lines between given `pairs` (x0, x1): reflow (Liu et al. 2023).

    If a trained flow maps each x0 to its x1 (`jcnf.evaluate.sample` returns such pairs), the new
    flow keeps these end points but has straighter paths, which a few Euler steps follow. `key` is
    consumed once. The only metric is "matching", the loss.

    `jcnf.fit` takes the pairs as `data` if `batch` is `jcnf.training.draw_rows(n)` and `validation`
    is not a share of the rows.

    **Raises:** `ValueError` for bad shapes.
    """
    if (
        not isinstance(pairs, tuple | list)
        or len(pairs) != 2
        or jnp.shape(pairs[0]) != jnp.shape(pairs[1])
    ):
        raise ValueError(
            "expected pairs (x0, x1) of the same shape: for jcnf.fit, data=(x0, x1) and "
            "batch=jcnf.training.draw_rows(n); with a context, batches ((x0, x1), context)"
        )
    x0, x1 = pairs
    for end in pairs:
        check_batch(flow, end, context)
    check_key(key)
    ode_of(flow, "rectified")
    return _match(flow, x0, x1, key, context, paths.linear, time)


def _at_ode(flow, x, context, key):
    """Return the flow of the ODE alone, and the batch that the fixed parts carry to it."""
    check_batch(flow, x, context)
    check_key(key)
    if isinstance(flow.bijection, ODE):
        return flow, x
    parts = flow.bijection.parts if isinstance(flow.bijection, Composition) else (flow.bijection,)
    first, outer = parts[0], parts[1:]
    if not isinstance(first, ODE) or not all(isinstance(part, Fixed) for part in outer):
        raise ValueError(
            "flow matching needs a flow whose bijection is an ODE, such as jcnf.CNF(field, base), "
            "or a jcnf.flows.Chain of an ODE and jcnf.flows.Fixed parts; got "
            f"{_shown(flow.bijection)}"
        )
    x, _ = Composition(outer).inverse(x, context, Solve())
    return Flow(first, flow.base), jax.lax.stop_gradient(x)


def _shown(bijection):
    parts = getattr(bijection, "parts", [bijection])
    return " and ".join(type(part).__name__ for part in parts)


def _match(flow, x0, x1, key, context, path, time):
    manifold = flow.bijection.manifold
    if manifold is not None and getattr(path, "manifold", None) != manifold:
        raise ValueError(
            f"path must be one on the manifold of the flow, {manifold}: pass "
            "path=jcnf.manifolds.Geodesic(manifold)"
        )
    time_key, noise_key = jr.split(key)
    # Rounding to the dtype of x must not make s equal to 1, where velocities may be infinite.
    s = jnp.minimum(time(time_key, len(x1)).astype(x1.dtype), 1 - jnp.finfo(x1.dtype).eps)
    z = jr.normal(noise_key, x1.shape, x1.dtype)
    x, u = jax.vmap(lambda *args: paths.velocity(path, *args))(s, x0, x1, z)
    if x.shape != x1.shape:
        raise ValueError(f"path must return points of shape {x1.shape}; got {x.shape}")
    # The field's time runs to t1: dx/dt = dx/ds / t1.
    field, t1 = flow.bijection.field, flow.bijection.t1
    v = jax.vmap(field)(t1 * s, x, context if field.context_dim else None)
    if v.shape != x.shape:
        raise ValueError(
            f"the field must give an array of shape {x.shape[1:]} for each sample; "
            f"got {v.shape[1:]}"
        )
    loss = jnp.mean(jnp.sum((v - u / t1) ** 2, axis=-1))
    return loss, {"matching": loss}
