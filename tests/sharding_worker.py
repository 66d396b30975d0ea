"""Tasks that `test_sharding` runs in separate processes, on the devices that it sets up.

`python sharding_worker.py TASK ...`: the first process writes the results, JSON, to $FOUND.
"""

import functools
import json
import os
import re
import sys

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from helpers import astype, outside

import jcnf
from jcnf import CNF, Solve, divergence, evaluate, objectives, sharding, training
from jcnf._checks import InputError
from jcnf.distributions import StandardNormal
from jcnf.fields import MLP, Conv
from jcnf.flows.distrax import FlowDistribution
from jcnf.objectives import couplings

BATCH = 64
COARSE = Solve("bosh3", rtol=1e-3, atol=1e-3)
EULER = Solve(solver="euler", step=0.5)


def flow_of(dim=2):
    return CNF(MLP(dim, (8,), key=jr.key(0)), StandardNormal(dim))


def rows(key, num, dim=2):
    return 0.5 * jr.normal(key, (num, dim)) + jnp.where(jr.bernoulli(key), 1.5, -1.5)


def trained(objective, steps, solve=None):
    """Losses after each tenth of the training, and the parameters; two runs agree bit for bit."""
    flow, optimizer = flow_of(), training.make_optimizer(1e-2, steps)
    run = training.make_train_loop(
        flow, objective, lambda key, _: rows(key, BATCH), optimizer, solve=solve
    )

    def once():
        state, losses = training.init(flow, optimizer), []
        for until in range(steps // 10, steps + 1, steps // 10):
            state, totals = run(state, None, jr.key(1), until)
            metrics = sharding.to_host(training.means(totals))
            losses.append([float(metrics[name]) for name in ("loss", "grad_norm")])
            losses[-1].append(float(metrics.get("nfe", 0)))
        assert int(state.skipped) == 0
        return {"losses": losses, "params": flat(state.average).tolist()}

    found = once()
    assert once() == found
    assert run.program._cache_size() == 1
    return found


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(sharding.to_host(tree))])


def matching():
    return trained(objectives.flow_matching, 100)


def likelihood():
    return trained(objectives.likelihood, 100, COARSE)


def evaluation():
    """Evaluate with numbers of points and chunk sizes that no number of devices divides."""
    flow, key = flow_of(), jr.key(3)
    x = rows(jr.key(2), 37)
    drawn = evaluate.sample(flow, key, 37, solve=COARSE)
    return {
        "log_prob": evaluate.log_prob(flow, x, chunk=15, solve=COARSE).log_prob,
        "samples": drawn.x[-1],
        "noise": drawn.x[0],
        "drawn": sharding.to_host(
            jax.jit(lambda key: sharding.shard(jr.normal(key, (64, 3))))(key)
        ),
    }


def public():
    """Public functions, with a batch that the devices divide and one that they do not."""
    flow, found = flow_of(), {}
    noisy = divergence.Hutchinson(2)
    found["noisy"] = evaluate.log_prob(flow, rows(jr.key(2), 37), key=jr.key(3), divergence=noisy)[
        0
    ]
    for n in (12, 7):
        x = rows(jr.key(2), n)
        found[f"log_prob {n}"] = jcnf.log_prob(flow, x)
        found[f"sample {n}"] = jcnf.sample(flow, jr.key(3), n)
        found[f"both {n}"] = jcnf.sample_and_log_prob(flow, jr.key(3), n)[1]
        found[f"transform {n}"] = jcnf.transform(flow, x).value
        found[f"trajectory {n}"] = jcnf.trajectory(flow, x, jnp.linspace(0, 1, 3))
    distribution = FlowDistribution(flow)
    found["distrax"] = jax.jit(jax.vmap(distribution.log_prob))(rows(jr.key(2), 8)[:, None])
    return sharding.to_host(found)


