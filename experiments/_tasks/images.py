"""Learning the density of images, as several experiments do."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

from experiments._runner.config import LoopSettings
from experiments._runner.loop import fit
from experiments._runner.progress import progress
from experiments._runner.run_dir import RunDir
from experiments._tasks.image_data import ImageSettings, dequantized_batches, held_out, some
from jcnf import Exact, Solve, evaluate, plot
from jcnf._checks import InputError
from jcnf.data.images import Images
from jcnf.divergence import Divergence
from jcnf.evaluate.log_prob import bits_per_dim
from jcnf.flows import Flow

MAX_IMAGE_ROWS = 10  # of ten images each


@dataclasses.dataclass(frozen=True)
class Measure:
    """The way in which log-densities are computed."""

    solve: Solve = evaluate.ACCURATE  # for the test part
    quick: Solve = evaluate.ACCURATE  # for validations and figures
    divergence: Divergence = Exact()  # noqa: RUF009 (frozen)
    draws: int = 8  # noise draws of an estimated divergence
    reference_points: int = 1000  # maximum number compared with float64
    chunk: int = 1000  # images per solve


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageLoop(LoopSettings, ImageSettings):
    """Settings of images and of the loop that trains on them."""

    @property
    def classes(self) -> int:
        """The number of classes if the density is conditional on the class, otherwise 0."""
        return 0

    def make_measure(self) -> Measure:
        return Measure()

    def make_sampler(self, flow: Flow) -> Flow:
        """Return the flow from which samples are drawn."""
        return flow


def learn_images(name: str, settings: ImageLoop, make: Callable[[Images], Flow]) -> None:
    """Train a flow on images, x = (pixel + u) / levels in [0, 1]^dim, measure it and draw it.

    `make(images)` returns the untrained flow.
    """
    images, classes, measure = settings.load(), settings.classes, settings.make_measure()
    if classes and (images.labels is None or max(map(np.max, images.labels.values())) >= classes):
        raise InputError(
            f"a density given the class needs images with labels 0 to {classes - 1}: use other "
            "images, or --no-conditional"
        )
    run_dir = RunDir(name, settings, resume=settings.resume)
    keys = jr.split(jr.fold_in(jr.key(settings.seed), 2), 5)
    val_key, val_noise_key, test_key, score_key, sample_key = keys

    def part(which, count, key):
        pixels = getattr(images, which)
        x = held_out(pixels, images.levels, count, key)
        return x, one_hot(images, which, classes, some(len(pixels), count))

    dim, levels = settings.dim, images.levels
    x_val, c_val = part("val", settings.validation_images, val_key)

    def validate(flow):
        scores = evaluate.log_prob(
            flow,
            x_val,
            key=val_noise_key,
            context=c_val,
            solve=measure.quick,
            divergence=measure.divergence,
            chunk=measure.chunk,
        )
        return float(bits_per_dim(-scores.nll, dim, levels))

    context = one_hot(images, "train", classes, slice(None))
    pixels = jnp.asarray(images.train)
    fitted = fit(
        run_dir,
        settings,
        make(images),
        draw_of=lambda batch: dequantized_batches(levels, batch),
        data=pixels if context is None else (pixels, context),
        validate=validate,
        score="val_bits",
    )
    flow = fitted.flow
    run_dir.save_flow(flow, {})
    run_dir.save_figures(
        training=plot.training_curves(fitted.records, loss_units=settings.loss_units)
    )

    x, c = part("test", settings.test_images, test_key)
    with progress("drawing figures"):
        plot_images(run_dir, settings, flow, np.asarray(x), c, sample_key)
    with progress(f"measuring on {len(x)} test images"):
        report = evaluate.accuracy_report(
            flow,
            x,
            key=score_key,
            context=c,
            solve=measure.solve,
            divergence=measure.divergence,
            draws=measure.draws,
            reference_points=measure.reference_points,
            chunk=measure.chunk,
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
    settings: ImageLoop,
    flow: Flow,
    x: np.ndarray,
    context: Array | None,
    key: Key[Array, ""],
) -> None:
    """Draw samples beside data, one class per column, and interpolations between test images.

    Each row interpolates linearly between the latents of two test images.
    """
    count, solve = min(MAX_IMAGE_ROWS * 10, len(x)), settings.make_measure().quick
    given = None if context is None else jnp.eye(settings.classes)[np.arange(count) % 10]
    samples = evaluate.sample(settings.make_sampler(flow), key, count, context=given, solve=solve)
    figure = plot.image_grid([("data", x[:count]), ("samples", samples.x[-1])], settings.shape)
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
    ways = evaluate.transform(
        flow, between(np.nan_to_num(z)), "to_data", context=given, solve=solve
    )
    figure = plot.image_grid([("between two test images", ways.x[-1])], settings.shape)
    run_dir.save_figures(interpolation=figure)
