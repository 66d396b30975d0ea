"""Train flows on a table, and mix the states that they pass through.

Flow matching on few rows ends by learning the rows themselves. Where rows repeat one another up to
noise, as those of a designed experiment do, that is the better density, and elsewhere the worse
one. So a snapshot is kept whenever the number of steps has doubled, and the density is a mixture of
snapshots, with the weights that are best for rows which were held out. Two more components are the
normal distribution that training starts from, and a wider one for outliers.

With few rows every row is held out once: each fold is the validation of a flow of its own, and the
mixture is over the flows too.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from jcnf import evaluate
from jcnf.distributions import FullNormal, StandardNormal
from jcnf.fields import Preconditioned, ResNet
from jcnf.flows import CNF, Affine, Flow
from jcnf.objectives import flow_matching, paths
from jcnf.ode import Solve
from jcnf.training import Progress, fit, make_optimizer

FEW_ROWS = 5000
FOLDS = 5
HELD_OUT, MAX_HELD_OUT = 0.1, 2000
FIRST_SNAPSHOT = 100
MIN_GAIN = 0.02  # nats a row that three doublings of the steps must gain, or training ends
MIN_WEIGHT = 0.05  # of the components that are kept
WIDE = 3.0  # standard deviation of the component for outliers
LEARNING_RATE, BATCH, CLIP = 2e-3, 512, 10.0
EM_STEPS = 500
HELD_OUT_SOLVE = Solve(rtol=1e-4, atol=1e-4, norm="worst")
TIME_FREQUENCIES = 8


class Plan(NamedTuple):
    """The network and its training."""

    width: int
    blocks: int
    steps: int
    weight_decays: tuple[float, ...]  # one training for each
    folds: int  # 1 to hold out a part of the rows once

    @classmethod
    def of(cls, rows: int, steps: int | None) -> "Plan":
        """Return the plan for a number of rows, with other `steps` if given."""
        if rows < FEW_ROWS:
            return cls(128, 2, steps or 10_000, (0.1, 3.0), FOLDS)
        return cls(192, 3, steps or 20_000, (0.0,), 1)

    @property
    def total_steps(self) -> int:
        """The largest number of steps of all trainings together."""
        return self.steps * self.folds * len(self.weight_decays)


class Mixture(NamedTuple):
    """A mixture of flows: the density sum_i weights[i] p_i."""

    flows: tuple[Flow, ...]
    weights: np.ndarray

    def log_prob(
        self, z: Array, context: Array | None, solve: Solve = evaluate.ACCURATE
    ) -> Float[np.ndarray, " n"]:
        """Return the log-density of each row in nats; NaN if the solve failed for all flows."""
        found = np.stack([log_prob_of(flow, z, context, solve) for flow in self.flows], axis=1)
        return log_mean(found, self.weights)


def log_prob_of(flow: Flow, z: Array, context: Array | None, solve: Solve) -> np.ndarray:
    """Return the log-density of each row by one flow, NaN where the solve failed."""
    given = context if flow.context_dim else None
    return evaluate.log_prob(flow, z, context=given, solve=solve).log_prob


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


def train(
    z: Float[np.ndarray, "n dim"],
    context: Float[np.ndarray, "n context"] | None,
    plan: Plan,
    key: Key[Array, ""],
    tell: Callable[[int, str], None],
) -> tuple[Mixture, float]:
    """Train on whitened rows; return the mixture and its held-out NLL in nats.

    `tell(steps, words)` is called as training proceeds. Consumes `key`.
    """
    order_key, train_key = jr.split(key)
    n, dim = z.shape
    order = np.asarray(jr.permutation(order_key, n))
    parts = np.array_split(order, plan.folds)
    if plan.folds == 1:
        parts = [order[: max(1, round(HELD_OUT * n))]]
    normals = [
        Flow(Affine(np.zeros(dim), std * np.eye(dim)), StandardNormal(dim)) for std in (1.0, WIDE)
    ]
    stops = dict.fromkeys(plan.weight_decays, plan.steps)
    snapshots, found = [], []
    for i, part in enumerate(parts):
        fold, flows = _Fold(z, context, part, normals), []
        for j, decay in enumerate(plan.weight_decays):
            key = jr.fold_in(train_key, i * len(stops) + j)
            flows += fold.train(plan, stops[decay], decay, key, tell, watch=i == 0)
            if i == 0:  # what it gains to go on is found out once
                stops[decay] = fold.last
        snapshots.append(flows)
        found.append(fold.log_probs)
    held_out = np.concatenate(found)
    weights = best_weights(held_out)
    flows, shares = list(normals), list(weights[: len(normals)])
    for step, weight in enumerate(weights[len(normals) :]):
        flows += [of_fold[step] for of_fold in snapshots]
        shares += [weight / len(snapshots)] * len(snapshots)
    used = np.flatnonzero(np.array(shares) > 0)
    mixture = Mixture(tuple(flows[i] for i in used), np.array(shares)[used])
    return mixture, -float(np.mean(log_mean(held_out[:, weights > 0], weights[weights > 0])))


class _Fold:
    """The training on all rows but those of one part, on which its snapshots are scored."""

    def __init__(self, z, context, part, normals):
        rest = np.setdiff1d(np.arange(len(z)), part)
        self.rows = _take(z, context, rest)
        self.held_out = _take(z, context, part[:MAX_HELD_OUT])
        self.found = [self._score(flow) for flow in normals]
        self.last = 0  # step of the last snapshot

    @property
    def log_probs(self) -> Float[np.ndarray, "n components"]:
        """The log-densities of the held-out rows, by the normals and each snapshot."""
        return np.stack(self.found, axis=1)

    def train(self, plan, steps, weight_decay, key, tell, watch) -> list[Flow]:
        """Train for at most `steps`; with `watch`, only for as long as it gains something."""
        field_key, fit_key = jr.split(key)
        z, *given = self.rows
        every = min(FIRST_SNAPSHOT, plan.steps)
        flows, gains, before = [], [self._mixed()], 0

        def callback(place: Progress) -> bool:
            nonlocal before
            tell(place.step - before, f"held-out NLL {-gains[-1]:.3f}")
            before = place.step
            doubled = (place.step // every).bit_count() == 1
            if not (doubled or place.step == plan.steps):
                return place.step >= steps
            flows.append(place.flow)
            self.found.append(self._score(place.flow))
            self.last = place.step
            gains.append(self._mixed())
            late = len(gains) > 4 and gains[-1] < gains[-4] + MIN_GAIN
            return place.step >= steps or (watch and late)

        fit(
            _untrained(z.shape[1], given[0].shape[1] if given else 0, plan, field_key),
            (z, *given) if given else z,
            key=fit_key,
            objective=functools.partial(flow_matching, path=paths.trigonometric),
            steps=plan.steps,
            batch=BATCH,
            optimizer=make_optimizer(
                LEARNING_RATE,
                plan.steps,
                warmup=min(200, plan.steps // 10),
                weight_decay=weight_decay,
                clip=CLIP,
            ),
            validation=None,
            every=every,
            callbacks=[callback],
            progress=False,
        )
        return flows

    def _mixed(self):
        """Return the mean log-density of the held-out rows by the best mixture so far."""
        weights = _maximize(self.log_probs)
        return float(np.mean(log_mean(self.log_probs, weights)))

    def _score(self, flow):
        z, *given = self.held_out
        return log_prob_of(flow, z, given[0] if given else None, HELD_OUT_SOLVE)


def _untrained(dim, context_dim, plan, key):
    """Return the flow that starts as N(0, I), and stays about that far from the data."""
    net = ResNet(
        dim,
        plan.width,
        plan.blocks,
        time_frequencies=TIME_FREQUENCIES,
        context_dim=context_dim,
        key=key,
    )
    reference = FullNormal(np.zeros(dim), np.eye(dim))
    return CNF(Preconditioned(net, reference, paths.trigonometric), StandardNormal(dim))


def skeleton(dim: int, context_dim: int, plan: Plan, normal: bool) -> Flow:
    """Return a flow of the structure of a component, to be filled with saved arrays."""
    if normal:
        return Flow(Affine(np.zeros(dim), np.eye(dim)), StandardNormal(dim))
    return _untrained(dim, context_dim, plan, jr.key(0))


def _take(z, context, rows):
    return [jnp.asarray(table[rows], float) for table in (z, context) if table is not None]
