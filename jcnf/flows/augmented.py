"""Augmented flows: the flow has more dimensions than the data (Huang, Dinh & Courville 2020).

The flow models (x, e), where e ~ N(0, I) fills the extra dimensions; it is any CNF whose field and
base have `dim + extra` dimensions. Paths that would meet in `dim` dimensions can pass each other in
the extra ones (ANODE, Dupont et al. 2019), and the model still has a density. Train it with
`jcnf.objectives.likelihood` on batches from `augment`: on average this log-likelihood is a lower
bound on log p(x) minus the entropy of e, which is constant. Draw samples with
`jcnf.sample(...)[:, :dim]`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from jcnf._checks import check_int, check_key
from jcnf.divergence import Divergence, Exact
from jcnf.flows.base import Flow, check_batch, check_flow, check_strategy, error_if_failed
from jcnf.flows.functional import solve_log_prob
from jcnf.ode import Solve, Stats, with_array_tolerances


def augment(
    x: Float[Array, "batch dim"], key: Key[Array, ""], extra: int
) -> Float[Array, "batch dim_and_extra"]:
    """Append `extra` standard normal dimensions to `x`; consumes `key`.

    **Raises:** `ValueError` if `extra` is negative or `x` is not of shape (batch, dim).
    """
    check_int(0, extra=extra)
    check_key(key)
    _check_rank(x)
    return jnp.concatenate([x, jr.normal(key, (x.shape[0], extra), x.dtype)], axis=1)


def log_prob_bound(
    flow: Flow,
    x: Float[Array, "batch dim"],
    key: Key[Array, ""],
    *,
    samples: int = 1,
    context: Float[Array, "batch context"] | None = None,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
    divergence: Divergence = Exact(),  # noqa: B008 (frozen)
) -> Float[Array, " batch"]:
    """Return log mean_k p(x, e_k) / N(e_k; 0, I), whose expectation is a lower bound on log p(x).

    The result has shape (batch,) and is in nats. It rises toward log p(x) with the number of
    `samples` (Burda et al. 2016), which are solved one after another. `key` is consumed once, for e
    and for a stochastic divergence.

    **Raises:** the errors of `jcnf.log_prob`, and `ValueError` if the flow has fewer dimensions
    than `x`.
    """
    check_key(key)
    check_int(samples=samples)
    check_strategy(solve, divergence)
    _check_rank(x)
    x = jnp.asarray(x)
    e_key, noise_key = jr.split(key)
    bound, stats = _compiled_bound(
        flow,
        x,
        jr.split(e_key, x.shape[0]),
        noise_key,
        samples=int(samples),
        context=context,
        solve=with_array_tolerances(solve, x.dtype),
        divergence=divergence,
    )
    return error_if_failed(bound, stats.failed)


def solve_bound(
    flow: Flow,
    x: Float[Array, "batch dim"],
    keys: Key[Array, " batch"],
    noise_key: Key[Array, ""] | None = None,
    *,
    samples: int,
    context: Float[Array, "batch context"] | None = None,
    solve: Solve,
    divergence: Divergence = Exact(),  # noqa: B008 (frozen)
) -> tuple[Float[Array, " batch"], Stats]:
    """Compute `log_prob_bound` with one key per row of `x`, and the solver's statistics.

    These are means over the samples (`jcnf.ode.Stats.over_draws`).
    """
    check_flow(flow)
    check_int(samples=samples)
    extra = flow.dim - x.shape[1]
    if extra < 0:
        raise ValueError(
            f"expected x of at most {flow.dim} dimensions, as many as the flow has; "
            f"got {x.shape[1]}"
        )

    def log_weight(number):
        e = jax.vmap(lambda key: jr.normal(jr.fold_in(key, number), (extra,), x.dtype))(keys)
        joint = jnp.concatenate([x, e], axis=1)
        check_batch(flow, joint, context)
        noise_of = None if noise_key is None else jr.fold_in(noise_key, number)
        strategy, noise = flow.with_noise(divergence, noise_of, joint)
        log_prob, stats = solve_log_prob(flow, strategy, solve, joint, context, noise)
        return log_prob - jnp.sum(jax.scipy.stats.norm.logpdf(e), axis=1), stats

    weights, each = jax.lax.map(log_weight, jnp.arange(samples))
    bound = jax.nn.logsumexp(weights, axis=0) - jnp.log(jnp.asarray(samples, x.dtype))
    return bound, each.over_draws()


_compiled_bound = eqx.filter_jit(solve_bound)


def _check_rank(x):
    if jnp.ndim(x) != 2:
        raise ValueError(f"expected x of shape (batch, dim); got {jnp.shape(x)}")
