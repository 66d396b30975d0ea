"""Hostile data for what runs on the host: measurements, tables, toys, images; as `bad_calls`."""

from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
from bad_calls import FLOW, GIVEN, KEY, LEGACY, NAN, NAN_ROWS, ROWS, WIDE, X, of

from jcnf import Hutchinson, evaluate, plot
from jcnf.data import classes, energies, images, noise, series, tables, toys
from jcnf.data.tables import Standardizer
from jcnf.evaluate import ood
from jcnf.flows import distrax as distrax_form
from jcnf.flows import vae
from jcnf.inference.gaussian import Gaussian
from jcnf.inference.impute import impute, predictive
from jcnf.training import checkpoint

GAUSSIAN = Gaussian.fit(ROWS)
HOLES = np.where(np.arange(40).reshape(20, 2) % 3 == 0, np.nan, ROWS)
DRAWS = np.repeat(np.nan_to_num(HOLES)[None], 4, axis=0)
INFINITE = np.where(np.arange(20)[:, None] == 4, np.inf, ROWS)
SCALE = Standardizer(np.zeros(2), np.ones(2), ("a", "b"))
MODEL = vae.VAE(
    vae.Posterior(vae.Encoder(lambda x: x, 4, 2, key=KEY), 2), lambda z: z, vae.Binomial(1)
)
PIXELS = np.zeros((3, 4), np.uint8)
RNG = np.random.default_rng(0)
NORMAL = FLOW.base
TIMES = np.linspace(0, 1, 4)
PATHS = np.zeros((4, 5, 2))
SCENE = plot.Scene(ROWS)
GRID = np.zeros((4, 4))
MOONS = toys.toy("moons")


def iwae(k):
    scores = np.zeros((3, 4))
    return lambda: evaluate.Bounds(scores, scores, np.zeros((3, 2)), 1.0, np.zeros(3, bool)).iwae(k)


