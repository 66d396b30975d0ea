"""Train flows on a table, and mix the states that they pass through.

With few rows, long training ends by memorizing them. Where rows nearly repeat one another, as in a
designed experiment, a density that has memorized them is the better one; elsewhere it is the worse.
So training keeps a snapshot whenever the number of steps has doubled. The density is a mixture of
these snapshots, with the weights that maximize the likelihood of held-out rows. Further components
are mixtures of 2 to 16 normal distributions, which are hard to beat on tables of some hundred rows,
and a wide normal distribution for outliers.

Circular columns are angles in radians. The flows are then on the product of a Euclidean space and
circles, where their base is uniform, and normal distributions of an angle are wrapped, so that no
density has a seam.

With 5,000 rows or more, a context goes through a residual network, the encoder, and only
its features enter the flow. Flows with a context overfit early, because few rows have similar
contexts, so they are small and trained with weight decay.

A small table is split into five folds. For each fold, a flow trains on the other rows and is scored
on that fold, so that every row is held out once. The mixture then covers the flows of all folds.
"""

import itertools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Key
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from jcnf import evaluate
from jcnf.distributions import BaseDistribution, FullNormal, StandardNormal
from jcnf.fields import Embedded, Field, GaussianTails, ResNet
from jcnf.fields.wrappers import embedded_size
from jcnf.flows import CNF, Affine, Flow
from jcnf.manifolds import (
    Euclidean,
    Geodesic,
    Independent,
    Manifold,
    Product,
    TangentField,
    Torus,
    Uniform,
    WrappedNormal,
)
from jcnf.objectives import flow_matching, paths
from jcnf.ode import Solve
from jcnf.sklearn._contexts import Embedding, Encoder, unembedded
from jcnf.training import Progress, fit

FEW_ROWS, MANY_ROWS = 5000, 20_000
FOLDS = 5
HELD_OUT, MAX_HELD_OUT = 0.1, 2000
FIRST_SNAPSHOT = 100
MIN_GAIN = 0.02  # nats a row that three doublings of the steps must gain, or training ends
MIN_WEIGHT = 0.05  # of the components that are kept
WIDE = 3.0  # standard deviation of the component for outliers
NORMALS, ROWS_PER_NORMAL = (2, 4, 8, 16), 10  # of the Gaussian mixtures
MIN_VARIANCE, MAX_ROWS = 1e-2, 5000  # of the Gaussian mixtures: added variance, and rows they fit
LEARNING_RATE, CLIP = 2e-3, 10.0
EM_STEPS = 500
HELD_OUT_SOLVE = Solve(rtol=1e-4, atol=1e-4, norm="worst")
MIN_STEPS, MAX_STEPS = 8, 512
MAX_ERROR = 1e-3  # nats, root mean square over rows that were held out
STEP_ROWS = 500  # the number of these rows
TIME_FREQUENCIES = 8
MAX_CHUNK = 8192  # rows that are solved together
CONTEXT_DECAYS = (0.0, 0.1, 0.3, 1.0)  # small ones for smooth posteriors, large for long contexts


class Plan(NamedTuple):
    """The network and its training."""

    width: int
    blocks: int
    steps: int
    batch: int
    weight_decays: tuple[float, ...]  # one training for each
    folds: int  # 1 to hold out a part of the rows once
    circular: tuple[bool, ...] = ()  # which columns are angles; empty if none is
    encoder_layers: int = 0  # of the network before the context; 0 to pass it on as it is

    @classmethod
    def of(
        cls,
        rows: int,
        steps: int | None,
        circular: tuple[bool, ...] = (),
        with_context: bool = False,
    ) -> "Plan":
        """Return the plan for a number of rows, with other `steps` if given."""
        if rows < FEW_ROWS:
            return cls(128, 2, steps or 10_000, 256, (0.1, 3.0), FOLDS, circular)
        if with_context and rows < MANY_ROWS:
            return cls(128, 2, steps or 10_000, 256, CONTEXT_DECAYS, 1, circular, 2)
        if with_context:
            return cls(192, 3, steps or 12_000, 512, (0.3,), 1, circular, 3)
        return cls(192, 3, steps or 20_000, 512, (0.0,), 1, circular)

    @property
    def manifold(self) -> Manifold | None:
        """The product of lines and circles that rows are on; None for R^dim."""
        if not any(self.circular):
            return None
        return Product([Torus(n) if circle else Euclidean(n) for circle, n in _runs(self.circular)])


