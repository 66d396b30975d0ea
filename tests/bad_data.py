"""Bad values of the arguments of measurements, data sets and figures; see `bad_calls`."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
from bad_calls import (
    COUNTS,
    DIVERGENCES,
    FIELD,
    FLOW,
    FLOWS,
    GIVEN,
    KEY,
    KEYS,
    NAN,
    NUMBERS,
    ONES,
    ROWS,
    SOLVES,
    TIMES,
    WIDE,
    X,
    refuses,
)

from jcnf import Hutchinson, evaluate, plot
from jcnf.data import energies, images, labeled_moons, series, tables, toys
from jcnf.data.images import noise
from jcnf.data.tables import Standardizer
from jcnf.evaluate import ood
from jcnf.flows import distrax as distrax_form
from jcnf.flows import vae
from jcnf.inference.gaussian import Gaussian
from jcnf.inference.impute import impute, predictive
from jcnf.training import checkpoint

NAN_ROWS = np.where(np.arange(20)[:, None] == 4, np.nan, ROWS)
INFINITE = np.where(np.isnan(NAN_ROWS), np.inf, ROWS)
HOLES = np.where(np.arange(40).reshape(20, 2) % 3 == 0, np.nan, ROWS)
COLUMN, TIME, GRID = ROWS[:, 0], np.linspace(0, 1, 4), np.zeros((4, 4))
GONE = "/nowhere/table.csv"

# Measurements

flow = {"flow": FLOW, "x": X}
point = [NAN, X.at[2, 1].set(jnp.inf), X[0]]
context = jnp.ones((3, 3)).at[0, 0].set(jnp.nan)
noisy = flow | {"divergence": Hutchinson()}
refuses(evaluate.log_prob, flow, flow=FLOWS, x=[*point, np.array([["a", "b"]])], chunk=NUMBERS)
refuses(evaluate.log_prob, flow, solve=SOLVES, divergence=[*DIVERGENCES, Hutchinson])
refuses(evaluate.log_prob, {"flow": GIVEN, "x": X}, context=[context])
refuses(evaluate.log_prob, noisy, key=KEYS)
refuses(evaluate.transform, flow | {"direction": "to_base"}, x=[NAN], solve=SOLVES)
refuses(evaluate.transform, flow, direction=["up"])
refuses(evaluate.sample, {"flow": FLOW, "key": KEY, "num_samples": 3}, key=KEYS, num_samples=COUNTS)
refuses(evaluate.trajectory, flow | {"times": TIME}, x=[NAN], times=TIMES)
refuses(evaluate.roundtrip_error, {"flow": FLOW}, x=[NAN])
refuses(evaluate.accuracy_report, flow, x=[NAN], reference_points=[-1], cells=[0])
refuses(evaluate.accuracy_report, flow, extent=[(1.0, -1.0, 0.0, 1.0)])
refuses(evaluate.accuracy_report, noisy | {"key": KEY}, draws=[1])
square = {"flow": FLOW, "extent": (0.0, 1.0, 0.0, 1.0)}
refuses(evaluate.grid, square, extent=[(0.0, 1.0), (0.0, 1.0, 0.0, np.nan), 4.0])
refuses(evaluate.grid, square, says={"n": "cells"}, n=[0, 2.5])
refuses(evaluate.grid_of, {"scores": len}, extent=[(0.0, 1.0) * 3])
refuses(evaluate.cell_centers, {"interval": (0.0, 1.0)}, n=[0])
gauss = {"train": ROWS, "test": ROWS}
refuses(evaluate.gaussian_nll, gauss, train=[NAN_ROWS, ROWS[:0]], test=[NAN_ROWS, np.ones((3, 4))])
refuses(evaluate.mmd, {"x": ROWS, "y": ROWS}, x=[NAN_ROWS], y=[INFINITE])
one = {"x": "sample", "y": "sample"}
refuses(evaluate.mmd, {"x": ROWS, "y": ROWS}, one, x=[ROWS[:1]], y=[ROWS[:, :1]])
refuses(evaluate.auroc, {"outside": COLUMN}, inside=[NAN_ROWS[:, 0], []])
refuses(evaluate.auroc, {"inside": COLUMN}, outside=[COLUMN[:0]])
refuses(ood.typicality, {"log_prob": COLUMN}, reference=[NAN_ROWS[:, 0], COLUMN[:0]])
bits = {"log_prob": np.ones(3), "code_length": np.ones(3), "dim": 4, "levels": 256}
refuses(ood.complexity, bits, {"code_length": "each point"}, code_length=[np.ones(2)], dim=[0])
refuses(ood.ratio, {"log_prob": np.ones(3)}, {"background": "each point"}, background=[np.ones(2)])
code = {"pixels": np.zeros((3, 4), np.uint8), "shape": (2, 2, 1), "levels": 256}
refuses(evaluate.code_length, code, pixels=[X], shape=[(3, 2, 1)], levels=[300, 0])
wide = {"flow": WIDE, "x": X, "key": KEY}
refuses(evaluate.marginal_log_prob, wide, x=[NAN, ONES[4]], key=KEYS, samples=COUNTS, solve=SOLVES)
posterior = vae.Posterior(vae.Encoder(lambda x: x, 4, 2, key=KEY), 2)
model = {"model": vae.VAE(posterior, lambda z: z, vae.Binomial(1)), "x": X, "key": KEY}
refuses(evaluate.elbo, model, model=[FLOW], x=[NAN, jnp.ones((3, 2), int)], samples=COUNTS)
scores = np.zeros((3, 4))
bounds = evaluate.ELBOSamples(scores, scores, np.zeros((3, 2)), 1.0, np.zeros(3, bool))
refuses(bounds.iwae, k=[5, 1.5])
refuses(evaluate.audit_gradients, {"flow": FLOW}, x=[NAN, X[0]])
refuses(evaluate.loss_gradient, {"flow": FLOW}, x=[NAN])
refuses(evaluate.relative_error, {"reference": np.ones(3)}, gradient=[np.ones(2)])

# Inference

gaussian = Gaussian.fit(ROWS)
refuses(Gaussian.fit, rows=[NAN_ROWS, ROWS[:1], ROWS[0]])
refuses(gaussian.given, x=[np.ones((2, 3)), INFINITE])
refuses(Gaussian(np.zeros(2), np.ones((2, 2))).given, says={"x": "singular"}, x=[NAN])
refuses(gaussian.given(HOLES).sample, {"key": KEY, "samples": 3}, samples=COUNTS, key=KEYS)
holes = {"flow": FLOW, "x": HOLES, "gaussian": gaussian, "key": KEY}
bad_gaussian = Gaussian(np.zeros(2), np.full((2, 2), np.nan))
refuses(impute, holes, x=[INFINITE, np.ones((2, 2), int), HOLES[:0]], key=KEYS)
refuses(impute, holes, draws=COUNTS, candidates=[0], chunk=[0])
refuses(impute, holes, {"x": "dimension 3", "flow": "x"}, x=[np.ones((2, 3))], flow=[WIDE])
refuses(impute, holes | {"steps": 4}, draws=[5])
refuses(impute, holes, says={"gaussian": "Gaussian"}, gaussian=[bad_gaussian])
draws = np.repeat(np.nan_to_num(HOLES)[None], 4, axis=0)
predicted = holes | {"truth": ROWS, "draws": draws}
refuses(predictive, predicted, truth=[NAN_ROWS, ROWS[:3]], samples=[1], key=KEYS)
refuses(distrax_form.FlowDistribution, {"flow": FLOW}, divergence=[Hutchinson()], solve=SOLVES)
refuses(distrax_form.FlowDistribution, flow=[FIELD, GIVEN], says={"flow": "flow|context"})
bijector, events = distrax_form.FlowBijector(FLOW), [ONES[3], jnp.ones((4, 2), int)]
refuses(bijector.forward, says={"x": "x|events"}, x=events)
refuses(bijector.inverse, says={"y": "x|events"}, y=events)
refuses(checkpoint.load, {"like": FLOW}, says={"path": GONE}, path=[GONE])
refuses(checkpoint.read_notes, says={"path": GONE}, path=[GONE])

# Data

moons = toys.toy("moons")
refuses(toys.toy, says={"name": "'moons'|moons"}, name=["moon", None])
refuses(moons.log_prob, x=[X[0], jnp.ones((3, 2), int)])
refuses(moons.sample, {"key": KEY, "num_samples": 3}, num_samples=COUNTS, key=KEYS)
refuses(
    labeled_moons.sample, {"key": KEY, "labels": jnp.zeros(3, int)}, key=KEYS, labels=[jnp.zeros(3)]
)
refuses(labeled_moons.log_prob, {"labels": jnp.zeros(1, int)}, x=[X[0]])
box = (0, 1, 0, 1)
refuses(energies.energy, {"extent": None}, says={"name": "u5|u1"}, name=["u5", 3])
refuses(
    energies.energy,
    {"extent": box},
    says={"name": "nowhere|math:sin"},
    name=["nowhere:u", "math:sin"],
)
refuses(energies.energy, {"name": "u1"}, extent=[box])
refuses(energies.energy, {"name": "math:sin"}, says={"extent": "increase"}, extent=[(1, 0, 0, 1)])
refuses(energies.integrate, {"energy": energies.energy("u1")}, cells=[0])
refuses(energies.cell_grid, {"extent": box}, cells=[1.5])
refuses(tables.load_table, says={"path": "/|path"}, path=[GONE, "/", None, __file__])
refuses(tables.read_rows, {"columns": ("a",)}, says={"path": GONE}, path=[GONE])
scale = {"mean": np.zeros(2), "std": np.ones(2), "columns": ("a", "b")}
rows = [ROWS[0], np.ones((3, 4)), [["a", "b"]]]
refuses(Standardizer(**scale).standardize, rows=rows)
refuses(
    Standardizer(**scale).standardize,
    says={"rows": "column a"},
    rows=[NAN_ROWS, INFINITE, ROWS * 1e300],
)
refuses(Standardizer(**scale).unstandardize, rows=rows)
refuses(Standardizer, scale, std=[np.zeros(2), np.array([1.0, np.nan])], columns=[("a",)])
refuses(Standardizer(**scale).positions, says={"wanted": "q|twice"}, wanted=[["q"], ["a", 1]])
refuses(series.spiral, {"name": "linear"}, says={"name": "linear"}, name=["round"])
refuses(series.spiral, {"name": "linear"}, points=[2], noise=[np.nan, -1.0])
refuses(series.load_series, says={"path": GONE}, path=[GONE])
refuses(images.load_images, says={"name": "mnist"}, name=["mnits"])
refuses(images.load_images, {"name": "digits"}, path=["x.npz"])
refuses(images.load_images, {"name": "mnist"}, says={"path": GONE}, path=[GONE])
refuses(images.read_images, says={"path": GONE}, path=[GONE])
refuses(images.read_image_file, says={"path": GONE}, path=[GONE])
refuses(images.image_density, {"name": "p"}, image=["cat.png"])
refuses(images.image_density, {"name": "p", "image": SimpleNamespace(size=(2, 2))}, side=[1])
refuses(
    images.piecewise_constant, {"name": "p"}, levels=[np.array([[1, -1]]), np.zeros((2, 2), int)]
)
gray = {"rng": np.random.default_rng(0), "n": 3, "dim": 4, "levels": 2}
refuses(noise.uniform_noise, gray, levels=[0, 300], n=[-1])

# Figures

density = {"data": ROWS, "samples": ROWS, "log_density": GRID, "extent": 2.0}
refuses(plot.densities, density, data=[ROWS[0], [["a", "b"]]], log_density=[GRID[0]], nats=[0.0])
refuses(plot.densities, density, extent=[(1, -1, 0, 1), np.nan])
ball = {"data": np.eye(3), "samples": np.eye(3), "log_density": GRID}
refuses(plot.globe, ball, data=[ROWS], samples=[ROWS[0]], log_density=[GRID[0]], nats=[0.0])
refuses(plot.world_map, ball, says={"center": "latitude|longitude"}, center=[(91, 0), (0, np.nan)])
moving = {"paths": np.zeros((4, 5, 2)), "times": TIME}
refuses(plot.trajectories, moving, times=[TIME[:2], TIME * np.nan])
refuses(plot.snapshots, moving, paths=[np.zeros((4, 5, 3))])
refuses(plot.animation, moving | {"path": "x.gif"}, fps=[0])
refuses(plot.training_curves, says={"records": "curve|step"}, records=[[], [{"loss": 1.0}]])
refuses(
    plot.pairs, {"data": ROWS, "samples": ROWS}, says={"columns": "batch"}, columns=[list("abc")]
)
one = {"data": ROWS[:, :1], "samples": ROWS[:, :1]}
refuses(plot.pairs, one, columns=[["a"]])
refuses(plot.histogram, {"data": COLUMN, "samples": COLUMN}, density=[COLUMN])
refuses(plot.histogram, {"samples": COLUMN}, data=[ROWS])
refuses(plot.image_grid, {"groups": [("a", X)], "shape": (2, 1, 1)}, groups=[[]], columns=[0])
refuses(plot.image_grid, {"groups": [("a", X)]}, says={"shape": "2, 2, 1"}, shape=[(2, 2, 1)])
refuses(
    plot.score_histograms,
    says={"panels": "panel|set"},
    panels=[[], [plot.HistogramPanel("nats", {})]],
)
refuses(plot.scaling, panels=[[]])
refuses(
    plot.scaling_exponent,
    {"x": [1.0, 2.0]},
    says={"y": "positive|2"},
    y=[[0.0, 1.0], [1.0]],
)
refuses(plot.scaling_exponent, {"y": [2.0]}, says={"x": "points"}, x=[[1.0]])
panel = {"images": X, "shape": (2, 1, 1), "log_densities": np.zeros((3, 1, 2, 2))}
refuses(plot.posteriors, panel | {"views": [2.0] * 3}, names=[["a", "b"]])
film = {"curves": np.zeros((4, 5, 2)), "titles": ["a"] * 4, "scene": plot.Scene(ROWS)}
refuses(plot.learning, film, titles=[["a"]])
refuses(plot.learning_animation, film | {"path": "x.gif"}, fps=[-1])
observed = {"times": TIME, "curve": GRID[:, :2], "data_times": TIME, "data": GRID[:, :2]}
refuses(plot.against_time, observed, says={"columns": "name"}, columns=[["t"]])
refuses(
    plot.scatter_by_class,
    {"half": 1.0},
    says={"clouds": "cloud|20"},
    clouds=[[], [("a", ROWS, [1])]],
)
refuses(plot.scatter_by_class, {"clouds": [("a", ROWS, np.zeros(20))]}, half=[0.0])
refuses(
    plot.scatter_against_truth,
    {"truth": COLUMN},
    says={"estimates": "estimate|20"},
    estimates=[{}, {"a": COLUMN[:3]}],
)