MEASURES = {
    "evaluate.log_prob: NaN": (of(evaluate.log_prob, FLOW, NAN), ["x has NaN or inf", "first: 1"]),
    "evaluate.log_prob: infinity": (
        of(evaluate.log_prob, FLOW, X.at[2, 1].set(jnp.inf)),
        ["x has NaN or inf", "first: 2"],
    ),
    "evaluate.log_prob: NaN in the context": (
        of(evaluate.log_prob, GIVEN, X, context=jnp.ones((3, 3)).at[0, 0].set(jnp.nan)),
        ["context has NaN or inf", "first: 0"],
    ),
    "evaluate.log_prob: no batch": (of(evaluate.log_prob, FLOW, X[0]), ["x[None]"]),
    "evaluate.log_prob: chunk 0": (of(evaluate.log_prob, FLOW, X, chunk=0), ["chunk"]),
    "evaluate.log_prob: chunk 2.5": (of(evaluate.log_prob, FLOW, X, chunk=2.5), ["chunk", "2.5"]),
    "evaluate.log_prob: no key": (
        of(evaluate.log_prob, FLOW, X, divergence=Hutchinson()),
        ["key=jax.random"],
    ),
    "evaluate.log_prob: a legacy key": (
        of(evaluate.log_prob, FLOW, X, key=LEGACY, divergence=Hutchinson()),
        ["typed key"],
    ),
    "evaluate.log_prob: a name of a solve": (
        of(evaluate.log_prob, FLOW, X, solve="dopri5"),
        ["solve", "Solve"],
    ),
    "evaluate.log_prob: a class of divergences": (
        of(evaluate.log_prob, FLOW, X, divergence=Hutchinson),
        ["divergence", "Hutchinson"],
    ),
    "evaluate.log_prob: strings": (
        of(evaluate.log_prob, FLOW, np.array([["a", "b"]])),
        ["numbers"],
    ),
    "evaluate.log_prob: a field": (
        of(evaluate.log_prob, FLOW.bijection, X),
        ["flow", "CNF(field, base)"],
    ),
    "evaluate.transform: NaN": (
        of(evaluate.transform, FLOW, NAN, "to_base"),
        ["x has NaN or inf", "first: 1"],
    ),
    "evaluate.transform: sideways": (of(evaluate.transform, FLOW, X, "up"), ["'up'", "to_base"]),
    "evaluate.transform: no solve": (
        of(evaluate.transform, FLOW, X, "to_base", solve=None),
        ["solve", "None"],
    ),
    "draw: none": (of(evaluate.sample, FLOW, KEY, 0), ["num_samples"]),
    "draw: a seed": (of(evaluate.sample, FLOW, 1, 3), ["typed key"]),
    "transport: NaN": (of(evaluate.trajectory, FLOW, NAN, TIMES), ["x has NaN or inf", "first: 1"]),
    "transport: NaN in times": (
        of(evaluate.trajectory, FLOW, X, np.array([0.0, np.nan, 1.0])),
        ["times has NaN or inf", "first: 1"],
    ),
    "transport: times back": (
        of(evaluate.trajectory, FLOW, X, np.array([0.0, 1.0, 0.5])),
        ["strictly increase"],
    ),
    "roundtrip_error: NaN": (
        of(evaluate.roundtrip_error, FLOW, NAN),
        ["x has NaN or inf", "first: 1"],
    ),
    "accuracy_report: NaN": (
        of(evaluate.accuracy_report, FLOW, NAN),
        ["x has NaN or inf", "first: 1"],
    ),
    "accuracy_report: one draw": (
        of(evaluate.accuracy_report, FLOW, X, key=KEY, divergence=Hutchinson(), draws=1),
        ["draws", "2"],
    ),
    "accuracy_report: no reference": (
        of(evaluate.accuracy_report, FLOW, X, reference_points=-1),
        ["reference_points"],
    ),
    "accuracy_report: cells 0": (of(evaluate.accuracy_report, FLOW, X, cells=0), ["cells"]),
    "accuracy_report: extent reversed": (
        of(evaluate.accuracy_report, FLOW, X, extent=(1.0, -1.0, 0.0, 1.0)),
        ["extent", "increase"],
    ),
    "grid: extent of a line": (of(evaluate.grid, FLOW, (0.0, 1.0)), ["2 values for 2"]),
    "grid: extent of NaN": (of(evaluate.grid, FLOW, (0.0, 1.0, 0.0, np.nan)), ["extent"]),
    "grid: no cells": (of(evaluate.grid, FLOW, (0.0, 1.0, 0.0, 1.0), 0), ["cell"]),
    "grid: cells and a half": (
        of(evaluate.grid, FLOW, (0.0, 1.0, 0.0, 1.0), 2.5),
        ["cells", "2.5"],
    ),
    "grid: a number": (of(evaluate.grid, FLOW, 4.0), ["extent", "4.0"]),
    "grid_of: three dimensions": (of(evaluate.grid_of, len, (0.0, 1.0) * 3), ["1 or 2"]),
    "cell_centers: none": (of(evaluate.cell_centers, (0.0, 1.0), 0), ["n", "0"]),
    "gaussian_nll: NaN to fit": (
        of(evaluate.gaussian_nll, NAN_ROWS, ROWS),
        ["train has NaN or inf", "first: 4"],
    ),
    "gaussian_nll: NaN to score": (
        of(evaluate.gaussian_nll, ROWS, NAN_ROWS),
        ["test has NaN or inf", "first: 4"],
    ),
    "gaussian_nll: other columns": (
        of(evaluate.gaussian_nll, ROWS, np.ones((3, 4))),
        ["(20, 2)", "(3, 4)"],
    ),
    "gaussian_nll: nothing": (of(evaluate.gaussian_nll, ROWS[:0], ROWS), ["(0, 2)"]),
    "mmd: NaN": (of(evaluate.mmd, NAN_ROWS, ROWS), ["x has NaN or inf", "first: 4"]),
    "mmd: infinity": (of(evaluate.mmd, ROWS, INFINITE), ["y has NaN or inf", "first: 4"]),
    "mmd: one point": (of(evaluate.mmd, ROWS[:1], ROWS), ["at least 2"]),
    "mmd: other dimensions": (of(evaluate.mmd, ROWS, ROWS[:, :1]), ["(20, 1)"]),
    "auroc: NaN": (of(evaluate.auroc, NAN_ROWS[:, 0], ROWS[:, 0]), ["inside", "NaN"]),
    "auroc: none": (of(evaluate.auroc, ROWS[:, 0], ROWS[:0, 0]), ["outside", "(0,)"]),
    "auroc: a list": (of(evaluate.auroc, [], [1.0]), ["inside"]),
    "typicality: NaN": (of(ood.typicality, ROWS[:, 0], NAN_ROWS[:, 0]), ["NaN"]),
    "typicality: none": (of(ood.typicality, ROWS[:, 0], ROWS[:0, 0]), ["without NaN"]),
    "complexity: other points": (
        of(ood.complexity, np.ones(3), np.ones(2), 4, 256),
        ["(3,)", "(2,)"],
    ),
    "complexity: dim 0": (of(ood.complexity, np.ones(3), np.ones(3), 0, 256), ["dim"]),
    "ratio: other points": (of(ood.ratio, np.ones(3), np.ones(2)), ["(3,)", "(2,)"]),
    "code_length: floats": (of(evaluate.code_length, X, (2, 2, 1), 256), ["uint8"]),
    "code_length: another shape": (of(evaluate.code_length, PIXELS, (3, 2, 1), 256), ["(3, 2, 1)"]),
    "code_length: levels 300": (of(evaluate.code_length, PIXELS, (2, 2, 1), 300), ["256"]),
    "code_length: levels 0": (of(evaluate.code_length, PIXELS[:0], (2, 2, 1), 0), ["levels"]),
    "marginal_log_prob: NaN": (
        of(evaluate.marginal_log_prob, WIDE, NAN, KEY),
        ["x has NaN or inf", "first: 1"],
    ),
    "marginal_log_prob: no samples": (
        of(evaluate.marginal_log_prob, WIDE, X, KEY, samples=0),
        ["samples"],
    ),
    "marginal_log_prob: a seed": (of(evaluate.marginal_log_prob, WIDE, X, 0), ["typed key"]),
    "marginal_log_prob: too wide": (
        of(evaluate.marginal_log_prob, FLOW, jnp.ones((3, 4)), KEY),
        ["at most 2"],
    ),
    "bounds: no model": (of(evaluate.bounds, FLOW, X, KEY), ["VAE"]),
    "bounds: no samples": (of(evaluate.bounds, MODEL, X, KEY, samples=0), ["samples"]),
    "bounds: NaN": (of(evaluate.bounds, MODEL, NAN, KEY), ["x has NaN or inf", "first: 1"]),
    "bounds: whole numbers": (of(evaluate.bounds, MODEL, jnp.ones((3, 2), int), KEY), ["floating"]),
    "iwae: more than there are": (iwae(5), ["number of samples, 4"]),
    "iwae: 1.5": (iwae(1.5), ["k", "1.5"]),
    "audit_gradients: NaN": (
        of(evaluate.audit_gradients, FLOW, NAN),
        ["x has NaN or inf", "first: 1"],
    ),
    "audit_gradients: no batch": (of(evaluate.audit_gradients, FLOW, X[0]), ["x[None]"]),
    "loss_gradient: NaN": (of(evaluate.loss_gradient, FLOW, NAN), ["x has NaN or inf", "first: 1"]),
    "relative_error: other sizes": (
        of(evaluate.relative_error, np.ones(3), np.ones(2)),
        ["(3,)", "(2,)"],
    ),
    "Gaussian: NaN": (of(Gaussian.fit, NAN_ROWS), ["rows has NaN or inf", "first: 4"]),
    "Gaussian: one row": (of(Gaussian.fit, ROWS[:1]), ["rows", "(1, 2)"]),
    "Gaussian: a vector": (of(Gaussian.fit, ROWS[0]), ["rows", "(2,)"]),
    "Gaussian: given other columns": (of(GAUSSIAN.given, np.ones((2, 3))), ["(2, 3)"]),
    "Gaussian: given infinity": (of(GAUSSIAN.given, INFINITE), ["row 4", "infinite"]),
    "Gaussian: singular": (
        of(Gaussian(np.zeros(2), np.ones((2, 2))).given, np.array([[np.nan, np.nan]])),
        ["singular"],
    ),
    "Conditional: no draws": (lambda: GAUSSIAN.given(HOLES).draw(KEY, 0), ["samples"]),
    "Conditional: a seed": (lambda: GAUSSIAN.given(HOLES).draw(0, 3), ["typed key"]),
    "impute: infinity": (of(impute, FLOW, INFINITE, GAUSSIAN, KEY), ["finite or NaN"]),
    "impute: other columns": (of(impute, FLOW, np.ones((2, 3)), GAUSSIAN, KEY), ["dimension 3"]),
    "impute: whole numbers": (of(impute, FLOW, np.ones((2, 2), int), GAUSSIAN, KEY), ["floating"]),
    "impute: a Gaussian of NaN": (
        of(impute, FLOW, HOLES, Gaussian(np.zeros(2), np.full((2, 2), np.nan)), KEY),
        ["finite Gaussian"],
    ),
    "impute: a legacy key": (of(impute, FLOW, HOLES, GAUSSIAN, LEGACY), ["typed key"]),
    "impute: no draws": (of(impute, FLOW, HOLES, GAUSSIAN, KEY, draws=0), ["draws"]),
    "impute: no candidates": (of(impute, FLOW, HOLES, GAUSSIAN, KEY, candidates=0), ["candidates"]),
    "impute: chunk 0": (of(impute, FLOW, HOLES, GAUSSIAN, KEY, chunk=0), ["chunk"]),
    "impute: more draws than steps": (
        of(impute, FLOW, HOLES, GAUSSIAN, KEY, draws=5, steps=4),
        ["draws", "steps"],
    ),
    "impute: a flow of another dim": (of(impute, WIDE, HOLES, GAUSSIAN, KEY), ["(batch, 3)"]),
    "impute: no rows": (of(impute, FLOW, HOLES[:0], GAUSSIAN, KEY), ["(0, 2)"]),
    "predictive: truth of NaN": (
        of(predictive, FLOW, NAN_ROWS, HOLES, DRAWS, GAUSSIAN, KEY),
        ["truth has NaN or inf", "first: 4"],
    ),
    "predictive: other rows": (
        of(predictive, FLOW, ROWS[:3], HOLES, DRAWS, GAUSSIAN, KEY),
        ["(20, 2)", "(3, 2)"],
    ),
    "predictive: one sample": (
        of(predictive, FLOW, ROWS, HOLES, DRAWS, GAUSSIAN, KEY, samples=1),
        ["samples"],
    ),
    "predictive: no key": (
        of(predictive, FLOW, ROWS, HOLES, DRAWS, GAUSSIAN, None),
        ["typed key"],
    ),
    "FlowDistribution: a noisy divergence": (
        of(distrax_form.FlowDistribution, FLOW, divergence=Hutchinson()),
        ["draws noise"],
    ),
    "FlowDistribution: no context": (of(distrax_form.FlowDistribution, GIVEN), ["context"]),
    "FlowDistribution: a field": (
        of(distrax_form.FlowDistribution, FLOW.bijection),
        ["flow", "CNF"],
    ),
    "FlowDistribution: a solve's name": (
        of(distrax_form.FlowDistribution, FLOW, solve="dopri5"),
        ["solve"],
    ),
    "FlowBijector: events of another size": (
        lambda: distrax_form.FlowBijector(FLOW).forward(jnp.ones((4, 3))),
        ["(..., 2)", "(4, 3)"],
    ),
    "FlowBijector: whole numbers": (
        lambda: distrax_form.FlowBijector(FLOW).inverse(jnp.ones((4, 2), int)),
        ["floating"],
    ),
    "checkpoint: missing": (of(checkpoint.load, Path("/nowhere/x.jcnf"), FLOW), ["/nowhere"]),
    "checkpoint: notes of none": (of(checkpoint.read_notes, Path("/nowhere/x")), ["/nowhere"]),
}