class Mixture(NamedTuple):
    """A mixture of flows: the density sum_i weights[i] p_i.

    It is computed in `steps` equal time steps, so that a row does not depend on the others in its
    batch; with 0, in steps that hold the error of all rows.
    """

    flows: tuple[Flow, ...]
    weights: np.ndarray
    steps: int = 0

    def log_prob(self, z: Array, context: Array | None) -> Float[np.ndarray, " n"]:
        """Return the log-density of each row in nats; NaN if the solve failed for all flows."""
        found = np.stack([log_prob_of(flow, z, context, self.solve) for flow in self.flows], axis=1)
        return log_mean(found, self.weights)

    @property
    def solve(self) -> Solve:
        """The settings of the solves that give log-densities."""
        if not self.steps:
            return HELD_OUT_SOLVE
        return Solve(step=jnp.asarray(1 / self.steps, jnp.float32))  # an array: not compiled in

    def with_equal_steps(self, z: Array, context: Array | None) -> "Mixture":
        """Return the mixture with enough steps for rows like these.

        The number of steps is doubled until doubling it again changes their log-densities by less
        than `MAX_ERROR` (root mean square), up to `MAX_STEPS`.
        """
        if all(isinstance(flow.bijection, Affine) for flow in self.flows):
            return self
        mixture = self._replace(steps=MIN_STEPS)
        before = mixture.log_prob(z, context)
        while mixture.steps < MAX_STEPS:
            finer = mixture._replace(steps=2 * mixture.steps)
            after = finer.log_prob(z, context)
            if np.sqrt(np.nanmean((after - before) ** 2)) < MAX_ERROR:
                break
            mixture, before = finer, after
        else:
            warnings.warn(
                f"log-densities still change by more than {MAX_ERROR:g} nats beyond {MAX_STEPS} "
                "steps: the scores of this density are rough",
                stacklevel=2,
            )
        return mixture

    @classmethod
    def of(cls, flow: Flow) -> "Mixture":
        """Return the mixture of one flow."""
        return cls((flow,), np.ones(1))

    @classmethod
    def of_normals(
        cls, count: int, z: Float[np.ndarray, "n dim"], circular: tuple[bool, ...] = ()
    ) -> "Mixture":
        """Return the mixture of normal distributions that scikit-learn fits to whitened rows.

        Their covariances are diagonal, so that few rows determine them.
        """
        model: Any = GaussianMixture(
            count, covariance_type="diag", reg_covar=MIN_VARIANCE, random_state=0
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(z)
        pairs = zip(model.means_, model.covariances_, strict=True)
        return cls(tuple(_normal(m, v**0.5, circular) for m, v in pairs), model.weights_)


def log_prob_of(flow: Flow, z: Array, context: Array | None, solve: Solve) -> np.ndarray:
    """Return the log-density of each row by one flow, NaN where the solve failed."""
    # Numbers of rows that are powers of two, so that calls share compiled programs, and multiples
    # of 64, which compilers compute row by row in the same way.
    size = min(max(64, 2 ** (len(z) - 1).bit_length()), MAX_CHUNK)
    padding = [(0, -len(z) % size), (0, 0)]
    given = None if context is None else jnp.pad(context, padding, mode="edge")
    flow, given = unembedded(flow, given)
    padded = jnp.pad(z, padding, mode="edge")
    found = evaluate.log_prob(flow, padded, context=given, solve=solve, chunk=size)
    return found.log_prob[: len(z)]


def log_mean(log_probs: Float[np.ndarray, "n k"], weights: Float[np.ndarray, " k"]) -> np.ndarray:
    """Return log sum_i weights[i] exp(log_probs[:, i]), without the components that are NaN."""
    known = np.where(np.isnan(log_probs), -np.inf, log_probs)
    total = np.logaddexp.reduce(known + np.log(weights), axis=1)
    return np.where(np.isnan(log_probs).all(axis=1), np.nan, total)


def best_weights(log_probs: Float[np.ndarray, "n k"]) -> Float[np.ndarray, " k"]:
    """Return the mixture weights with the greatest likelihood, by expectation maximization.

    Components of small weight get none.
    """
    log_probs = np.where(np.isnan(log_probs), -np.inf, log_probs)
    kept = np.arange(log_probs.shape[1])
    while True:
        weights = _maximize(log_probs[:, kept])
        if (weights >= MIN_WEIGHT).all():
            break
        kept = np.delete(kept, np.argmin(weights))
    full = np.zeros(log_probs.shape[1])
    full[kept] = weights
    return full


def _maximize(log_probs):
    weights = np.full(log_probs.shape[1], 1 / log_probs.shape[1])
    for _ in range(EM_STEPS):
        joint = log_probs + np.log(weights)
        # A row that no component can explain says nothing about the weights.
        joint = joint[np.isfinite(joint.max(axis=1))]
        shares = np.exp(joint - np.logaddexp.reduce(joint, axis=1)[:, None])
        weights = np.maximum(shares.mean(axis=0), 1e-12)
    return weights / weights.sum()


class Trained(NamedTuple):
    """What `train` returns."""

    mixture: Mixture
    held_out_nll: float  # nats a row
    history: list[dict[str, float]]  # "step", "seconds", "loss", and sometimes "held_out_nll"


def train(
    z: Float[np.ndarray, "n dim"],
    context: Float[np.ndarray, "n context"] | None,
    plan: Plan,
    key: Key[Array, ""],
    tell: Callable[[int, str], None],
    embedding: Embedding | None = None,
) -> Trained:
    """Train on whitened rows.

    The flows of all folds and weight decays train side by side, as one model with a leading axis
    and one compiled program. `tell(steps, words)` is called as training proceeds. `embedding(key)`
    makes the network that the context goes through, in place of the plan's. Consumes `key`.
    """
    order_key, field_key, fit_key = jr.split(key, 3)
    n, dim = z.shape
    # Equal parts, so that all have one shape: some rows may be held out twice.
    size = -(-n // plan.folds) if plan.folds > 1 else max(1, round(HELD_OUT * n))
    order = np.asarray(jr.permutation(order_key, n))
    parts = [np.take(order, np.arange(size) + i * size, mode="wrap") for i in range(plan.folds)]
    rest = np.stack([order[~np.isin(order, part)] for part in parts])
    rows = [jnp.asarray(table, float) for table in (z, context) if table is not None]
    held_out = [[table[part[:MAX_HELD_OUT]] for table in rows] for part in parts]
    decays = np.tile(plan.weight_decays, plan.folds)  # of the flows, those of one fold together
    context_dim = 0 if context is None else context.shape[1]

    @eqx.filter_vmap
    def untrained(key):
        return _untrained(dim, context_dim, plan, key, embedding)

    def draw(key, data):
        rest, *tables = data
        picked = jr.randint(key, (len(decays), plan.batch), 0, rest.shape[1])
        index = jnp.take_along_axis(jnp.repeat(rest, len(plan.weight_decays), axis=0), picked, 1)
        return [table[index] for table in tables]

    manifold = plan.manifold
    path = paths.trigonometric if manifold is None else Geodesic(manifold)

    @eqx.filter_vmap
    def matching(flow, key, x, *given):
        context = given[0] if given else None
        return flow_matching(flow, x, key, context=context, path=path)[0]

    def objective(flows, batch, key):
        return jnp.sum(matching(flows, jr.split(key, len(decays)), *batch)), {}

    snapshots = _Snapshots(plan, [z[index[:MAX_ROWS]] for index in rest], held_out, tell)
    result = fit(
        untrained(jr.split(field_key, len(decays))),
        (jnp.asarray(rest), *rows),
        key=fit_key,
        objective=objective,
        steps=plan.steps,
        batch=draw,
        optimizer=_optimizer(plan.steps, decays),
        validation=None,
        every=snapshots.every,
        callbacks=[snapshots],
        progress=False,
    )
    history = [
        {**record, "loss": record["loss"] / len(decays)} | snapshots.told.get(record["step"], {})
        for record in result.history
    ]
    return Trained(*snapshots.mix(), history)


def _optimizer(steps, decays):
    """Return AdamW with a weight decay for each place of the leading axis."""

    def decay(updates, state, params=None):
        def one(update, param):
            return update + decays.reshape(-1, *[1] * (param.ndim - 1)).astype(param.dtype) * param

        return jax.tree.map(one, updates, params), state

    rate = optax.schedules.warmup_cosine_decay_schedule(
        0.0, LEARNING_RATE, min(200, steps // 10), max(steps, 2)
    )
    return optax.chain(
        optax.clip_by_global_norm(CLIP * len(decays) ** 0.5),
        optax.scale_by_adam(),
        optax.GradientTransformation(lambda params: optax.EmptyState(), decay),
        optax.scale_by_learning_rate(rate),
    )


class _Snapshots:
    """A callback of the training that scores its states on the rows held out, and keeps them."""

    def __init__(self, plan, trained_on, held_out, tell):
        dim = trained_on[0].shape[1]
        self.plan, self.held_out, self.tell = plan, held_out, tell
        self.every = min(FIRST_SNAPSHOT, plan.steps)
        self.kept: list[tuple[Mixture, ...]] = []  # of each component, for all folds or for each
        self.scores: list[np.ndarray] = []  # of each component, for the rows held out
        self._keep(Mixture.of(_normal(np.zeros(dim), np.full(dim, WIDE), plan.circular)))
        # Not N(0, I): it would know the rows held out, by which the table is whitened.
        for count in NORMALS:
            if count * ROWS_PER_NORMAL <= len(trained_on[0]):
                self._keep(*(Mixture.of_normals(count, z, plan.circular) for z in trained_on))
        self.gains, self.before = [self._mixed()], 0
        self.told: dict[float, dict[str, float]] = {}  # held-out NLLs, by step

    def __call__(self, place: Progress) -> bool:
        self.tell(place.step - self.before, f"held-out NLL {-self.gains[-1]:.3f} (whitened)")
        self.before = place.step
        doubled = (place.step // self.every).bit_count() == 1
        if not (doubled or place.step == self.plan.steps):
            return False
        for decay in range(len(self.plan.weight_decays)):
            places = range(decay, self.plan.folds * len(self.plan.weight_decays))
            picked = places[:: len(self.plan.weight_decays)]
            self._keep(*(Mixture.of(_member(place.flow, i)) for i in picked))
        self.gains.append(self._mixed())
        self.told[place.step] = {"held_out_nll": -self.gains[-1]}
        return len(self.gains) > 4 and self.gains[-1] < self.gains[-4] + MIN_GAIN

    def mix(self) -> tuple[Mixture, float]:
        """Return the mixture with the best weights, and its held-out NLL in nats."""
        held_out = np.stack(self.scores, axis=1)
        weights = best_weights(held_out)
        used = weights > 0
        nll = -float(np.mean(log_mean(held_out[:, used], weights[used])))
        shares = [
            (mixture, weight / len(kept))
            for kept, weight in zip(self.kept, weights, strict=True)
            if weight > 0
            for mixture in kept
        ]
        flows = tuple(flow for mixture, _ in shares for flow in mixture.flows)
        weights = np.concatenate([share * m.weights for m, share in shares])
        z, *given = (
            jnp.concatenate(tables)[:STEP_ROWS] for tables in zip(*self.held_out, strict=True)
        )
        mixture = Mixture(flows, weights).with_equal_steps(z, given[0] if given else None)
        return mixture, nll

    def _keep(self, *mixtures):
        """Keep a component: one mixture for all folds, or one for each, scored on its rows."""
        found = []
        for mixture, (z, *given) in zip(itertools.cycle(mixtures), self.held_out, strict=False):
            found.append(mixture.log_prob(z, given[0] if given else None))
        self.kept.append(mixtures)
        self.scores.append(np.concatenate(found))

    def _mixed(self):
        """Return the mean log-density of the held-out rows by the best mixture so far."""
        held_out = np.stack(self.scores, axis=1)
        return float(np.mean(log_mean(held_out, _maximize(held_out))))


def _member(flows, place):
    return jax.tree.map(lambda leaf: leaf[place] if eqx.is_array(leaf) else leaf, flows)


def _untrained(dim, context_dim, plan, key, embedding=None):
    """Return the flow that starts as its base, and stays about that far from the data."""
    manifold = plan.manifold
    size = dim if manifold is None else manifold.embedding_dim
    if embedding is None and plan.encoder_layers and context_dim:
        embedding = partial(Encoder, context_dim, plan.width, plan.encoder_layers)
    network, features = None, context_dim
    if embedding is not None:
        network = embedding(jr.fold_in(key, 1))
        features = embedded_size(network, context_dim)
    net: Field = ResNet(
        size,
        plan.width,
        plan.blocks,
        time_frequencies=TIME_FREQUENCIES,
        context_dim=features,
        key=key,
    )
    if network is not None:
        net = Embedded(net, network, context_dim)
    reference = FullNormal(np.zeros(size), np.eye(size))
    if manifold is None:
        return CNF(GaussianTails(net, reference, paths.trigonometric), StandardNormal(dim))
    # Its part along cosines and sines, which are of length 1, is not tangent to the circle.
    field = GaussianTails(net, reference, paths.linear)
    parts = [
        Uniform(Torus(n)) if circle else StandardNormal(n) for circle, n in _runs(plan.circular)
    ]
    return CNF(TangentField(field, manifold), Independent(parts))


def _normal(mean, std, circular=()):
    """Return the flow of independent normal distributions, those of angles wrapped."""
    if not any(circular):
        return Flow(Affine(mean, np.diag(std)), StandardNormal(len(mean)))
    scaled = Affine(np.where(circular, 0, mean), np.diag(np.where(circular, 1, std)))
    parts, start = [], 0
    for circle, n in _runs(circular):
        own = slice(start, start := start + n)
        parts.append(WrappedNormal(mean[own], std[own]) if circle else StandardNormal(n))
    return Flow(scaled, Independent(parts))


def _runs(circular: tuple[bool, ...]) -> list[tuple[bool, int]]:
    """Return the runs of columns of one kind, each with its length."""
    return [(circle, len(list(run))) for circle, run in itertools.groupby(circular)]


def from_scores(base: BaseDistribution, z: Array) -> Array:
    """Return samples of the base of a component from those of N(0, I), (n, dim)."""
    if isinstance(base, Independent):
        ends = np.cumsum([part.dim for part in base.parts])
        shares = jnp.split(z, ends[:-1], axis=1)
        parts = zip(base.parts, shares, strict=True)
        return jnp.concatenate([from_scores(part, share) for part, share in parts], axis=1)
    if isinstance(base, WrappedNormal):
        return base.manifold.project(base.loc[None] + base.scale[None] * z)
    if isinstance(base, Uniform):
        return 2 * np.pi * jax.scipy.special.ndtr(z) - np.pi
    return z


def skeleton(
    dim: int, context_dim: int, plan: Plan, normal: bool, embedding: Embedding | None = None
) -> Flow:
    """Return a flow of the structure of a component, to be filled with saved arrays."""
    if normal:
        return _normal(np.zeros(dim), np.ones(dim), plan.circular)
    return _untrained(dim, context_dim, plan, jr.key(0), embedding)
