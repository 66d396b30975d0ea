"""A training step of flow matching, against bare passes of its network and against torchcfm."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr

from experiments.bench import ours, peers
from experiments.bench.cases import Case
from experiments.bench.report import Results
from experiments.bench.timing import Program, measure
from jcnf import CNF, distributions, fields, objectives, training

BATCH = 1024
ROWS = 40_000
STEPS_PER_DISPATCH = 50


def residual(dim: int, width: int) -> Case:
    """Return the case of a residual network, as is usual for flow matching, and a table."""
    field = fields.ResNet(dim, width, 2, time_frequencies=8, key=jr.key(5))
    return _case(field, f"2 blocks of {width}")


def dense(dim: int, width: int) -> Case:
    """Return the case of torchcfm's tutorial: three hidden layers, time as another input."""
    field = fields.MLP(dim, (width,) * 3, time="concat", activation="silu", key=jr.key(5))
    return _case(field, f"concat {width}-{width}-{width} silu")


def _case(field, title):
    flow = CNF(field, distributions.StandardNormal(field.dim))
    title = f"{field.dim}-D, {title}"
    return Case(title, flow, lambda key, n: jr.normal(jr.key(5), (n, field.dim)), BATCH)


def run(case: Case, rounds: int, seconds: float) -> Results:
    """Time the step (batch, noise, loss, gradient, AdamW, average) and its bare passes."""
    programs = {ours.NAME: _step(case), "bare passes": _passes(case)}
    return measure(programs, rounds, seconds=seconds)


def against_torchcfm(case: Case, rounds: int, seconds: float) -> Results:
    """Time our step and torchcfm's, if its loss on given pairs and times equals ours."""
    x0, x1 = jr.normal(jr.key(6), (2, BATCH, case.flow.base.dim))
    t = jr.uniform(jr.key(7), (BATCH,))
    v = jax.vmap(case.flow.bijection.field)(t, x0 + t[:, None] * (x1 - x0))
    reference = float(jnp.mean((v - (x1 - x0)) ** 2))
    programs = {ours.NAME: _step(case)}
    for name, peer in peers.load("torchcfm").items():
        program = peer.matching_steps(case, _table(case), STEPS_PER_DISPATCH, (x0, x1, t))
        if abs(program.figures["loss"] - reference) <= 1e-5 * max(1.0, reference):
            programs[name] = program
        else:
            print(f"  {name}: not timed: its loss is {program.figures['loss']}, not {reference}")
    return measure(programs, rounds, seconds=seconds)


def _table(case):
    return case.draw(jr.key(5), ROWS)


def _step(case):
    optimizer = training.make_optimizer(1e-3, 10**6)
    run = training.make_train_loop(
        case.flow, objectives.flow_matching, training.draw_rows(BATCH), optimizer
    )
    state, data, until = training.init(case.flow, optimizer), _table(case), 0

    def take():
        nonlocal state, until
        until += STEPS_PER_DISPATCH
        state, _ = jax.block_until_ready(run.program(state, data, jr.key(7), until))

    return Program(take, {}, STEPS_PER_DISPATCH)


def _passes(case):
    params: Any
    params, _ = training.partition(case.flow)
    x, t = case.x, jr.uniform(jr.key(6), (BATCH,))

    def loss(params, x, t):
        v = jax.vmap(training.with_params(case.flow, params).bijection.field)(t, x)
        return jnp.mean(jnp.sum((v - x) ** 2, axis=-1))

    @jax.jit
    def passes(params, x, t):
        def body(_, carry):
            # The gradient replaces the parameters, so that XLA cannot remove a pass.
            value, grads = jax.value_and_grad(loss)(carry[0], x, t)
            return grads, value

        return jax.lax.fori_loop(0, STEPS_PER_DISPATCH, body, (params, jnp.zeros(())))

    return Program(lambda: jax.block_until_ready(passes(params, x, t)), {}, STEPS_PER_DISPATCH)
