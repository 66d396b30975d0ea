"""Hostile calls of the public functions: what each is, and the words its error must have."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

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
    evaluate,
    fields,
    flows,
    objectives,
    regularizers,
    training,
)
from jcnf.data import images
from jcnf.distributions import Logistic, ScaledNormal, StandardNormal
from jcnf.evaluate.log_prob import bits_per_dim
from jcnf.flows import Chain, Composition, augmented, vae
from jcnf.inference import inpaint as inpainting
from jcnf.objectives import couplings, paths, times

KEY = jr.key(0)
LEGACY = jr.PRNGKey(0)
X = jnp.ones((3, 2))
KNOWN = np.array([True, False])
NAN = X.at[1, 0].set(jnp.nan)
ROWS = np.random.default_rng(0).normal(size=(20, 2))
NAN_ROWS = np.where(np.arange(20)[:, None] == 4, np.nan, ROWS)
FIELD = fields.MLP(2, (4,), key=KEY)
FLOW = CNF(FIELD, StandardNormal(2))
GIVEN = CNF(fields.MLP(2, (4,), context_dim=3, key=KEY), StandardNormal(2))
WIDE = CNF(fields.MLP(3, (4,), key=KEY), StandardNormal(3))
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


def mlp(dim=2, widths=(4,), **settings):
    return lambda: fields.MLP(dim, widths, **{"key": KEY} | settings)


def draw(key, _):
    return X


def build_loop(flow=FLOW, objective=objectives.likelihood, draw=draw, optimizer=OPTIMIZER, **more):
    return lambda: training.make_train_loop(flow, objective, draw, optimizer, **more)


def langevin(x=X, known=KNOWN, key=KEY, **settings):
    settings = {"steps": 2, "burn_in": 1} | settings
    return lambda: inpainting.langevin(lambda x: -jnp.sum(x**2, 1), x, known, key, **settings)


def ascend(x=X, known=KNOWN, key=KEY, **settings):
    settings = {"steps": 2} | settings
    return lambda: inpainting.ascend(lambda x: -jnp.sum(x**2, 1), x, known, key, **settings)


def of(function, *args, **settings):
    """The call, for the table."""
    return functools.partial(function, *args, **settings)


FLOWS = {
    "log_prob: no batch axis": (of(jcnf.log_prob, FLOW, X[0]), ["(batch, 2)", "x[None]"]),
    "log_prob: empty batch": (of(jcnf.log_prob, FLOW, X[:0]), ["empty batch"]),
    "log_prob: wrong dim": (of(jcnf.log_prob, FLOW, jnp.ones((3, 4))), ["(batch, 2)", "(3, 4)"]),
    "log_prob: three axes": (of(jcnf.log_prob, FLOW, X[None]), ["(batch, 2)", "(1, 3, 2)"]),
    "log_prob: whole numbers": (of(jcnf.log_prob, FLOW, jnp.ones((3, 2), int)), ["floating"]),
    "log_prob: complex": (of(jcnf.log_prob, FLOW, X.astype(complex)), ["floating", "complex"]),
    "log_prob: strings": (of(jcnf.log_prob, FLOW, [["a", "b"]]), ["expected x", "(batch, 2)"]),
    "log_prob: None": (of(jcnf.log_prob, FLOW, None), ["expected x", "(batch, 2)"]),
    "log_prob: ragged": (
        of(jcnf.log_prob, FLOW, [[1.0, 2.0], [1.0]]),
        ["expected x", "(batch, 2)"],
    ),
    "log_prob: float32 of a float64 flow": (
        of(jcnf.log_prob, FLOW, X.astype(jnp.float32)),
        ["float64", "float32", "astype"],
    ),
    "log_prob: a bfloat16 state": (
        of(jcnf.log_prob, FLOW, X.astype(jnp.bfloat16)),
        ["bfloat16", "astype"],
    ),
    "log_prob: no flow": (
        of(jcnf.log_prob, fields.MLP, X),
        ["flow", "CNF(field, base)", "instance"],
    ),
    "log_prob: a field": (of(jcnf.log_prob, FIELD, X), ["flow", "CNF(field, base)"]),
    "log_prob: a list for a context": (
        of(jcnf.log_prob, GIVEN, X, context=[[1.0, 2.0, 3.0]] * 3),
        ["context must be an array", "asarray"],
    ),
    "log_prob: context for none": (of(jcnf.log_prob, FLOW, X, context=X), ["context", "0"]),
    "log_prob: no context": (of(jcnf.log_prob, GIVEN, X), ["context of size 3", "none"]),
    "log_prob: context of another size": (
        of(jcnf.log_prob, GIVEN, X, context=X),
        ["context of size 3", "2"],
    ),
    "log_prob: context of other rows": (
        of(jcnf.log_prob, GIVEN, X, context=jnp.ones((2, 3))),
        ["context of shape (3, context)", "(2, 3)"],
    ),
    "log_prob: context of whole numbers": (
        of(jcnf.log_prob, GIVEN, X, context=jnp.ones((3, 3), int)),
        ["context", "floating"],
    ),
    "log_prob: context of one axis": (
        of(jcnf.log_prob, GIVEN, X, context=jnp.ones(3)),
        ["context of shape (3, context)"],
    ),
    "log_prob: no key": (
        of(jcnf.log_prob, FLOW, X, divergence=Hutchinson()),
        ["key=jax.random.key"],
    ),
    "log_prob: a legacy key": (
        of(jcnf.log_prob, FLOW, X, key=LEGACY, divergence=Hutchinson()),
        ["key", "uint32", "jax.random.key"],
    ),
    "log_prob: a number for a key": (
        of(jcnf.log_prob, FLOW, X, key=0, divergence=Hutchinson()),
        ["key", "0", "jax.random.key"],
    ),
    "log_prob: many keys": (
        of(jcnf.log_prob, FLOW, X, key=jr.split(KEY, 3), divergence=Hutchinson()),
        ["one key", "(3,)"],
    ),
    "log_prob: a class for a divergence": (
        of(jcnf.log_prob, FLOW, X, divergence=Exact),
        ["divergence", "Exact"],
    ),
    "log_prob: a name for a divergence": (
        of(jcnf.log_prob, FLOW, X, divergence="exact"),
        ["divergence", "'exact'"],
    ),
    "log_prob: a class for a solve": (of(jcnf.log_prob, FLOW, X, solve=Solve), ["solve", "Solve"]),
    "log_prob: a name for a solve": (
        of(jcnf.log_prob, FLOW, X, solve="dopri5"),
        ["solve", "'dopri5'"],
    ),
    "log_prob: more probes than dimensions": (
        of(jcnf.log_prob, FLOW, X, key=KEY, divergence=Hutchinson(3, "orthogonal")),
        ["at most 2 probes"],
    ),
    "log_prob: a field of another shape": (
        of(jcnf.log_prob, CNF(Column(), StandardNormal(2)), X),
        ["the field", "(2,)", "(2, 1)"],
    ),
    "log_prob: a tolerance beyond float64": (
        of(jcnf.log_prob, FLOW, X, solve=Solve(rtol=1e-17, atol=1e-17)),
        ["rtol and atol", "float64", "got 1e-17"],
    ),
    "transform: a tolerance beyond float32": (
        lambda: jcnf.transform(
            evaluate_in_float32(FLOW), X.astype(jnp.float32), solve=Solve(rtol=1e-9, atol=1e-9)
        ),
        ["got 1e-09", "float32", "JAX_ENABLE_X64=1"],
    ),
    "transform: unknown direction": (
        of(jcnf.transform, FLOW, X, direction="forward"),
        ["'to_base' or 'to_data'", "'forward'"],
    ),
    "transform: a regularizer's name": (
        of(jcnf.transform, FLOW, X, regularizers=("kinetic",)),
        ["functions", "kinetic"],
    ),
    "transform: a bare regularizer": (
        of(jcnf.transform, FLOW, X, regularizers=regularizers.kinetic),
        ["regularizers", "tuple"],
    ),
    "transform: a regularizer twice": (
        of(jcnf.transform, FLOW, X, regularizers=(regularizers.kinetic,) * 2),
        ["distinct names"],
    ),
    "transform: products of none": (
        of(jcnf.transform, FLOW, X, regularizers=(regularizers.jacobian,)),
        ["Exact(probes=1)"],
    ),
    "transform: hjb without potential": (
        of(jcnf.transform, FLOW, X, regularizers=(regularizers.hjb,)),
        ["potential"],
    ),
    "sample: none": (of(jcnf.sample, FLOW, KEY, 0), ["num_samples", "1", "0"]),
    "sample: negative": (of(jcnf.sample, FLOW, KEY, -3), ["num_samples", "-3"]),
    "sample: half of one": (of(jcnf.sample, FLOW, KEY, 2.5), ["num_samples", "whole", "2.5"]),
    "sample: a bool": (of(jcnf.sample, FLOW, KEY, True), ["num_samples", "whole", "True"]),
    "sample: legacy key": (of(jcnf.sample, FLOW, LEGACY, 3), ["key", "jax.random.key"]),
    "sample: no key": (of(jcnf.sample, FLOW, None, 3), ["key", "jax.random.key"]),
    "sample: context of other rows": (
        of(jcnf.sample, GIVEN, KEY, 3, context=jnp.ones((2, 3))),
        ["context of shape (3, context)"],
    ),
    "sample_and_log_prob: a seed": (
        of(jcnf.sample_and_log_prob, FLOW, 7, 3),
        ["key", "7", "jax.random.key"],
    ),
    "sample_and_log_prob: a float of samples": (
        of(jcnf.sample_and_log_prob, FLOW, KEY, 3.0),
        ["num_samples", "3.0"],
    ),
    "trajectory: one time": (of(jcnf.trajectory, FLOW, X, jnp.zeros(1)), ["at least 2"]),
    "trajectory: a number": (of(jcnf.trajectory, FLOW, X, 1.0), ["times", "()"]),
    "trajectory: back and forth": (
        of(jcnf.trajectory, FLOW, X, jnp.array([0.0, 1.0, 0.5])),
        ["strictly increase"],
    ),
    "trajectory: a time twice": (
        of(jcnf.trajectory, FLOW, X, jnp.array([0.0, 0.0, 1.0])),
        ["strictly increase"],
    ),
    "trajectory: NaN": (of(jcnf.trajectory, FLOW, X, jnp.array([0.0, jnp.nan])), ["times"]),
    "trajectory: infinity": (
        of(jcnf.trajectory, FLOW, X, jnp.array([0.0, jnp.inf])),
        ["times has NaN or inf"],
    ),
    "trajectory: strings": (of(jcnf.trajectory, FLOW, X, ["0", "1"]), ["times"]),
    "trajectory: times of others": (
        of(jcnf.trajectory, FLOW, X, jnp.ones((4, 2))),
        ["(times, batch)", "(4, 2)"],
    ),
    "trajectory: no field": (of(jcnf.trajectory, Silent(), X, [0.0, 1.0]), ["Field", "subclass"]),
    "trajectory: a class": (of(jcnf.trajectory, fields.MLP, X, [0.0, 1.0]), ["Field", "instance"]),
    "CNF: other dims": (of(CNF, FIELD, StandardNormal(3)), ["same dim", "2 and 3"]),
    "CNF: a class": (of(CNF, fields.MLP, StandardNormal(2)), ["field", "instance"]),
    "CNF: no field": (of(CNF, Silent(), StandardNormal(2)), ["field", "subclass"]),
    "CNF: no base": (of(CNF, FIELD, 2), ["base", "jcnf.distributions"]),
    "CNF: a class of bases": (
        of(CNF, FIELD, StandardNormal),
        ["base", "StandardNormal"],
    ),
    "CNF: t1 0": (of(CNF, FIELD, FLOW.base, 0.0), ["t1", "positive"]),
    "CNF: t1 negative": (of(CNF, FIELD, FLOW.base, -1.0), ["t1", "positive"]),
    "CNF: t1 NaN": (of(CNF, FIELD, FLOW.base, np.nan), ["t1", "finite"]),
    "CNF: t1 infinite": (of(CNF, FIELD, FLOW.base, np.inf), ["t1", "finite"]),
    "CNF: t1 a string": (of(CNF, FIELD, FLOW.base, "1"), ["t1", "'1'"]),
    "CNF: t1 a bool": (of(CNF, FIELD, FLOW.base, True), ["t1", "True"]),
    "ODE: a number": (of(flows.ODE, 3), ["field", "3"]),
    "Chain: no parts": (of(Chain, [], StandardNormal(2)), ["at least one part"]),
    "Chain: fields": (of(Chain, [FIELD], StandardNormal(2)), ["ODE(field)"]),
    "Chain: flows": (of(Chain, [FLOW], FLOW.base), ["flow.bijection"]),
    "Flow: a field": (of(flows.Flow, FIELD, FLOW.base), ["bijection", "ODE(field)"]),
    "Chain: classes": (of(Chain, [CNF], StandardNormal(2)), ["Bijection"]),
    "Chain: two contexts": (
        of(
            Chain,
            [GIVEN.bijection, flows.ODE(fields.MLP(2, context_dim=1, key=KEY))],
            FLOW.base,
        ),
        ["one size", "[1, 3]"],
    ),
    "Chain: no base": (of(Chain, [FLOW.bijection], None), ["base"]),
    "Chain: one part without a list": (of(Chain, FLOW.bijection, FLOW.base), ["parts", "sequence"]),
    "Composition: a name": (of(Composition, "ode"), ["Bijection", "str"]),
    "multiscale: none": (
        of(flows.multiscale, (8, 8, 1), 0, lambda shape: [FLOW.bijection]),
        ["0 scales"],
    ),
    "multiscale: odd": (
        of(flows.multiscale, (6, 6, 1), 3, lambda shape: [FLOW.bijection]),
        ["halved", "6 x 6"],
    ),
    "multiscale: half a scale": (
        of(flows.multiscale, (8, 8, 1), 1.5, lambda shape: [FLOW.bijection]),
        ["scales", "whole"],
    ),
    "multiscale: two sizes": (
        of(flows.multiscale, (8, 8), 1, lambda shape: [FLOW.bijection]),
        ["height, width, channels", "(8, 8)"],
    ),
    "Logit: 0": (of(flows.Logit, 0.0), ["alpha"]),
    "Logit: a half": (of(flows.Logit, 0.5), ["alpha"]),
    "Logit: NaN": (of(flows.Logit, np.nan), ["alpha"]),
    "Logit: nothing": (of(flows.Logit, 1e-300), ["alpha", "1e-300"]),
    "Logit: a string": (of(flows.Logit, "0.1"), ["alpha"]),
    "Squeeze: odd": (of(flows.Squeeze, (3, 4, 1)), ["even"]),
    "Squeeze: nothing": (of(flows.Squeeze, (0, 4, 1)), ["shape"]),
    "ChannelSplit: all": (of(flows.ChannelSplit, FLOW, (2, 2, 1), 1), ["channels"]),
    "NICE: one dimension": (of(NICE, 1, key=KEY), ["dim", "2"]),
    "NICE: no couplings": (of(NICE, 2, couplings=0, key=KEY), ["couplings"]),
    "NICE: half a coupling": (of(NICE, 2, couplings=1.5, key=KEY), ["couplings", "1.5"]),
    "NICE: width 0": (of(NICE, 2, (0,), key=KEY), ["widths"]),
    "NICE: width 2.5": (of(NICE, 2, (2.5,), key=KEY), ["widths", "2.5"]),
    "NICE: a number of widths": (of(NICE, 2, 8, key=KEY), ["widths", "8"]),
    "NICE: unknown split": (of(NICE, 2, split="thirds", key=KEY), ["'thirds'", "halves"]),
    "NICE: another base": (of(NICE, 2, base=StandardNormal(3), key=KEY), ["3 and 2"]),
    "NICE: a legacy key": (of(NICE, 2, key=LEGACY), ["key", "jax.random.key"]),
    "NICE: calibrated by NaN": (
        lambda: flows.calibrated(NICE(2, (4,), key=KEY), NAN),
        ["x has NaN or inf", "first: 1"],
    ),
    "NICE: calibrated by one row": (
        lambda: flows.calibrated(NICE(2, (4,), key=KEY), X[0]),
        ["(batch, 2)"],
    ),
    "augment: fewer": (of(augmented.augment, X, KEY, -1), ["extra", "-1"]),
    "augment: half": (of(augmented.augment, X, KEY, 0.5), ["extra", "0.5"]),
    "augment: no batch": (of(augmented.augment, X[0], KEY, 1), ["(batch, dim)", "(2,)"]),
    "augment: a seed": (of(augmented.augment, X, 3, 1), ["key", "jax.random.key"]),
    "bound: too many": (
        of(augmented.log_prob_bound, FLOW, jnp.ones((3, 4)), KEY),
        ["at most 2"],
    ),
    "bound: no samples": (of(augmented.log_prob_bound, WIDE, X, KEY, samples=0), ["sample", "0"]),
    "bound: no key": (of(augmented.log_prob_bound, WIDE, X, None), ["key", "jax.random.key"]),
    "bound: no batch": (of(augmented.log_prob_bound, WIDE, X[0], KEY), ["(batch, dim)"]),
}


def evaluate_in_float32(flow):
    """The flow in float32, as it is without x64."""
    return jax.tree.map(lambda a: a.astype(jnp.float32) if eqx.is_inexact_array(a) else a, flow)


SETTINGS = {
    "Solve: unknown solver": (of(Solve, solver="rk45"), ["rk45", "dopri5"]),
    "Solve: a class": (of(Solve, solver=int), ["solver", "int"]),
    "Solve: unknown adjoint": (of(Solve, adjoint="magic"), ["magic", "checkpoint"]),
    "Solve: a number of an adjoint": (of(Solve, adjoint=3), ["adjoint", "3"]),
    "Solve: unknown norm": (of(Solve, norm="max"), ["max", "worst"]),
    "Solve: rtol 0": (of(Solve, rtol=0.0), ["rtol", "positive"]),
    "Solve: rtol NaN": (of(Solve, rtol=np.nan), ["rtol", "positive"]),
    "Solve: rtol infinite": (of(Solve, rtol=np.inf), ["rtol", "finite"]),
    "Solve: rtol a string": (of(Solve, rtol="1e-3"), ["rtol", "'1e-3'"]),
    "Solve: rtol a bool": (of(Solve, rtol=True), ["rtol", "True"]),
    "Solve: rtol an array": (of(Solve, rtol=np.ones(2)), ["rtol"]),
    "Solve: atol negative": (of(Solve, atol=-1e-3), ["atol", "positive"]),
    "Solve: step 0": (of(Solve, step=0.0), ["step", "positive"]),
    "Solve: no steps": (of(Solve, max_steps=0), ["max_steps"]),
    "Solve: steps and a half": (of(Solve, max_steps=10.5), ["max_steps", "whole"]),
    "Solve: bool of steps": (of(Solve, max_steps=True), ["max_steps", "True"]),
    "Solve: steps beyond memory": (of(Solve, max_steps=10**9), ["max_steps", "1000000"]),
    "Solve: first step 0": (of(Solve, first_step=0), ["first_step"]),
    "Solve: a first step beyond the end": (of(Solve, first_step=2.0), ["first_step", "1"]),
    "Solve: a step plan that is a number": (of(Solve, step_plan=0.1), ["step_plan", "64", "0.1"]),
    "Solve: a step plan that is a list": (
        of(Solve, step_plan=[1.0] * 64),
        ["step_plan", "64", "list"],
    ),
    "Solve: a step plan of another length": (
        of(Solve, step_plan=jnp.ones(63)),
        ["step_plan", "64", "(63,)"],
    ),
    "Solve: step plans of a batch": (
        of(Solve, step_plan=jnp.ones((2, 64))),
        ["step_plan", "64", "(2, 64)"],
    ),
    "Solve: a step plan of integers": (
        of(Solve, step_plan=np.ones(64, int)),
        ["step_plan", "floats", "int64"],
    ),
    "Solve: a class for a step plan": (
        of(Solve, step_plan=np.ndarray),
        ["step_plan", "class ndarray"],
    ),
    "Solve: a traced step plan of another length": (
        of(jax.eval_shape, lambda m: Solve(step_plan=m).rtol, jnp.ones(65)),
        ["step_plan", "64", "(65,)"],
    ),
    "Solve: euler without step": (of(Solve, solver="euler"), ["step=0.05"]),
    "Exact: negative": (of(Exact, -1), ["probes", "-1"]),
    "Exact: bool": (of(Exact, True), ["probes", "True"]),
    "ForwardMode: chunk 0": (of(ForwardMode, 0), ["chunk"]),
    "ForwardMode: chunk 1.5": (of(ForwardMode, 1.5), ["chunk", "1.5"]),
    "Hutchinson: none": (of(Hutchinson, 0), ["probe", "0"]),
    "Hutchinson: a float": (of(Hutchinson, 2.0), ["probe", "2.0"]),
    "Hutchinson: unknown noise": (of(Hutchinson, 1, "uniform"), ["uniform", "rademacher"]),
    "HutchPlusPlus: negative": (of(HutchPlusPlus, -2), ["probe", "-2"]),
    "HutchPlusPlus: too many": (
        of(jcnf.log_prob, FLOW, X, key=KEY, divergence=HutchPlusPlus(3)),
        ["at most 2"],
    ),
    "XTrace: a string": (of(XTrace, "4"), ["probe", "'4'"]),
    "XTrace: too many": (
        of(jcnf.log_prob, FLOW, X, key=KEY, divergence=XTrace(9)),
        ["at most 2"],
    ),
    "StandardNormal: dim 0": (of(StandardNormal, 0), ["dim", "0"]),
    "StandardNormal: dim 1.5": (of(StandardNormal, 1.5), ["dim", "1.5"]),
    "Logistic: dim -1": (of(Logistic, -1), ["dim", "-1"]),
    "Logistic: dim a string": (of(Logistic, "2"), ["dim", "'2'"]),
    "ScaledNormal: scale 0": (of(ScaledNormal, 2, 0.0), ["scale", "positive"]),
    "ScaledNormal: scale NaN": (of(ScaledNormal, 2, np.nan), ["scale", "has NaN or inf"]),
    "ScaledNormal: scale infinite": (of(ScaledNormal, 2, np.inf), ["scale", "has NaN or inf"]),
    "ScaledNormal: loc NaN": (of(ScaledNormal, 2, 1.0, np.nan), ["loc", "has NaN or inf"]),
    "ScaledNormal: scales of others": (of(ScaledNormal, 2, np.ones(3)), ["scale", "(2,)", "(3,)"]),
    "MLP: dim 0": (mlp(0), ["dim", "0"]),
    "MLP: dim 2.0": (mlp(2.0), ["dim", "2.0"]),
    "MLP: width 0": (mlp(2, (0,)), ["widths", "(0,)"]),
    "MLP: width 2.5": (mlp(2, (2.5,)), ["widths", "2.5"]),
    "MLP: width True": (mlp(2, (True,)), ["widths", "True"]),
    "MLP: one width without a tuple": (mlp(2, 4), ["widths", "4"]),
    "MLP: unknown time": (mlp(time="gate"), ["gate", "concatsquash"]),
    "MLP: unknown activation": (mlp(activation="relu6"), ["relu6", "tanh"]),
    "MLP: a number for an activation": (mlp(activation=3), ["activation", "3"]),
    "MLP: unknown output": (mlp(output="relu6"), ["relu6", "tanh"]),
    "MLP: context -1": (mlp(context_dim=-1), ["context_dim"]),
    "MLP: unknown conditioning": (mlp(context_dim=1, conditioning="film"), ["film", "modulate"]),
    "MLP: nothing to modulate by": (mlp(conditioning="modulate"), ["needs a context"]),
    "MLP: nothing to modulate": (
        mlp(2, (), context_dim=1, conditioning="modulate"),
        ["hidden layers"],
    ),
    "MLP: a legacy key": (mlp(key=LEGACY), ["key", "jax.random.key"]),
    "MLP: a seed": (mlp(key=0), ["key", "0", "jax.random.key"]),
    "ResNet: no width": (of(fields.ResNet, 2, 0, key=KEY), ["width=0"]),
    "ResNet: no blocks": (of(fields.ResNet, 2, 4, 0, key=KEY), ["blocks=0"]),
    "ResNet: half a block": (of(fields.ResNet, 2, 4, 1.5, key=KEY), ["blocks", "1.5"]),
    "ResNet: frequencies -1": (of(fields.ResNet, 2, frequencies=-1, key=KEY), ["frequencies"]),
    "ResNet: waves 0.5": (of(fields.ResNet, 2, waves=0.5, key=KEY), ["waves", "0.5"]),
    "ResNet: no key": (of(fields.ResNet, 2, key=None), ["key", "jax.random.key"]),
    "Planar: no units": (of(fields.Planar, 2, 0, key=KEY), ["width=0"]),
    "Planar: sum": (of(fields.Planar, 2, average="sum", key=KEY), ["average", "'sum'"]),
    "Planar: many keys": (of(fields.Planar, 2, key=jr.split(KEY)), ["one key", "(2,)"]),
    "Potential: no rank": (of(fields.Potential, 2, 4, 0, key=KEY), ["rank=0"]),
    "Potential: width '8'": (of(fields.Potential, 2, "8", key=KEY), ["width='8'"]),
    "Conv: a plane": (of(fields.Conv, (8, 8), (4,), key=KEY), ["(8, 8)", "channels"]),
    "Conv: channels 0": (of(fields.Conv, (8, 8, 1), (0,), key=KEY), ["channels", "(0,)"]),
    "Conv: unknown time": (of(fields.Conv, (8, 8, 1), (4,), time="x", key=KEY), ["'x'"]),
    "UNet: no levels": (of(fields.UNet, (8, 8, 1), (), key=KEY), ["channels"]),
    "UNet: odd": (of(fields.UNet, (7, 8, 1), (8, 8), key=KEY), ["halved", "7 x 8"]),
    "UNet: channels of no groups": (of(fields.UNet, (8, 8, 1), (12,), key=KEY), ["multiples"]),
    "UNet: height 8.0": (of(fields.UNet, (8.0, 8, 1), (8,), key=KEY), ["shape", "8.0"]),
    "Cast: whole numbers": (of(fields.Cast, FIELD, int), ["floating dtype"]),
    "Cast: unknown": (
        of(fields.Cast, FIELD, "float12"),
        ["floating dtype", "float12"],
    ),
    "Cast: a class": (of(fields.Cast, fields.MLP, "bfloat16"), ["field", "instance"]),
    "MinusIdentity: no field": (of(fields.MinusIdentity, 3), ["field", "3"]),
    "TimeRescaling: rate 0": (of(fields.TimeRescaling, FIELD, 0.0), ["rate"]),
    "TimeRescaling: rate NaN": (of(fields.TimeRescaling, FIELD, np.nan), ["rate"]),
    "TimeRescaling: rate 'fast'": (
        of(fields.TimeRescaling, FIELD, "fast"),
        ["rate"],
    ),
    "TimeRescaling: start NaN": (
        of(fields.TimeRescaling, FIELD, 1.0, np.nan),
        ["start"],
    ),
    "Mixture: none": (of(fields.Mixture, [], key=KEY), ["at least one field"]),
    "Mixture: two dims": (
        of(fields.Mixture, [FIELD, fields.MLP(3, (4,), key=KEY)], key=KEY),
        ["one dim"],
    ),
    "Mixture: classes": (of(fields.Mixture, [fields.MLP], key=KEY), ["field", "instance"]),
    "Guided: NaN": (of(fields.Guided, GIVEN.bijection.field, np.nan), ["scale", "finite"]),
    "Guided: no context": (
        of(jcnf.log_prob, CNF(fields.Guided(FIELD, 2.0), FLOW.base), X),
        ["guided", "context"],
    ),
    "taylor: order 0": (of(regularizers.taylor, 0), ["order", "0"]),
    "taylor: order 1.5": (of(regularizers.taylor, 1.5), ["order", "1.5"]),
    "named: unknown": (of(regularizers.named, "kinetics"), ["kinetics", "kinetic,"]),
    "named: taylor0": (of(regularizers.named, "taylor0"), ["order"]),
    "SigmaMin: 1": (of(paths.SigmaMin, 1.0), ["sigma", "[0, 1)"]),
    "SigmaMin: NaN": (of(paths.SigmaMin, np.nan), ["sigma"]),
    "SigmaMin: '0.1'": (of(paths.SigmaMin, "0.1"), ["sigma", "'0.1'"]),
    "VariancePreserving: falls": (of(paths.VariancePreserving, 20.0, 0.1), ["low <= high"]),
    "VariancePreserving: end 0": (of(paths.VariancePreserving, end=0.0), ["end"]),
    "Stochastic: negative": (of(paths.Stochastic, -1.0), ["sigma"]),
    "Stochastic: no path": (of(paths.Stochastic, 0.1, "linear"), ["path", "'linear'"]),
    "times: none": (of(times.data_biased, KEY, 0), ["num", "0"]),
    "times: a seed": (of(times.uniform, 0, 4), ["key", "jax.random.key"]),
    "times: half": (of(times.stratified, KEY, 2.5), ["num", "2.5"]),
    "coupling: group 1": (of(couplings.ExactOT, 1), ["group"]),
    "coupling: group 2.5": (of(couplings.ExactOT, 2.5), ["group", "2.5"]),
    "coupling: weight NaN": (of(couplings.ExactOT, 8, np.nan), ["context_weight"]),
    "Sinkhorn: epsilon 0": (of(couplings.SinkhornOT, epsilon=0.0), ["epsilon"]),
    "Sinkhorn: epsilon NaN": (of(couplings.SinkhornOT, epsilon=np.nan), ["epsilon"]),
    "Sinkhorn: iterations 0": (of(couplings.SinkhornOT, iterations=0), ["iteration"]),
}

TRAINING = {
    "flow_matching: no batch": (of(objectives.flow_matching, FLOW, X[0], KEY), ["x[None]"]),
    "flow_matching: no key": (of(objectives.flow_matching, FLOW, X, None), ["key"]),
    "flow_matching: a seed": (of(objectives.flow_matching, FLOW, X, 0), ["key", "jax.random.key"]),
    "flow_matching: a flow without field": (
        of(objectives.flow_matching, NICE(2, (4,), key=KEY), X, KEY),
        ["flow matching", "ODE", "AdditiveCouplings"],
    ),
    "flow_matching: a path's name": (
        of(objectives.flow_matching, FLOW, X, KEY, path="linear"),
        ["path", "'linear'", "jcnf.objectives.paths"],
    ),
    "flow_matching: a coupling's class": (
        of(objectives.flow_matching, FLOW, X, KEY, coupling=couplings.ExactOT),
        ["coupling", "Exact"],
    ),
    "flow_matching: a time": (
        of(objectives.flow_matching, FLOW, X, KEY, time=0.5),
        ["time", "0.5", "jcnf.objectives.times"],
    ),
    "flow_matching: a path of another shape": (
        of(objectives.flow_matching, FLOW, X, KEY, path=lambda s, x0, x1, z: x1[:1] * s),
        ["path must return", "(3, 2)"],
    ),
    "flow_matching: a coupling of pairs": (
        of(objectives.flow_matching, FLOW, X, KEY, coupling=lambda *a: jnp.ones(2, int)),
        ["coupling", "(3,)"],
    ),
    "flow_matching: dropping none": (
        of(objectives.flow_matching, FLOW, X, KEY, drop_context=0.1),
        ["drop_context"],
    ),
    "flow_matching: dropping all": (
        of(objectives.flow_matching, GIVEN, X, KEY, context=jnp.ones((3, 3)), drop_context=1.0),
        ["drop_context", "1.0"],
    ),
    "flow_matching: dropping NaN": (
        of(objectives.flow_matching, GIVEN, X, KEY, context=jnp.ones((3, 3)), drop_context=np.nan),
        ["drop_context", "nan"],
    ),
    "rectified: no pairs": (of(objectives.rectified, FLOW, X, KEY), ["pairs"]),
    "rectified: unequal": (of(objectives.rectified, FLOW, (X, X[:2]), KEY), ["the same shape"]),
    "likelihood: steer beyond": (
        of(objectives.likelihood, FLOW, X, KEY, steer=1.0),
        ["steer", "[0, 1.0)"],
    ),
    "likelihood: steer NaN": (
        of(objectives.likelihood, FLOW, X, KEY, steer=np.nan),
        ["steer", "nan"],
    ),
    "likelihood: steer without key": (
        of(objectives.likelihood, FLOW, X, None, steer=0.1),
        ["steer", "key"],
    ),
    "likelihood: a penalty's name": (
        of(objectives.likelihood, FLOW, X, KEY, regularizers={"kinetic": 0.1}),
        ["functions", "kinetic"],
    ),
    "likelihood: regularizers without weights": (
        of(objectives.likelihood, FLOW, X, KEY, regularizers=(regularizers.kinetic,)),
        ["regularizers", "weight"],
    ),
    "likelihood: a negative weight": (
        of(objectives.likelihood, FLOW, X, KEY, regularizers={regularizers.kinetic: -1.0}),
        ["weight", "kinetic", "-1"],
    ),
    "likelihood: a NaN weight": (
        of(objectives.likelihood, FLOW, X, KEY, regularizers={regularizers.kinetic: np.nan}),
        ["weight", "kinetic", "nan"],
    ),
    "weighted_sum: nothing": (
        of(objectives.weighted_sum, FLOW, X, KEY, weights={}),
        ["weights to map"],
    ),
    "weighted_sum: a list": (
        of(objectives.weighted_sum, FLOW, X, KEY, weights=[objectives.likelihood]),
        ["weights to map"],
    ),
    "weighted_sum: negative": (
        of(objectives.weighted_sum, FLOW, X, KEY, weights={objectives.likelihood: -1.0}),
        ["weights", "-1"],
    ),
    "weighted_sum: names": (
        of(objectives.weighted_sum, FLOW, X, KEY, weights={"likelihood": 1.0}),
        ["objective", "'likelihood'"],
    ),
    "reverse_kl: no energy": (
        of(objectives.reverse_kl, FLOW, X, energy="u1"),
        ["energy", "'u1'"],
    ),
    "reverse_kl: a column": (
        of(objectives.reverse_kl, FLOW, X, energy=lambda x: x[:, :1]),
        ["energy", "(3,)", "(3, 1)"],
    ),
    "windows: none": (of(objectives.sample_windows, 0, shortest=1.0, longest=2.0), ["num", "0"]),
    "windows: falling": (of(objectives.sample_windows, 1, shortest=2.0, longest=1.0), ["shortest"]),
    "windows: NaN": (of(objectives.sample_windows, 1, shortest=1.0, longest=np.nan), ["longest"]),
    "windows: infinite": (
        of(objectives.sample_windows, 1, shortest=1.0, longest=np.inf),
        ["longest", "finite"],
    ),
    "windows: one row": (
        of(objectives.sample_windows, 1, shortest=1.0, longest=2.0, rows=1),
        ["rows", "2", "1"],
    ),
    "windows: an array": (of(objectives.trajectory_fit, FLOW, X), ["Windows"]),
    "for_first_ode: no chain": (
        of(objectives.for_first_ode(objectives.likelihood), FLOW, X, KEY),
        ["Chain"],
    ),
    "make_optimizer: rate 0": (of(training.make_optimizer, 0.0, 10), ["learning_rate"]),
    "make_optimizer: rate NaN": (of(training.make_optimizer, np.nan, 10), ["learning_rate"]),
    "make_optimizer: rate '1'": (of(training.make_optimizer, "1", 10), ["learning_rate", "'1'"]),
    "make_optimizer: no steps": (of(training.make_optimizer, 0.1, 0), ["steps", "0"]),
    "make_optimizer: half a step": (of(training.make_optimizer, 0.1, 1.5), ["steps", "1.5"]),
    "make_optimizer: warmup -1": (of(training.make_optimizer, 0.1, 10, warmup=-1), ["warmup"]),
    "make_optimizer: decay NaN": (
        of(training.make_optimizer, 0.1, 10, weight_decay=np.nan),
        ["weight_decay"],
    ),
    "make_optimizer: clip 0": (of(training.make_optimizer, 0.1, 10, clip=0.0), ["clip"]),
    "make_optimizer: clip NaN": (of(training.make_optimizer, 0.1, 10, clip=np.nan), ["clip"]),
    "make_optimizer: unknown schedule": (
        of(training.make_optimizer, 0.1, 10, schedule="linear"),
        ["linear", "cosine"],
    ),
    "make_train_loop: no objective": (
        build_loop(objective="likelihood"),
        ["objective", "'likelihood'"],
    ),
    "make_train_loop: an array to draw": (build_loop(draw=ROWS), ["draw_batch", "draw_rows"]),
    "make_train_loop: no optimizer": (build_loop(optimizer=1e-3), ["optimizer", "make_optimizer"]),
    "make_train_loop: a number for a key": (
        lambda: build_loop()()(training.init(FLOW, OPTIMIZER), ROWS, 1, 3),
        ["expected a typed key", "jax.random.key(seed)"],
    ),
    "make_train_loop: a solve for what solves nothing": (
        build_loop(objective=objectives.with_context(objectives.flow_matching), solve=Solve()),
        ["takes no solve", "solve="],
    ),
    "marginal_log_prob: a name for a solve": (
        of(evaluate.marginal_log_prob, FLOW, X, KEY, solve="dopri5"),
        ["solve", "jcnf.Solve", "dopri5"],
    ),
    "make_train_loop: average 1": (build_loop(average=1.0), ["average", "[0, 1)"]),
    "make_train_loop: average NaN": (build_loop(average=np.nan), ["average", "nan"]),
    "init: no optimizer": (of(training.init, FLOW, "adam"), ["optimizer", "'adam'"]),
    "init: nothing to train": (of(training.init, FLOW.base, OPTIMIZER), ["nothing", "train"]),
    "draw_rows: none": (of(training.draw_rows, 0), ["batch", "0"]),
    "draw_rows: half": (of(training.draw_rows, 1.5), ["batch", "1.5"]),
    "draw_rows: no rows": (lambda: training.draw_rows(2)(KEY, X[:0]), ["rows"]),
    "draw_rows: unequal": (
        lambda: training.draw_rows(2)(KEY, (X, X[:2])),
        ["equal numbers of rows", "[2, 3]"],
    ),
    "with_params: another model's": (
        lambda: training.with_params(FLOW, training.init(WIDE, OPTIMIZER).params),
        ["parameters", "(4, 3)"],
    ),
    "langevin: no batch": (langevin(x=X[0]), ["(batch, dim)"]),
    "langevin: NaN": (langevin(x=NAN), ["x has NaN or inf", "first: 1"]),
    "langevin: known of others": (langevin(known=np.ones(3, bool)), ["known"]),
    "langevin: known of numbers": (langevin(known=np.ones(2)), ["bool"]),
    "langevin: no steps": (langevin(steps=0), ["steps"]),
    "langevin: steps 1.5": (langevin(steps=1.5), ["steps", "1.5"]),
    "langevin: burn_in -1": (langevin(burn_in=-1), ["burn_in"]),
    "langevin: step NaN": (langevin(step=np.nan), ["step"]),
    "langevin: bounds reversed": (langevin(bounds=(1.0, 0.0)), ["low < high"]),
    "langevin: scale 0": (langevin(scale=np.zeros(2)), ["scale", "positive"]),
    "langevin: scale NaN": (langevin(scale=np.array([1.0, np.nan])), ["scale", "positive"]),
    "langevin: a seed": (langevin(key=3), ["key", "jax.random.key"]),
    "ascend: keeping more": (ascend(keep=5), ["keep", "5 of 2"]),
    "ascend: noise -1": (ascend(noise=-1.0), ["noise"]),
    "ascend: rate 0.1": (ascend(rate=0.1), ["rate", "function"]),
    "half: unknown side": (of(inpainting.half, (2, 2, 1), "middle"), ["middle", "top"]),
    "half: a plane": (of(inpainting.half, (2, 2), "top"), ["height, width, channels"]),
    "dequantize: floats": (of(images.dequantize, KEY, X, 256), ["integer type"]),
    "dequantize: no levels": (of(images.dequantize, KEY, X.astype(int), 0), ["levels"]),
    "dequantize: a seed": (of(images.dequantize, 0, X.astype(int), 4), ["key"]),
    "bits_per_dim: dim 0": (of(bits_per_dim, 1.0, 0, 256), ["dim"]),
    "bits_per_dim: levels 0": (of(bits_per_dim, 1.0, 4, 0), ["levels"]),
    "Binomial: no trials": (of(vae.Binomial, 0), ["trials"]),
    "Binomial: NaN": (of(vae.Binomial, np.nan), ["trials"]),
    "Binomial: 1.5": (of(vae.Binomial, 1.5), ["trials", "1.5"]),
    "Posterior: dim 0": (of(vae.Posterior, lambda x: x, 0), ["dim", "0"]),
    "Posterior: no encoder": (of(vae.Posterior, "mlp", 2), ["encoder", "'mlp'"]),
    "Encoder: a seed": (of(vae.Encoder, lambda x: x, 4, 2, key=0), ["key"]),
    "Encoder: no features": (of(vae.Encoder, lambda x: x, 0, 2, key=KEY), ["features"]),
}