def adjoints():
    """Train with every adjoint, and with couplings, one of which is computed on the host."""
    found = {}
    for adjoint in ("direct", "backsolve", "backsolve_seminorm", "reversible"):
        solve = Solve(rtol=1e-3, atol=1e-3, adjoint=adjoint, max_steps=64)
        found[adjoint] = trained(objectives.likelihood, 10, solve)
    worst = Solve(rtol=1e-3, atol=1e-3, norm="worst")
    noisy = functools.partial(objectives.likelihood, divergence=divergence.Hutchinson(2))
    found["noisy"] = trained(noisy, 10, worst)
    steered = functools.partial(objectives.likelihood, random_end_time=0.1)
    found["steered"] = trained(steered, 10, COARSE)
    for coupling in (couplings.ExactOT(48), couplings.SinkhornOT(64)):
        objective = functools.partial(objectives.flow_matching, coupling=coupling)
        found[type(coupling).__name__] = trained(objective, 10)
    return {f"{way} {name}": value for way in found for name, value in found[way].items()}


def failing():
    """Batches with rows that cannot be solved: failure flags, values of the others, gradient."""
    found, x = {}, rows(jr.key(2), BATCH)
    x = x.at[jnp.array([0, 9, 40, 63])].set(6.0)
    worst = functools.partial(objectives.likelihood, solve=Solve("bosh3", norm="worst"))
    loss = jax.jit(jax.value_and_grad(lambda flow: worst(flow, x, None)[0]))
    for kind in ("blows up", "NaN"):
        flow = astype(outside(kind), jnp.float32)
        found[f"{kind} loss"], gradient = loss(flow)
        found[f"{kind} gradient"] = flat(gradient)
        result = jcnf.transform(flow, sharding.shard(x), solve=Solve("bosh3"))
        found |= {f"{kind} x": result.value, f"{kind} log-det": result.logdet}
        found[f"{kind} failed"] = result.stats.failed.astype(float)
    return sharding.to_host(found)


def pictures():
    """A convolutional flow: the loss, the gradient, and the data that devices exchange."""
    flow = CNF(Conv((4, 4, 1), (3, 2), key=jr.key(0)), StandardNormal(16))

    def loss(flow, x):
        noise = divergence.Hutchinson(1)
        return objectives.likelihood(flow, x, jr.key(1), solve=EULER, divergence=noise)[0]

    program = jax.jit(jax.value_and_grad(loss))
    x = sharding.shard(rows(jr.key(2), BATCH, 16))
    value, gradient = program(flow, x)
    text = program.lower(flow, x).compile().as_text()
    sent = re.findall(r"(\S+ all-(?:gather|to-all))\(", text)
    return {"loss": value, "gradient": flat(gradient), "sent": sent}


def agreement():
    """Values that all processes agree on, and errors that all raise."""

    def unreadable():
        raise InputError("nothing there")

    def refused(function):
        try:
            function()
        except InputError as error:
            return str(error)
        return None

    me, last = jax.process_index(), jax.process_count() - 1
    key = sharding.replicate(jr.key(5))
    found = {
        "first": sharding.on_process_zero(
            lambda: {"path": f"of {me}", "bytes": b"\0\xff", "zero": -0.0}
        ),
        "error": refused(lambda: sharding.on_process_zero(unreadable)),
        "anywhere": [sharding.any_process(me == last), sharding.any_process(False)],
        "key": np.asarray(sharding.to_host(jr.key_data(key))),
        "uneven": refused(lambda: sharding.shard(jnp.zeros((BATCH + 1, 2)))),
    }
    found["first"]["bytes"] = list(found["first"]["bytes"])
    found["first"]["zero"] = str(found["first"]["zero"])
    # Every process must have found the same as the first, which reports it.
    told = json.dumps(found, default=np.ndarray.tolist)
    assert sharding.on_process_zero(lambda: told) == told
    return found


def main():
    sharding.initialize()
    with jax.set_mesh(sharding.make_mesh() if jax.device_count() > 1 else None):
        found = {name: globals()[name]() for name in sys.argv[1:]}
        found["devices"] = sharding.num_devices()
    if jax.process_index() == 0:
        with open(os.environ["FOUND"], "w") as file:
            json.dump(found, file, default=lambda array: np.asarray(array).tolist())


if __name__ == "__main__":
    main()
