"""Seconds of training until the gap on 8gaussians is 0.20, 0.10 and 0.05 nats.

The gap is the test NLL minus the NLL of the true density on the same points. Compilation and
measurements are not counted; a measurement follows whenever the steps have grown by a tenth.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.random as jr
import numpy as np
import optax

from experiments._tasks.spline_flow import train_spline_flow
from experiments.bench import peers
from experiments.bench.cases import CASES, SOLVE
from jcnf import CNF, Solve, distributions, evaluate, fields, objectives, training
from jcnf.data.toys import toy
from jcnf.plot import CurvePanel

DATA, TARGETS, TEST_POINTS = "8gaussians", (0.20, 0.10, 0.05), 5000
SPLINE_BUDGETS = (2.0, 4.0, 8.0, 16.0)  # seconds of separate runs, whose schedules end there
FFJORD_BATCH, FFJORD_DECAY = 100, 1e-5
Curve = tuple[list[float], list[float]]  # seconds, gaps


class Learner(NamedTuple):
    """A training that can be continued in parts."""

    train: Callable[[int], None]  # takes this many more steps
    log_prob: Callable[[jax.Array], np.ndarray]  # of the model trained so far


def run(limit: float, with_peers: bool, seed: int) -> dict[str, dict]:
    """Return the curve of each learner and its seconds to each target (None if not reached)."""
    data = toy(DATA)
    x = data.sample(jr.fold_in(jr.key(seed), 2), TEST_POINTS)
    true = np.asarray(data.log_prob(x))
    learners = {"jcnf, flow matching": matching(seed), "jcnf, likelihood": ffjord(seed)}
    for name, peer in peers.load("torchdiffeq").items() if with_peers else ():
        learners[f"{name}, likelihood"] = peer.learner(CASES["toy"](0), FFJORD_DECAY, seed)
    found = {}
    for name, learner in learners.items():
        found[name] = _summary(name, follow(learner, x, true, limit))
    if with_peers:
        seconds, gaps = [], []
        for budget in SPLINE_BUDGETS:
            spline = train_spline_flow(
                lambda key, _: data.sample(key, 512), None, seconds=budget, seed=seed
            )
            seconds.append(spline.seconds)
            gaps.append(float(np.mean(true - spline.log_prob(x))))
        found["spline flow"] = _summary("spline flow", (seconds, gaps))
    return found


def follow(learner: Learner, x, true: np.ndarray, limit: float, parts: int = 10_000) -> Curve:
    """Train and measure in turn, until the last target is reached or the time is up."""
    seconds, gaps, spent, steps = [], [], 0.0, 0
    for _ in range(parts):
        more = max(10, steps // 10)
        tic = time.perf_counter()
        learner.train(more)
        spent, steps = spent + time.perf_counter() - tic, steps + more
        seconds.append(spent)
        gaps.append(float(np.mean(true - learner.log_prob(x))))
        if gaps[-1] <= TARGETS[-1] or spent > limit:
            break
    return seconds, gaps


def seconds_to(target: float, curve: Curve) -> float | None:
    """Return the seconds at which the gap was first at most `target`, or None."""
    return next((s for s, gap in zip(*curve, strict=True) if gap <= target), None)


def panel(found: dict[str, dict]) -> CurvePanel:
    """Return a panel of gaps against seconds."""
    series = {name: (r["seconds"], r["gaps"]) for name, r in found.items()}
    return CurvePanel(DATA, "training seconds", "gap (nats)", series)


def matching(seed: int) -> Learner:
    """Return flow matching as in the experiments, but at a constant learning rate."""
    field = fields.ResNet(2, 96, 2, time_frequencies=4, key=jr.key(seed))
    flow = CNF(field, distributions.StandardNormal(2))
    optimizer = training.make_optimizer(5e-3, 1, clip=10.0, schedule="constant")
    return _learner(flow, objectives.flow_matching, 1024, optimizer, 0.999, seed)


def ffjord(seed: int) -> Learner:
    """Return likelihood with FFJORD's settings, except that the end time is not trained."""
    optimizer = optax.chain(optax.add_decayed_weights(FFJORD_DECAY), optax.adam(1e-3))
    flow = CASES["toy"](0).flow
    return _learner(flow, objectives.likelihood, FFJORD_BATCH, optimizer, 0.0, seed, SOLVE)


def _learner(flow, objective, batch, optimizer, average, seed, solve=None):
    data, key = toy(DATA), jr.key(seed)
    run = training.make_train_loop(
        flow,
        objective,
        lambda key, _: data.sample(key, batch),
        optimizer,
        average=average,
        solve=solve,
    )
    state = training.init(flow, optimizer)
    program = run.program.lower(state, None, key, 0).compile()
    until = 0

    def go_on(steps):
        nonlocal state, until
        until += steps
        state, _ = jax.block_until_ready(program(state, None, key, until))

    def log_prob(x):
        solve = Solve(rtol=1e-4, atol=1e-4, norm="worst")
        return evaluate.log_prob(training.with_params(flow, state.average), x, solve=solve).log_prob

    return Learner(go_on, log_prob)


def _summary(name, curve):
    times = {f"to {target:g}": seconds_to(target, curve) for target in TARGETS}
    shown = ", ".join(
        f"{what} {'never' if s is None else f'{s:.1f} s'}" for what, s in times.items()
    )
    print(f"quality: {name}: {shown}; at the end {curve[1][-1]:.3f} after {curve[0][-1]:.0f} s")
    return {"seconds": curve[0], "gaps": curve[1]} | times
