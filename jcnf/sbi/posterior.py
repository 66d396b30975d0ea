"""Posteriors of the parameters of a simulator, learned from simulations."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import scipy.optimize
from jaxtyping import Array, Float, Key

from jcnf._checks import InputError, check_callable, check_int, check_key
from jcnf.flows import Affine, Columns, Flow, transform
from jcnf.ode import Solve
from jcnf.sbi.priors import Prior, as_prior
from jcnf.sbi.simulate import Simulations, Simulator, finite, run
from jcnf.sklearn import FlowDensity
from jcnf.sklearn._contexts import unembedded
from jcnf.sklearn.sides import cast, single

MAP_DRAWS, MAP_STARTS, MAP_ITERATIONS = 1000, 2, 200


def fit_posterior(
    prior: Any,
    simulations: Simulations | tuple[Any, Any],
    *,
    key: Key[Array, ""],
    embedding: Callable[[Key[Array, ""]], Callable[[Array], Array]] | None = None,
    steps: int | None = None,
    progress: bool = True,
) -> "Posterior":
    """Learn p(theta | x) from simulations by flow matching; it then holds for any x.

    ```python
    simulations = sbi.simulate(prior, simulator, 10_000, key=jr.key(0))
    posterior = sbi.fit_posterior(prior, simulations, key=jr.key(1))
    theta = posterior.sample(jr.key(2), 1000, x)  # (1000, dim)
    ```

    The method is flow matching posterior estimation (Wildberger et al. 2023), with the mixtures of
    `jcnf.sklearn.FlowDensity`: flows on transformed parameters, whose samples cannot leave the
    support of the prior.

    **Arguments:**

    - `prior`: anything that `jcnf.sbi.as_prior` takes; `simulations` must be drawn from it.
    - `simulations`: parameters (n, dim) and data (n, ...). Rows whose data are not finite are left
      out with a warning: the posterior is then that of a prior without such parameters.
    - `key`: consumed; it determines the weights, the noise, and the rows held out.
    - `embedding`: for long or set-valued data, a function of a key that returns an Equinox module
      from one x (...) to features (k,), which is trained with the flow; `jcnf.sbi.SetEmbedding` is
      one. See `jcnf.sklearn.FlowDensity`.
    - `steps`: the largest number of training steps; see `jcnf.sklearn.FlowDensity`.

    **Raises:** `ValueError` for shapes that do not fit, and for parameters outside the support.
    """
    prior = as_prior(prior)
    check_key(key)
    theta, x = (np.asarray(part, np.float64) for part in simulations)
    if theta.ndim != 2 or theta.shape[1] != prior.dim or len(x) != len(theta) or x.ndim == 0:
        raise InputError(
            f"expected parameters (n, {prior.dim}) and data (n, ...), as many of both; got shapes "
            f"{theta.shape} and {x.shape}"
        )
    outside = ~prior.contains(theta)
    if outside.any():
        raise InputError(
            f"{outside.sum()} of {len(theta)} parameters are outside the support of the prior "
            f"(first: {theta[outside][0]}): pass the prior from which they were drawn"
        )
    x = x.reshape(len(x), -1) if x.ndim == 1 else x
    theta, x = finite(Simulations(theta, x))
    density = FlowDensity(
        columns=dict(enumerate(prior.supports)),
        steps=steps,
        random_state=_seed(key),
        embedding=embedding,
        progress=progress,
    )
    return Posterior(prior, density.fit(theta, context=x))


class Posterior(NamedTuple):
    """The posterior p(theta | x), for any data x. `fit_posterior` makes it."""

    prior: Prior
    density: FlowDensity  # of parameters given data; `density.history_` is that of the training

    @property
    def x_shape(self) -> tuple[int, ...]:
        """The shape of one x."""
        return self.density.context_shape_

    def sample(self, key: Key[Array, ""], n: int, x: Any) -> Float[np.ndarray, "*m n dim"]:
        """Draw `n` parameters given data x (...), or for each of m data x (m, ...).

        Every sample is strictly inside the support of the prior. Consumes `key`.
        """
        check_int(n=n)
        rows, is_one = self._rows(x)
        given = np.repeat(rows, n, axis=0)
        drawn = self.density.sample(len(given), context=given, random_state=_seed(key))
        drawn = np.asarray(drawn).reshape(len(rows), n, self.prior.dim)
        return drawn[0] if is_one else drawn

    def log_prob(self, theta: Any, x: Any) -> Float[np.ndarray, " n"]:
        """Return log p(theta | x) in nats for parameters (n, dim), given x (...) or n data x.

        It is -inf outside the support of the prior, and NaN where the solve failed.
        """
        theta = np.asarray(theta, np.float64)
        if theta.ndim != 2 or theta.shape[1] != self.prior.dim:
            raise InputError(
                f"expected parameters (n, {self.prior.dim}); got an array of shape {theta.shape}"
            )
        rows, is_one = self._rows(x)
        if is_one:
            rows = np.repeat(rows, len(theta), axis=0)
        inside = self.prior.contains(theta)
        found = np.full(len(theta), -np.inf)
        if inside.any():
            found[inside] = self.density.score_samples(theta[inside], context=rows[inside])
        return found

    def log_density(self, x: Any) -> Callable[[Float[Array, "n dim"]], Float[Array, " n"]]:
        """Return log p(theta | x) for one x (...) as a function of theta that JAX transforms.

        It takes parameters (n, dim) inside the support and returns nats (n,), in float32. Use it
        for gradients, as a potential for MCMC, or inside another model. Make it outside of compiled
        functions.
        """
        model = _LogDensity(self.density, self._row(x))

        def log_density(theta: Float[Array, "n dim"]) -> Float[Array, " n"]:
            return model(theta)

        return log_density

    def map(self, key: Key[Array, ""], x: Any) -> Float[np.ndarray, " dim"]:
        """Return the parameters of greatest posterior density given x (...), the MAP estimate.

        The best of 1,000 samples are improved by L-BFGS, in coordinates in which the support of the
        prior is the whole space, so that the result is inside it. Consumes `key`.
        """
        draws = self.sample(key, MAP_DRAWS, x)
        # Forward mode: with so few parameters it costs little, and it compiles in less time.
        log_density = _LogDensity(self.density, self._row(x), adjoint="forward")
        to_base = eqx.filter_jit(log_density.to_base)
        to_data = eqx.filter_jit(log_density.to_data)
        order = np.argsort(-np.asarray(eqx.filter_jit(log_density)(single(draws))))

        def loss(z):
            value = -log_density(log_density.to_data(z[None]))[0]
            return value, value

        derivative = jax.jit(jax.jacfwd(loss, has_aux=True))

        def objective(z):
            gradient, value = derivative(single(z))
            return float(value), np.asarray(gradient, np.float64)

        ends = [
            scipy.optimize.minimize(
                objective,
                np.asarray(to_base(single(draws[i][None]))[0], np.float64),
                jac=True,
                method="L-BFGS-B",
                options={"maxiter": MAP_ITERATIONS},
            )
            for i in order[:MAP_STARTS]
        ]
        best = min(ends, key=lambda end: end.fun)
        found = np.asarray(to_data(single(best.x[None]))[0], np.float64)
        supports = zip(self.prior.supports, found, strict=True)
        return np.array([support.finish(value[None])[0] for support, value in supports])

    def predictive(self, key: Key[Array, ""], n: int, x: Any, simulator: Simulator) -> Simulations:
        """Draw `n` parameters given x (...), and run the simulator for them.

        Data that are like x speak for the posterior. Consumes `key`.
        """
        check_callable("a function (key, theta) -> x", simulator=simulator)
        sample_key, key = jr.split(key)
        return run(simulator, self.sample(sample_key, n, x), key=key, progress=False)

    def importance(
        self,
        key: Key[Array, ""],
        n: int,
        x: Any,
        log_likelihood: Callable[[Float[np.ndarray, "n dim"]], Any],
    ) -> "WeightedSamples":
        """Draw `n` parameters given x (...), with importance weights by a known likelihood.

        `log_likelihood(theta)` is log p(x | theta) in nats, (n,), for parameters (n, dim). The
        weights are prior times likelihood over the learned posterior; they correct its errors and
        give the evidence. If the learned density is much too small somewhere, as at the bound of a
        support, a few weights are very large, and standard errors are too small. Consumes `key`.
        """
        check_callable("a function theta -> log p(x | theta)", log_likelihood=log_likelihood)
        theta = self.sample(key, n, x)
        found = np.asarray(log_likelihood(theta), np.float64)
        if found.shape != (n,):
            raise InputError(f"expected log-likelihoods of shape ({n},); got {found.shape}")
        log_weights = self.prior.log_prob(theta) + found - self.log_prob(theta, x)
        log_weights = np.where(np.isnan(log_weights), -np.inf, log_weights)
        return WeightedSamples(theta, log_weights)

    def save(self, path: str | Path) -> None:
        """Save what was learned to a file; `load` reads it, and needs the prior again."""
        self.density.save(path)

    @classmethod
    def load(cls, path: str | Path, prior: Any, *, embedding: Any = None) -> "Posterior":
        """Return a posterior that `save` wrote, of the same prior and embedding.

        **Raises:** `ValueError` if the file is not of such a posterior.
        """
        prior = as_prior(prior)
        density = FlowDensity.load(path, embedding=embedding)
        if [s.bounds for s in density.columns_] != [s.bounds for s in prior.supports]:
            raise InputError(f"{path} has other parameters or supports than the prior")
        return cls(prior, density)

    def _row(self, x):
        rows, is_one = self._rows(x)
        if not is_one:
            raise InputError(f"expected one x of shape {self.x_shape}; got {np.shape(x)}")
        return rows

    def _rows(self, x) -> tuple[Float[np.ndarray, "m ..."], bool]:
        """Return data as the density takes them, and whether they were of one x."""
        x = np.asarray(x, np.float64)
        is_one = x.shape == self.x_shape or (x.ndim == 0 and self.x_shape == (1,))
        if is_one or (x.shape[1:] == self.x_shape and len(x)):
            return x.reshape(-1, *self.x_shape), is_one
        raise InputError(f"expected x of shape {self.x_shape} or (m, ...); got {x.shape}")


class _LogDensity(eqx.Module):
    """log p(theta | x) for one x, as a function of theta that JAX transforms."""

    groups: list[tuple[Flow, Array]]  # components of one structure, stacked, and log-weights
    outer: tuple[Affine, Columns]
    context: Float[Array, "1 context"]
    solve: Solve

    def __init__(
        self, density: FlowDensity, rows: Float[np.ndarray, "1 ..."], adjoint: str | None = None
    ):
        mixture = density.mixture_
        self.solve = mixture.solve
        if adjoint is not None:
            self.solve = dataclasses.replace(self.solve, adjoint=adjoint)
        self.context = single(density.transformed_context(rows))
        with jax.enable_x64(True):
            self.outer = tuple(cast(part, jnp.float32) for part in density.outer_)
        alike: dict[Any, list] = {}
        for flow, weight in zip(mixture.flows, mixture.weights, strict=True):
            arrays, static = eqx.partition(flow, eqx.is_array)
            alike.setdefault(jax.tree.structure(flow), []).append((arrays, static, np.log(weight)))
        self.groups = [
            (
                eqx.combine(
                    jax.tree.map(lambda *a: jnp.stack(a), *[m[0] for m in group]), group[0][1]
                ),
                single([m[2] for m in group]),
            )
            for group in alike.values()
        ]

    def __call__(self, theta: Float[Array, "n dim"]) -> Float[Array, " n"]:
        y, logdet = self._open(theta)
        given = jnp.broadcast_to(self.context, (len(y), self.context.shape[1]))
        found = []
        for flows, log_weights in self.groups:
            arrays, static = eqx.partition(flows, eqx.is_array)

            def one(member, static=static):
                flow, context = unembedded(eqx.combine(member[0], static), given)
                end = transform(flow, y, context=context, solve=self.solve)
                return flow.base.log_prob(end.value) + end.logdet + member[1]

            found.append(jax.lax.map(one, (arrays, log_weights)))
        return jax.nn.logsumexp(jnp.concatenate(found), axis=0) + logdet

    def to_base(self, theta: Float[Array, "n dim"]) -> Float[Array, "n dim"]:
        """Return parameters in coordinates in which their support is the whole space."""
        return self._open(theta)[0]

    def to_data(self, z: Float[Array, "n dim"]) -> Float[Array, "n dim"]:
        """Return the parameters that `to_base` carries to these coordinates."""
        for part in self.outer:
            z = part.both(z, "to_data", self._given(part, z))[0]
        return z

    def _open(self, value):
        total = 0.0
        for part in self.outer[::-1]:
            value, logdet = part.both(value, "to_base", self._given(part, value))
            total = total + logdet
        return value, total

    def _given(self, part, rows):
        size = self.context.shape[1]
        return jnp.broadcast_to(self.context, (len(rows), size)) if part.context_dim else None


class WeightedSamples(NamedTuple):
    """Parameters with importance weights."""

    theta: Float[np.ndarray, "n dim"]
    log_weights: Float[
        np.ndarray, " n"
    ]  # log of prior times likelihood over the density drawn from

    @property
    def log_evidence(self) -> float:
        """The estimate of log p(x) in nats."""
        return float(np.logaddexp.reduce(self.log_weights) - np.log(len(self.log_weights)))

    @property
    def log_evidence_stderr(self) -> float:
        """The standard error of `log_evidence`, by the delta method."""
        relative = np.exp(self.log_weights - self.log_evidence)
        return float(np.std(relative, ddof=1) / np.sqrt(len(relative)))

    @property
    def effective_size(self) -> float:
        """The number of equally weighted samples that would be as good, by Kish's formula."""
        weights = np.exp(self.log_weights - self.log_weights.max())
        return float(weights.sum() ** 2 / np.sum(weights**2))

    def resample(self, key: Key[Array, ""], n: int) -> Float[np.ndarray, "n dim"]:
        """Draw `n` of the parameters, with replacement, by their weights."""
        check_int(n=n)
        check_key(key)
        picked = jr.categorical(key, single(self.log_weights), shape=(n,))
        return self.theta[np.asarray(picked)]


def _seed(key) -> int:
    check_key(key)
    return int(jr.randint(key, (), 0, 2**31 - 1))
