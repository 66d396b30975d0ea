"""Learning the density of images, as several experiments do."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

from experiments._runner.config import LoopExperiment, Measure
from experiments._runner.loop import fit
from experiments._runner.progress import progress
from experiments._runner.run_dir import RunDir
from experiments._runner.settings import Count, Whole
from experiments._tasks.image_data import ImageData, dequantized_batches, held_out, pick_rows
from jcnf import Exact, evaluate, plot
from jcnf._checks import InputError
from jcnf.data.images import Images
from jcnf.divergence import Divergence
from jcnf.evaluate.log_prob import bits_per_dim
from jcnf.flows import Flow

MAX_IMAGE_ROWS = 10  # of ten images each


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageMeasure(Measure):
    """Held-out numbers."""

    # number of test images to measure on (0 for all)
    test_images: Whole = 0
    # number of validation images (0 for all)
    validation_images: Whole = 1000
    # number of test images whose log-densities are compared with float64
    reference_images: Count = 1000
    # number of images in one solve
    chunk: Count = 1000

    def check(self) -> None:
        super().check()
        if self.test_images == 1:
            raise ValueError("--test-images must be at least 2, for a standard error, or 0; got 1")

    @property
    def draws(self) -> int:
        """The number of noise draws of the divergence."""
        return 1

    def make_divergence(self) -> Divergence:
        """Return the divergence of held-out numbers."""
        return Exact()


class ImageExperiment(LoopExperiment):
    """The settings of an experiment that learns the density of images by the loop."""

    images: ImageData
    measure: ImageMeasure

    @property
    def classes(self) -> int:
        """The number of classes if the density is conditional on the class, otherwise 0."""
        return 0

    def make_flow(self, dim: int, context_dim: int = 0) -> Flow:
        """Return the untrained flow."""
        raise NotImplementedError

    def make_start(self, images: Images) -> Flow:
        """Return the flow from which training on `images` starts."""
        return self.make_flow(self.images.dim, self.classes)

    def make_sampler(self, flow: Flow) -> Flow:
        """Return the flow from which samples are drawn."""
        return flow


def learn_images(name: str, settings: ImageExperiment) -> None:
    """Train a flow on images, x = (pixel + u) / levels in [0, 1]^dim, measure it and draw it."""
    images, classes, measure = settings.images.load(), settings.classes, settings.measure
    divergence, chunk = measure.make_divergence(), measure.chunk
    if classes and (images.labels is None or max(map(np.max, images.labels.values())) >= classes):
        raise InputError(
            f"a density given the class needs images with labels 0 to {classes - 1}: use other "
            "images, or --no-conditional"
        )
    run_dir = RunDir(name, settings)
    keys = jr.split(jr.fold_in(jr.key(settings.run.seed), 2), 5)
    val_key, val_noise_key, test_key, score_key, sample_key = keys

    def part(which, count, key):
        pixels = getattr(images, which)
        x = held_out(pixels, images.levels, count, key)
        return x, one_hot(images, which, classes, pick_rows(len(pixels), count))

    dim, levels = settings.images.dim, images.levels
    x_val, c_val = part("val", measure.validation_images, val_key)

    def validate(flow):
        scores = evaluate.log_prob(
            flow,
            x_val,
            key=val_noise_key,
            context=c_val,
            solve=measure.make_validation_solve(),
            divergence=divergence,
            chunk=chunk,
        )
        return float(bits_per_dim(-scores.nll, dim, levels))

    context = one_hot(images, "train", classes, slice(None))
    pixels = jnp.asarray(images.train)
    fitted = fit(
        run_dir,
        settings,
        settings.make_start(images),
        make_draw=lambda batch: dequantized_batches(levels, batch),
        data=pixels if context is None else (pixels, context),
        validate=validate,
        score="val_bits",
    )
    flow = fitted.flow
    run_dir.save_flow(flow, {})
    run_dir.save_figures(
        training=plot.training_curves(fitted.records, loss_units=settings.loss_units)
    )

    x, c = part("test", measure.test_images, test_key)
    with progress("drawing figures"):
        plot_images(run_dir, settings, flow, np.asarray(x), c, sample_key)
    with progress(f"measuring on {len(x)} test images"):
        report = evaluate.accuracy_report(
            flow,
            x,
            key=score_key,
            context=c,
            solve=measure.make_solve(),
            divergence=divergence,
            draws=measure.draws,
            reference_points=measure.reference_images,
            chunk=chunk,
        )
    scores = report.scores
    unit = dim * np.log(2)
    metrics = {
        "test_nll": scores.nll,
        "test_nll_stderr": scores.stderr,
        "bits_per_dim": float(bits_per_dim(-scores.nll, dim, levels)),
        "bits_per_dim_stderr": scores.stderr / unit,
        "bits_per_dim_estimator_stderr": report.estimator_stderr / unit,
        "val_bits": fitted.score,
        "inverse_error": report.roundtrip_error,
    }
    numerics = report.numerics() | fitted.numerics()
    run_dir.finish(metrics, numerics, fitted.timing, report.warnings())


def one_hot(images: Images, which: str, classes: int, rows: Any) -> Array | None:
    """Return the one-hot contexts (n, classes) of some rows of a part; None without classes."""
    if not classes:
        return None
    assert images.labels is not None  # checked in `learn_images`
    return jax.nn.one_hot(images.labels[which][rows], classes)


def plot_images(
    run_dir: RunDir,
    settings: ImageExperiment,
    flow: Flow,
    x: np.ndarray,
    context: Array | None,
    key: Key[Array, ""],
) -> None:
    """Draw samples beside data, one class per column, and interpolations between test images.

    Each row interpolates linearly between the latents of two test images.
    """
    count, shape = min(MAX_IMAGE_ROWS * 10, len(x)), settings.images.shape
    solve = settings.measure.make_validation_solve()
    given = None if context is None else jnp.eye(settings.classes)[np.arange(count) % 10]
    samples = evaluate.sample(settings.make_sampler(flow), key, count, context=given, solve=solve)
    figure = plot.image_grid([("data", x[:count]), ("samples", samples.x[-1])], shape)
    run_dir.save_figures(samples=figure)
    rows = min(MAX_IMAGE_ROWS, len(x) // 2)
    ends = jnp.asarray(x[: 2 * rows])
    given = None if context is None else context[: 2 * rows]
    z = evaluate.transform(flow, ends, "to_base", context=given, solve=solve).x[-1]
    share = np.linspace(0, 1, 10)[None, :, None]

    def between(pairs):
        first, last = pairs[::2, None], pairs[1::2, None]
        return jnp.asarray(((1 - share) * first + share * last).reshape(rows * 10, -1), ends.dtype)

    given = None if given is None else between(np.asarray(given))
    interpolated = evaluate.transform(
        flow, between(np.nan_to_num(z)), "to_data", context=given, solve=solve
    )
    figure = plot.image_grid([("between two test images", interpolated.x[-1])], shape)
    run_dir.save_figures(interpolation=figure)
