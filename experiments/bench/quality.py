"""Seconds of training until the gap on 8gaussians is 0.20, 0.10 and 0.05 nats.

The gap is the test NLL minus the NLL of the true density on the same points. Compilation and
measurements are not counted; a measurement follows whenever the steps have grown by a tenth.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.random as jr
import numpy as np
import optax

import jcnf
from experiments._tasks.autoregressive_flow import train_autoregressive_flow
from experiments.bench import peers
from experiments.bench.cases import CASES, SOLVE
from jcnf import CNF, Solve, distributions, evaluate, fields, objectives, training
from jcnf.data.toys import toy
from jcnf.plot import CurvePanel

DATA, TARGETS, TEST_POINTS = "8gaussians", (0.20, 0.10, 0.05), 5000
SPLINE = "spline flow"
SPLINE_BUDGETS = (2.0, 4.0, 8.0, 16.0)  # seconds of separate runs, whose schedules end there
FFJORD_BATCH, FFJORD_DECAY = 100, 1e-5
MAX_STEPS, EVERY = 10**7, 50  # of our trainings, and between two times at which they may end
LogProb = Callable[[jax.Array], np.ndarray]
Curve = tuple[list[float], list[float]]  # seconds, gaps


class Learner(NamedTuple):
    """A training that can be continued in parts."""

    train: Callable[[int], None]  # takes this many more steps
    log_prob: LogProb  # of the model trained so far


class Follower:
    """Measures the gap of a model in training, whenever its steps have grown by a tenth."""

    def __init__(self, x: jax.Array, true: np.ndarray, limit: float):
        self.x, self.true, self.limit = x, true, limit
        self.curve: Curve = [], []
        self.next_step = 0

    def __call__(self, step: int, seconds: float, log_prob: LogProb) -> bool:
        """Measure if it is time; return whether the last target is reached or the time is up."""
        if step < self.next_step:
            return False
        self.next_step = step + max(10, step // 10)
        gap = float(np.mean(self.true - log_prob(self.x)))
        for values, value in zip(self.curve, (seconds, gap), strict=True):
            values.append(value)
        return gap <= TARGETS[-1] or seconds > self.limit


def run(limit: float, with_peers: bool, seed: int) -> dict[str, dict]:
    """Return the curve of each learner and its seconds to each target (None if not reached)."""
    data = toy(DATA)
    x = data.sample(jr.fold_in(jr.key(seed), 2), TEST_POINTS)
    true = np.asarray(data.log_prob(x))
    trainings = {
        "jcnf, flow matching": functools.partial(matching, seed),
        "jcnf, likelihood": functools.partial(ffjord, seed),
    }
    for name, peer in peers.load("torchdiffeq").items() if with_peers else ():
        learner = peer.learner(CASES["toy"](0), FFJORD_DECAY, seed)
        trainings[f"{name}, likelihood"] = functools.partial(follow, learner)
    found = {}
    for name, train in trainings.items():
        follower = Follower(x, true, limit)
        train(follower)
        found[name] = _summary(name, follower.curve)
    if with_peers:
        seconds, gaps = [], []
        for budget in SPLINE_BUDGETS:
            spline = train_autoregressive_flow(
                lambda key, _: data.sample(key, 512),
                None,
                transformer="spline",
                seconds=budget,
                seed=seed,
            )
            seconds.append(spline.seconds)
            gaps.append(float(np.mean(true - spline.log_prob(x))))
        found[SPLINE] = _summary(SPLINE, (seconds, gaps))
    return found


def follow(learner: Learner, follower: Follower) -> None:
    """Train and measure in turn, until the follower has seen enough."""
    seconds, steps, enough = 0.0, 0, False
    while not enough:
        more = max(10, steps // 10)
        tic = time.perf_counter()
        learner.train(more)
        seconds, steps = seconds + time.perf_counter() - tic, steps + more
        enough = follower(steps, seconds, learner.log_prob)


def seconds_to(target: float, curve: Curve) -> float | None:
    """Return the seconds at which the gap was first at most `target`, or None."""
    return next((s for s, gap in zip(*curve, strict=True) if gap <= target), None)


def panel(found: dict[str, dict]) -> CurvePanel:
    """Return a panel of gaps against seconds, which says what ends the runs.

    The spline flow's points are runs of fixed lengths. They are not joined, and the level at which
    the other runs stop is shown, because beyond it there is nothing to compare them with.
    """
    series = {name: (r["seconds"], r["gaps"]) for name, r in found.items()}
    return CurvePanel(
        f"{DATA}: seconds until the gap is {TARGETS[-1]:g} nats",
        "training seconds",
        "gap (nats)",
        series,
        {SPLINE: f"{SPLINE}, a run for each point"},
        unjoined=[SPLINE],
        levels={f"all runs but the {SPLINE}'s stop here": TARGETS[-1]},
    )


def matching(seed: int, follower: Follower) -> None:
    """Train by flow matching as in the experiments, but at a constant learning rate."""
    field = fields.ResNet(2, 96, 2, time_frequencies=4, key=jr.key(seed))
    flow = CNF(field, distributions.StandardNormal(2))
    optimizer = training.make_optimizer(5e-3, 1, clip=10.0, schedule="constant")
    _train(flow, follower, seed, batch=1024, optimizer=optimizer)


def ffjord(seed: int, follower: Follower) -> None:
    """Train by likelihood with FFJORD's settings, except that the end time is not trained."""
    settings = {"objective": objectives.likelihood, "batch": FFJORD_BATCH, "solve": SOLVE}
    optimizer = optax.chain(optax.add_decayed_weights(FFJORD_DECAY), optax.adam(1e-3))
    _train(CASES["toy"](0).flow, follower, seed, optimizer=optimizer, average=0.0, **settings)


def _train(flow, follower, seed, **settings):
    solve = Solve(rtol=1e-4, atol=1e-4, norm="worst")

    def log_prob(flow, x):
        return evaluate.log_prob(flow, x, solve=solve).log_prob

    def measure(progress):
        own = functools.partial(log_prob, progress.flow)
        return follower(progress.step, progress.snapshot.seconds, own)

    jcnf.fit(
        flow,
        toy(DATA).sample,
        key=jr.key(seed),
        steps=MAX_STEPS,
        every=EVERY,
        validation=None,
        callbacks=[measure],
        progress=False,
        **settings,
    )


def _summary(name, curve):
    times = {f"to {target:g}": seconds_to(target, curve) for target in TARGETS}
    shown = ", ".join(
        f"{what} {'never' if s is None else f'{s:.1f} s'}" for what, s in times.items()
    )
    print(f"quality: {name}: {shown}; at the end {curve[1][-1]:.3f} after {curve[0][-1]:.0f} s")
    return {"seconds": curve[0], "gaps": curve[1]} | times