DATA = {
    "toy: unknown": (of(toys.toy, "moon"), ["'moon'", "did you mean 'moons'"]),
    "toy: None": (of(toys.toy, None), ["None", "moons"]),
    "toy: one point": (of(MOONS.log_prob, jnp.ones(2)), ["x[None]"]),
    "toy: whole numbers": (of(MOONS.log_prob, jnp.ones((3, 2), int)), ["floating"]),
    "toy: no samples": (of(MOONS.sample, KEY, 0), ["num_samples"]),
    "toy: 2.5 samples": (of(MOONS.sample, KEY, 2.5), ["num_samples", "2.5"]),
    "toy: a seed": (of(MOONS.sample, 0, 3), ["typed key"]),
    "classes: a seed": (of(classes.sample, 0, jnp.zeros(3, int)), ["typed key"]),
    "classes: floats": (of(classes.sample, KEY, jnp.zeros(3)), ["integer labels"]),
    "classes: one point": (of(classes.log_prob, jnp.ones(2), jnp.zeros(1, int)), ["(batch, 2)"]),
    "energy: unknown": (of(energies.energy, "u5"), ["'u5'", "module:function"]),
    "energy: extent of u1": (of(energies.energy, "u1", (0, 1, 0, 1)), ["its own extent"]),
    "energy: no module": (of(energies.energy, "nowhere:u", (0, 1, 0, 1)), ["no module 'nowhere'"]),
    "energy: extent reversed": (of(energies.energy, "math:sin", (1, 0, 0, 1)), ["increase"]),
    "energy: of one number": (of(energies.energy, "math:sin", (0, 1, 0, 1)), ["math:sin failed"]),
    "energy: no number": (of(energies.energy, 3), ["3", "u1"]),
    "integrate: no cells": (of(energies.integrate, energies.energy("u1"), 0), ["cells"]),
    "cell_grid: 1.5": (of(energies.cell_grid, (0, 1, 0, 1), 1.5), ["cells", "1.5"]),
    "load_table: missing": (of(tables.load_table, "/nowhere/t.csv"), ["/nowhere/t.csv"]),
    "load_table: a folder": (of(tables.load_table, "/"), ["/"]),
    "load_table: no path": (of(tables.load_table, None), ["path", "None"]),
    "load_table: a form": (of(tables.load_table, __file__), [".csv"]),
    "read_rows: missing": (of(tables.read_rows, "/nowhere/t.npy", ("a",)), ["/nowhere/t.npy"]),
    "Standardizer: one row": (of(SCALE.standardize, ROWS[0]), ["(rows, 2)", "(2,)"]),
    "Standardizer: other columns": (of(SCALE.standardize, np.ones((3, 4))), ["a, b", "(3, 4)"]),
    "Standardizer: NaN": (of(SCALE.standardize, NAN_ROWS), ["row 5", "column a"]),
    "Standardizer: infinity": (of(SCALE.standardize, INFINITE), ["row 5", "column a"]),
    "Standardizer: too large": (of(SCALE.standardize, ROWS * 1e300), ["row 1", "too large"]),
    "Standardizer: strings": (of(SCALE.standardize, [["a", "b"]]), ["numbers"]),
    "Standardizer: std 0": (of(Standardizer, np.zeros(2), np.zeros(2), ("a", "b")), ["std", "a"]),
    "Standardizer: NaN std": (
        of(Standardizer, np.zeros(2), np.array([1.0, np.nan]), ("a", "b")),
        ["std", "b"],
    ),
    "Standardizer: other names": (of(Standardizer, np.zeros(2), np.ones(2), ("a",)), ["columns"]),
    "Standardizer: unknown column": (of(SCALE.positions, ["q"]), ["no column q"]),
    "Standardizer: twice": (of(SCALE.positions, ["a", 1]), ["twice"]),
    "spiral: unknown": (of(series.spiral, "round"), ["round", "linear"]),
    "spiral: two points": (of(series.spiral, "linear", points=2), ["points"]),
    "spiral: noise NaN": (of(series.spiral, "linear", noise=np.nan), ["noise"]),
    "spiral: noise -1": (of(series.spiral, "linear", noise=-1.0), ["noise"]),
    "load_series: missing": (of(series.load_series, "/nowhere/t.csv"), ["/nowhere/t.csv"]),
    "load_images: unknown": (of(images.load_images, "mnits"), ["mnits", "mnist"]),
    "load_images: digits of a file": (of(images.load_images, "digits", "x.npz"), ["x.npz"]),
    "load_images: missing": (of(images.load_images, "mnist", "/nowhere.npz"), ["/nowhere.npz"]),
    "read_images: missing": (of(images.read_images, "/nowhere.npz"), ["/nowhere.npz"]),
    "read_picture: missing": (of(images.read_picture, "/nowhere.png"), ["/nowhere.png"]),
    "picture: side 1": (
        of(images.picture, SimpleNamespace(size=(2, 2)), "p", side=1),
        ["side", "2"],
    ),
    "picture: text": (of(images.picture, "cat.png", "p"), ["Pillow"]),
    "piecewise_constant: negative": (
        of(images.piecewise_constant, np.array([[1, -1]]), "p"),
        ["levels"],
    ),
    "piecewise_constant: nothing": (
        of(images.piecewise_constant, np.zeros((2, 2), int), "p"),
        ["levels"],
    ),
    "uniform_noise: levels 0": (of(noise.uniform_noise, RNG, 3, 4, 0), ["levels"]),
    "uniform_noise: levels 300": (of(noise.uniform_noise, RNG, 3, 4, 300), ["levels", "256"]),
    "uniform_noise: n -1": (of(noise.uniform_noise, RNG, -1, 4, 2), ["n"]),
    "densities: one point": (of(plot.densities, ROWS[0], ROWS, GRID, 2.0), ["data", "(batch, 2)"]),
    "densities: extent reversed": (
        of(plot.densities, ROWS, ROWS, GRID, (1, -1, 0, 1)),
        ["extent"],
    ),
    "densities: extent NaN": (of(plot.densities, ROWS, ROWS, GRID, np.nan), ["extent"]),
    "densities: a line": (of(plot.densities, ROWS, ROWS, GRID[0], 2.0), ["log_density"]),
    "densities: strings": (of(plot.densities, [["a", "b"]], ROWS, GRID, 2.0), ["data", "numbers"]),
    "densities: nats 0": (of(plot.densities, ROWS, ROWS, GRID, 2.0, nats=0.0), ["nats"]),
    "trajectories: times of others": (of(plot.trajectories, PATHS, TIMES[:2]), ["times"]),
    "trajectories: NaN in times": (of(plot.trajectories, PATHS, TIMES * np.nan), ["finite times"]),
    "snapshots: three dimensions": (of(plot.snapshots, np.zeros((4, 5, 3)), TIMES), ["paths"]),
    "animation: fps 0": (of(plot.animation, "x.gif", PATHS, TIMES, fps=0), ["fps"]),
    "training_curves: nothing": (of(plot.training_curves, []), ["no curve"]),
    "training_curves: no step": (of(plot.training_curves, [{"loss": 1.0}]), ["step"]),
    "pairs: one column": (of(plot.pairs, ROWS[:, :1], ROWS[:, :1], ["a"]), ["two columns"]),
    "pairs: other names": (of(plot.pairs, ROWS, ROWS, ["a", "b", "c"]), ["(batch, 3)"]),
    "histogram: a density without grid": (
        of(plot.histogram, ROWS[:, 0], ROWS[:, 0], density=ROWS[:, 0]),
        ["grid and density"],
    ),
    "histogram: a table": (of(plot.histogram, ROWS, ROWS[:, 0]), ["data", "(batch,)"]),
    "gallery: no groups": (of(plot.gallery, [], (2, 2, 1)), ["groups"]),
    "gallery: columns 0": (of(plot.gallery, [("a", X)], (2, 1, 1), 0), ["columns"]),
    "gallery: another shape": (of(plot.gallery, [("a", X)], (2, 2, 1)), ["(2, 2, 1)"]),
    "separation: nothing": (of(plot.score_histograms, []), ["panel"]),
    "separation: no sets": (
        of(plot.score_histograms, [plot.HistogramPanel("nats", {})]),
        ["set"],
    ),
    "scaling: nothing": (of(plot.scaling, []), ["panel"]),
    "exponent: one point": (of(plot.scaling_exponent, [1.0], [2.0]), ["2 points"]),
    "exponent: zero": (of(plot.scaling_exponent, [1.0, 2.0], [0.0, 1.0]), ["positive"]),
    "exponent: other sizes": (of(plot.scaling_exponent, [1.0, 2.0], [1.0]), ["(2,)", "(1,)"]),
    "posteriors: other names": (
        of(plot.posteriors, X, (2, 1, 1), np.zeros((3, 1, 2, 2)), ["a", "b"], [2.0] * 3),
        ["name"],
    ),
    "learning: titles of others": (of(plot.learning, PATHS, ["a"], SCENE), ["title"]),
    "against_time: other columns": (
        of(plot.against_time, TIMES, np.zeros((4, 2)), TIMES, np.zeros((4, 2)), ["t"]),
        ["name"],
    ),
    "film: fps -1": (of(plot.film, "x.gif", PATHS, ["a"] * 4, SCENE, fps=-1), ["fps"]),
    "by_class: no clouds": (of(plot.scatter_by_class, [], 1.0), ["cloud"]),
    "by_class: half 0": (of(plot.scatter_by_class, [("a", ROWS, np.zeros(20))], 0.0), ["half"]),
    "by_class: classes of others": (of(plot.scatter_by_class, [("a", ROWS, [1])], 1.0), ["(20,)"]),
    "against_truth: none": (of(plot.scatter_against_truth, ROWS[:, 0], {}), ["estimate"]),
    "against_truth: others": (
        of(plot.scatter_against_truth, ROWS[:, 0], {"a": ROWS[:3, 0]}),
        ["(20,)", "(3,)"],
    ),
}
