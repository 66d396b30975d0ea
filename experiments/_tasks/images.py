"""Learning the density of pictures: what the experiments on them share."""

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
from experiments._tasks.image_data import ImageSettings, draw_pictures, held_out, some
from jcnf import Exact, Solve, evaluate, plot
from jcnf._checks import InputError
from jcnf.data.images import Images
from jcnf.divergence import Divergence
from jcnf.evaluate.log_prob import bits_per_dim
from jcnf.flows import Flow

ROWS = 10  # of the galleries, of ten pictures each


@dataclasses.dataclass(frozen=True)
class Measure:
    """How log-densities are had: in validation, and of the test part."""

    solve: Solve = evaluate.ACCURATE
    quick: Solve = evaluate.ACCURATE
    divergence: Divergence = Exact()  # noqa: RUF009 (frozen)
    draws: int = 8  # of the noise of an estimator
    reference_points: int = 1000  # at most so many are held against float64
    chunk: int = 1000  # pictures in one solve


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageLoop(LoopSettings, ImageSettings):
    """Pictures that the loop trains on."""

    @property
    def classes(self) -> int:
        """How many there are where the density is that of pictures given their class; 0 if not."""
        return 0

    def make_measure(self) -> Measure:
        """How log-densities are had."""
        return Measure()

    def make_sampler(self, flow: Flow) -> Flow:
        """The flow that samples are drawn from."""
        return flow


def learn_pictures(name: str, settings: ImageLoop, make: Callable[[Images], Flow]) -> None:
    """Train a flow on pictures, x = (pixel + u) / levels in [0, 1]^dim, and measure and draw it.

    `make(images)` gives the untrained flow.
    """
    images, classes, measure = settings.load(), settings.classes, settings.make_measure()
    if classes and (images.labels is None or max(map(np.max, images.labels.values())) >= classes):
        raise InputError(
            f"the density given the class needs pictures with labels 0 to {classes - 1}: "
            "give others, or --no-conditional"
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
        scores = evaluate.score(
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
        draw_of=lambda batch: draw_pictures(levels, batch),
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
        draw_galleries(run_dir, settings, flow, np.asarray(x), c, sample_key)
    with progress(f"measuring on {len(x)} test pictures"):
        certificate = evaluate.certify(
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
    scores = certificate.scores
    unit = dim * np.log(2)
    metrics = {
        "test_nll": scores.nll,
        "test_nll_stderr": scores.stderr,
        "bits_per_dim": float(bits_per_dim(-scores.nll, dim, levels)),
        "bits_per_dim_stderr": scores.stderr / unit,
        "bits_per_dim_estimator_stderr": certificate.estimator_stderr / unit,
        "val_bits": fitted.score,
        "inverse_error": certificate.roundtrip_error,
    }
    numerics = certificate.numerics() | fitted.numerics()
    run_dir.finish(metrics, numerics, fitted.timing, certificate.warnings())


def one_hot(images: Images, which: str, classes: int, rows: Any) -> Array | None:
    """Contexts (n, classes) of some pictures of a part; None without classes."""
    if not classes:
        return None
    assert images.labels is not None  # by `learn_pictures`
    return jax.nn.one_hot(images.labels[which][rows], classes)


def draw_galleries(
    run_dir: RunDir,
    settings: ImageLoop,
    flow: Flow,
    x: np.ndarray,
    context: Array | None,
    key: Key[Array, ""],
) -> None:
    """Samples beside data, a column a class where there are classes; and rows between two test
    pictures, straight between their latents."""
    count, solve = min(ROWS * 10, len(x)), settings.make_measure().quick
    given = None if context is None else jnp.eye(settings.classes)[np.arange(count) % 10]
    samples = evaluate.draw(settings.make_sampler(flow), key, count, context=given, solve=solve)
    figure = plot.gallery([("data", x[:count]), ("samples", samples.x[-1])], settings.shape)
    run_dir.save_figures(samples=figure)
    rows = min(ROWS, len(x) // 2)
    ends = jnp.asarray(x[: 2 * rows])
    given = None if context is None else context[: 2 * rows]
    z = evaluate.carry(flow, ends, "to_base", context=given, solve=solve).x[-1]
    share = np.linspace(0, 1, 10)[None, :, None]

    def between(pairs):
        first, last = pairs[::2, None], pairs[1::2, None]
        return jnp.asarray(((1 - share) * first + share * last).reshape(rows * 10, -1), ends.dtype)

    given = None if given is None else between(np.asarray(given))
    ways = evaluate.carry(flow, between(np.nan_to_num(z)), "to_data", context=given, solve=solve)
    figure = plot.gallery([("between two test pictures", ways.x[-1])], settings.shape)
    run_dir.save_figures(interpolation=figure)
