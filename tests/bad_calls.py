"""Bad values of the arguments of public functions; the error of each must name the argument."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from helpers import mlp as drawn_mlp

import jcnf
from jcnf import (
    CNF,
    NICE,
    Exact,
    ForwardMode,
    Hutchinson,
    HutchPlusPlus,
    Solve,
    XTrace,
    fields,
    flows,
    objectives,
    regularizers,
    training,
)
from jcnf.data import images
from jcnf.distributions import FullNormal, Logistic, ScaledNormal, StandardNormal
from jcnf.evaluate.log_prob import bits_per_dim
from jcnf.flows import Chain, Composition, augmented, vae
from jcnf.inference import inpaint, mala
from jcnf.objectives import couplings, paths, times
from jcnf.sklearn import Column as Support
from jcnf.sklearn import FlowDensity

KEY = jr.key(0)
X = jnp.ones((3, 2))
ONES = {n: jnp.ones((3, n)) for n in range(1, 5)}
NAN = X.at[1, 0].set(jnp.nan)
ROWS = np.random.default_rng(0).normal(size=(20, 2))
FIELD = drawn_mlp(2, (4,))
FLOW = CNF(FIELD, StandardNormal(2))
BASE = FLOW.base
GIVEN = CNF(drawn_mlp(2, (4,), context_dim=3), BASE)
WIDE = CNF(drawn_mlp(3, (4,)), StandardNormal(3))
OPTIMIZER = training.make_optimizer(1e-3, 10)


class Silent:
    """Not a field: it does not subclass `Field`."""

    def __call__(self, t, x, context=None):
        return x


class Column(fields.Field):
    """A field of another shape than x."""

    dim: int = 2

    def __call__(self, t, x, context=None):
        return x[:, None]


# One bad value for each way in which a value of the kind can be wrong.
NUMBERS = [0, -3, 2.5, True, "4"]
COUNTS = [*NUMBERS, None]
POSITIVE = [0.0, -1.0, np.nan, np.inf, "1", True]
KEYS = [None, 0, jr.PRNGKey(0), jr.split(KEY, 3)]
BATCHES = [X[0], X[:0], X[None], ONES[4], X.astype(int), X.astype(complex), X.astype("float32")]
BATCHES += [X.astype(jnp.bfloat16), [["a", "b"]], [[1.0, 2.0], [1.0]], None]
CONTEXTS = [None, X, jnp.ones((2, 3)), jnp.ones((3, 3), int), jnp.ones(3), [[1.0, 2.0, 3.0]] * 3]
FLOWS = [fields.MLP, FIELD]
FIELDS = [fields.MLP, Silent(), 3]
BASES = [StandardNormal(3), StandardNormal, 2, None]
SOLVES = [Solve, "dopri5", None]
DIVERGENCES = [Exact, "exact", None]
SHAPES = [(8, 8), (8.0, 8, 1), (0, 8, 1)]
WIDTHS = [(0,), (2.5,), (True,), 4]

CASES = {}  # by name: a pattern of what the error says, and the call that is refused


def refuses(function, good=None, says=None, **bad):
    """Add a case for each value in the lists `bad`, by argument; the other arguments are `good`.

    `says` has what the errors say, for an argument whose name they do not have.
    """
    for argument, values in bad.items():
        where = f"{function.__module__}.{function.__qualname__}: {argument}".removeprefix("jcnf.")
        known = sum(name.rpartition(" ")[0] == where for name in CASES)
        for number, value in enumerate(values, start=known):
            call = functools.partial(function, **(good or {}) | {argument: value})
            words = (says or {}).get(argument, argument.removesuffix("s"))
            CASES[f"{where} {number}"] = words, call


# Flows

flow = {"flow": FLOW, "x": X}
given = {"flow": GIVEN, "x": X}
noisy = flow | {"divergence": Hutchinson()}
refuses(jcnf.log_prob, flow, says={"x": "x|empty batch"}, flow=FLOWS, x=BATCHES, context=[X])
refuses(jcnf.log_prob, given, context=CONTEXTS)
refuses(jcnf.log_prob, noisy, key=KEYS)
refuses(jcnf.log_prob, flow | {"key": KEY}, solve=SOLVES, divergence=DIVERGENCES)
refuses(
    jcnf.log_prob,
    flow | {"key": KEY},
    says={"divergence": "at most 2 probes", "solve": "rtol and atol"},
    divergence=[Hutchinson(3, "orthogonal"), HutchPlusPlus(3), XTrace(9)],
    solve=[Solve(rtol=1e-17, atol=1e-17)],
)
refuses(jcnf.log_prob, {"x": X}, says={"flow": "field"}, flow=[CNF(Column(), BASE)])
refuses(
    jcnf.log_prob, {"x": X}, says={"flow": "context"}, flow=[CNF(fields.Guided(FIELD, 2.0), BASE)]
)
refuses(jcnf.transform, flow, flow=FLOWS, direction=["forward"])
refuses(
    jcnf.transform,
    flow,
    regularizers=[("kinetic",), regularizers.kinetic, (regularizers.kinetic,) * 2],
)
refuses(
    jcnf.transform,
    flow,
    says={"regularizers": "jacobian|potential"},
    regularizers=[(regularizers.jacobian,), (regularizers.hjb,)],
)
refuses(
    jcnf.transform,
    {
        "flow": jax.tree.map(lambda a: a.astype("float32") if eqx.is_array(a) else a, FLOW),
        "x": X.astype("float32"),
    },
    says={"solve": "rtol and atol"},
    solve=[Solve(rtol=1e-9, atol=1e-9)],
)
for draw in (jcnf.sample, jcnf.sample_and_log_prob):
    drawn = {"key": KEY, "num_samples": 3}
    refuses(draw, {"flow": FLOW} | drawn, flow=FLOWS, num_samples=COUNTS, key=KEYS)
    refuses(draw, {"flow": GIVEN} | drawn, context=CONTEXTS)
TIMES = [jnp.zeros(1), 1.0, jnp.array([0.0, 1.0, 0.5]), jnp.array([0.0, 0.0, 1.0]), ["0", "1"]]
TIMES += [jnp.array([0.0, jnp.nan]), jnp.array([0.0, jnp.inf]), jnp.ones((4, 2))]
refuses(jcnf.trajectory, flow, times=TIMES)
refuses(jcnf.trajectory, {"x": X, "times": [0.0, 1.0]}, says={"flow": "Field"}, flow=FIELDS[:2])
refuses(CNF, {"field": FIELD, "base": BASE}, field=FIELDS, base=BASES, t1=POSITIVE)
refuses(flows.ODE, field=FIELDS)
chain = {"parts": [FLOW.bijection], "base": BASE}
other = flows.ODE(drawn_mlp(2, (4,), context_dim=1))
refuses(Chain, chain, parts=[[], [FIELD], [CNF], [FLOW], FLOW.bijection, "ode"], base=BASES[1:])
refuses(Chain, chain, says={"parts": "context"}, parts=[[GIVEN.bijection, other]])
refuses(Composition, parts=[[], [FIELD], "ode"])
scales = {"shape": (8, 8, 1), "scales": 1, "blocks": lambda shape: [FLOW.bijection]}
refuses(flows.multiscale, scales, shape=SHAPES, scales=[0, 1.5, 5])
affine = {"loc": np.zeros(2), "scale": np.eye(2)}
refuses(flows.Affine, affine, loc=[[[0.0]], 1.0, np.full(2, np.nan)], weight=[ONES[2], [np.nan]])
refuses(flows.Affine, affine, scale=[np.eye(3), np.ones((2, 2)), np.full((2, 2), np.inf)])
whiten = {"x": ROWS}
refuses(flows.Affine.whiten, whiten, x=[ROWS[0], ROWS[:1], ROWS * np.inf, np.ones((4, 2))])
refuses(flows.Affine.whiten, whiten, context=[ROWS[1:], ROWS[:, 0]], ridge=[-1.0, np.nan, "1"])
refuses(flows.Logit, alpha=[0.0, 0.5, np.nan, 1e-300, "0.1"])
refuses(flows.Squeeze, shape=[*SHAPES, (3, 4, 1)])
refuses(flows.ChannelSplit, {"inner": FLOW.bijection, "shape": (2, 2, 1)}, channels=[1])
refuses(NICE, {"dim": 2, "key": KEY}, dim=[1], couplings=[0, 1.5], widths=WIDTHS, key=KEYS)
refuses(NICE, {"dim": 2, "key": KEY}, split=["thirds"], base=BASES[:1])
refuses(flows.calibrated, {"flow": NICE(2, (4,), key=KEY)}, x=[NAN, X[0]])
refuses(augmented.augment, {"x": X, "key": KEY, "extra": 1}, x=BATCHES[:1], key=KEYS)
refuses(augmented.augment, {"x": X, "key": KEY}, extra=[-1, 0.5])
wide = {"flow": WIDE, "x": X, "key": KEY}
refuses(augmented.log_prob_bound, wide, x=[X[0], ONES[4]], samples=[0, 1.5], key=KEYS)

# Settings

PLANS = [0.1, [1.0] * 64, jnp.ones(63), jnp.ones((2, 64)), np.ones(64, int), np.ndarray]
refuses(Solve, solver=["rk45", int], adjoint=["magic", 3], norm=["max"], step=[0.0])
refuses(Solve, rtol=[*POSITIVE, np.ones(2)], atol=[-1e-3], max_steps=[*COUNTS, 10**9])
refuses(Solve, first_step=[0, 2.0], step_plan=PLANS)
refuses(lambda step_plan: jax.eval_shape(lambda m: Solve(step_plan=m), step_plan), step_plan=[X[0]])
refuses(Solve, says={"solver": "step"}, solver=["euler"])
refuses(Exact, probes=[-1, True])
refuses(ForwardMode, chunk=COUNTS)
refuses(Hutchinson, probes=COUNTS, noise=["uniform"])
refuses(HutchPlusPlus, probes=COUNTS)
refuses(XTrace, probes=COUNTS)
refuses(StandardNormal, dim=COUNTS)
refuses(Logistic, dim=COUNTS)
refuses(ScaledNormal, {"dim": 2}, scale=[0.0, np.nan, np.inf, np.ones(3)], loc=[np.nan])
normal = {"mean": np.zeros(2), "covariance": np.eye(2)}
refuses(FullNormal, normal, mean=[0.0, [0.0], np.full(2, np.nan)])
refuses(FullNormal, normal, covariance=[np.eye(3), np.zeros((2, 2)), -np.eye(2), np.tri(2)])
refuses(FullNormal.fit, x=[ROWS[0], ROWS[:1]])
mlp = {"dim": 2, "widths": (4,), "key": KEY}
refuses(fields.MLP, mlp, dim=COUNTS, widths=WIDTHS, time=["gate"], key=KEYS, context_dim=[-1])
refuses(fields.MLP, mlp, says={"output": "activation"}, activation=["relu6", 3], output=["relu6"])
refuses(fields.MLP, mlp | {"context_dim": 1}, conditioning=["film"])
refuses(fields.MLP, mlp | {"widths": ()}, says={"conditioning": "modulat|context|hidden"},
        conditioning=["modulate"])  # fmt: skip
plain = {"dim": 2, "key": KEY}
refuses(
    fields.ResNet,
    plain,
    key=KEYS,
    width=[0],
    blocks=[0, 1.5],
    time_frequencies=[-1],
    fourier_features=[0.5],
)
refuses(fields.Planar, plain, key=KEYS, width=[0], average=["sum"])
refuses(fields.Potential, plain, key=KEYS, width=["8"], rank=[0])
image = {"shape": (8, 8, 1), "channels": (8,), "key": KEY}
refuses(fields.Conv, image, shape=SHAPES, channels=WIDTHS, time=["x"], key=KEYS)
refuses(fields.UNet, image, shape=SHAPES, channels=[*WIDTHS, (), (12,)], key=KEYS)
refuses(fields.UNet, image | {"channels": (8, 8)}, shape=[(7, 8, 1)])
refuses(fields.Cast, {"field": FIELD, "dtype": "bfloat16"}, field=FIELDS, dtype=[int, "float12"])
refuses(fields.MinusIdentity, field=FIELDS)
rescaled = {"field": FIELD, "rate": 1.0}
refuses(fields.TimeRescaling, rescaled, field=FIELDS, rate=POSITIVE, start=[np.nan])
gaussian = {"field": FIELD, "reference": FullNormal(np.zeros(2), np.eye(2)), "path": paths.linear}
refuses(fields.GaussianTails, gaussian, field=FIELDS, reference=[BASE, FullNormal([0.0], [[1.0]])])
refuses(fields.GaussianTails, gaussian, path=["linear", paths.SigmaMin], reach=POSITIVE)
refuses(fields.GaussianTails, gaussian, t1=POSITIVE, base_std=POSITIVE)
mixture = {"fields": [FIELD], "key": KEY}
refuses(fields.Mixture, mixture, fields=[[], [FIELD, WIDE.bijection.field], [fields.MLP]], key=KEYS)
refuses(fields.Guided, {"field": GIVEN.bijection.field}, scale=[np.nan, "2"])
refuses(regularizers.taylor, order=COUNTS)
refuses(regularizers.named, says={"name": "kinetics|order"}, name=["kinetics", "taylor0"])
refuses(paths.SigmaMin, sigma=[1.0, np.nan, "0.1"])
refuses(paths.VariancePreserving, low=[30.0], end=[0.0])
refuses(paths.Stochastic, sigma=[-1.0], path=["linear"])
for draw in (times.uniform, times.stratified, times.data_biased):
    refuses(draw, {"key": KEY, "num": 4}, key=KEYS, num=COUNTS)
for coupling in (couplings.ExactOT, couplings.SinkhornOT):
    refuses(coupling, group=[1, 2.5], context_weight=[np.nan])
refuses(couplings.SinkhornOT, epsilon=POSITIVE, iterations=COUNTS)

# Objectives and training

batch = flow | {"key": KEY}
matching = objectives.flow_matching
refuses(matching, batch, x=[X[0]], key=KEYS, path=["linear", lambda s, x0, x1, z: x1[:1] * s])
refuses(matching, batch, time=[0.5], coupling=[couplings.ExactOT, lambda *a: jnp.ones(2, int)])
refuses(matching, batch, says={"flow": "CNF"}, flow=[NICE(2, (4,), key=KEY)], drop_context=[0.1])
refuses(matching, batch | {"flow": GIVEN, "context": ONES[3]}, drop_context=[1.0, np.nan])
refuses(objectives.rectified, {"flow": FLOW, "key": KEY}, pairs=[X, (X, X[:2])])
weights = [("kinetic",), {"kinetic": 0.1}, (regularizers.kinetic,)]
weights += [{regularizers.kinetic: -1.0}, {regularizers.kinetic: np.nan}]
refuses(objectives.likelihood, batch, random_end_time=[1.0, np.nan])
refuses(
    objectives.likelihood, batch, says={"regularizers": "regularizer|weight"}, regularizers=weights
)
refuses(objectives.likelihood, flow | {"key": None}, random_end_time=[0.1])
refuses(
    objectives.weighted_sum,
    batch,
    says={"weights": "weight|objective"},
    weights=[{}, [objectives.likelihood], {objectives.likelihood: -1.0}, {"likelihood": 1.0}],
)
refuses(
    objectives.reverse_kl, {"flow": FLOW, "z": X, "key": KEY}, energy=["u1", lambda x: x[:, :1]]
)
window = {"num": 1, "shortest": 1.0, "longest": 2.0}
refuses(objectives.sample_windows, window, num=NUMBERS, shortest=[3.0], rows=[1])
refuses(objectives.sample_windows, window, longest=[np.nan, np.inf])
refuses(objectives.trajectory_fit, {"field": FIELD, "key": KEY}, windows=[X])
adam = {"learning_rate": 0.1, "steps": 10}
refuses(training.make_optimizer, adam, learning_rate=POSITIVE, steps=COUNTS, warmup=[-1])
refuses(training.make_optimizer, adam, weight_decay=[np.nan], clip=[0.0, np.nan], schedule=["step"])
loop = {"model": FLOW, "objective": objectives.likelihood, "draw_batch": lambda key, data: data}
loop |= {"optimizer": OPTIMIZER}
refuses(training.make_train_loop, loop, objective=["likelihood"], draw_batch=[ROWS])
refuses(training.make_train_loop, loop, optimizer=[1e-3], average=[1.0, np.nan])
unsolved = objectives.with_context(objectives.flow_matching)


def train(objective, solve):
    """Take three steps by an objective that is given a solve."""
    run = training.make_train_loop(**loop | {"objective": objective}, solve=solve)
    return run(training.init(FLOW, OPTIMIZER), ROWS, KEY, 3)


refuses(train, {"objective": unsolved}, solve=[Solve()])
made = training.make_train_loop(**loop)
refuses(lambda key: made(training.init(FLOW, OPTIMIZER), ROWS, 1, key), key=[3])
refuses(training.init, {"model": FLOW, "optimizer": OPTIMIZER}, optimizer=["adam"])
refuses(training.init, {"optimizer": OPTIMIZER}, says={"model": "train"}, model=[BASE])
refuses(training.draw_rows, batch=NUMBERS)
refuses(training.draw_rows(2), {"key": KEY}, says={"data": "rows"}, data=[X[:0], (X, X[:2])])
refuses(
    training.with_params,
    {"model": FLOW},
    says={"params": "parameters"},
    params=[training.init(WIDE, OPTIMIZER).params],
)

# Tables

supports = {"lower": 0.0, "upper": 1.0}
refuses(Support, supports, lower=[1.0, np.nan], upper=[0.0, np.nan], step=[-1.0, np.nan, np.inf])
refuses(Support, {"circular": True}, upper=[np.inf])
table = {"X": ROWS}
density = FlowDensity(steps=1, progress=False)
refuses(density.fit, table, context=[ROWS[1:], [["a", "b"]] * 20, ROWS * np.nan, np.ones(20)])


def density_of(**settings):
    """Fit a density with these settings."""
    return FlowDensity(**settings, progress=False).fit(ROWS)


refuses(density_of, steps=NUMBERS)
given = [["whole"], {"a": "whole"}, {2: "whole"}, {0: "wholes"}, {0: (1, 0)}, {0: ("a", 1)}]
refuses(density_of, columns=[*given, {0: "positive"}, {0: "whole"}, {0: (-9, 0.1)}])

# Inference and pictures

chain = {"log_prob": lambda x: -jnp.sum(x**2, 1), "x": X, "known": np.array([True, False])}
chain |= {"key": KEY, "steps": 2}
walk = chain | {"burn_in": 1}
refuses(mala.langevin, walk, x=[X[0], NAN], known=[np.ones(3, bool), np.ones(2)], key=KEYS)
refuses(mala.langevin, walk, steps=COUNTS, burn_in=[-1], step=[np.nan], bounds=[(1.0, 0.0)])
refuses(mala.langevin, walk, scale=[np.zeros(2), np.array([1.0, np.nan])])
refuses(inpaint.ascend, chain, keep=[5], noise=[-1.0], rate=[0.1])
refuses(inpaint.half, {"shape": (2, 2, 1), "side": "top"}, shape=[(2, 2)], side=["middle"])
pixels = {"key": KEY, "pixels": X.astype(int), "levels": 4}
refuses(images.dequantize, pixels, key=KEYS, pixels=[X, jnp.array([-1]), jnp.array([256])])
refuses(images.dequantize, pixels, levels=COUNTS)
refuses(bits_per_dim, {"log_prob": 1.0, "dim": 4, "levels": 256}, dim=[0], levels=[0])
refuses(vae.Binomial, trials=[0, np.nan, 1.5])
refuses(vae.Posterior, {"encoder": lambda x: x, "dim": 2}, dim=[0], encoder=["mlp"])
encoder = {"trunk": lambda x: x, "features": 4, "dim": 2, "key": KEY}
refuses(vae.Encoder, encoder, key=KEYS, features=[0])
