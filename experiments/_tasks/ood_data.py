"""The density of a trained run, and the sets to score: its own test part and those outside.

Densities are in the units of the data, so that those of two runs can be compared.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

from experiments._runner.run_dir import kind_of, load_flow
from experiments._tasks.image_data import ImageData, held_out, pick_rows
from experiments._tasks.images import ImageExperiment
from experiments._tasks.tables import Columns, TableExperiment, TableFile, TableRun, require_data
from jcnf import Solve, evaluate
from jcnf._checks import InputError
from jcnf.data.images import read_images
from jcnf.data.images.noise import shuffled, uniform_noise
from jcnf.data.tables import read_rows
from jcnf.divergence import Divergence
from jcnf.flows import Flow

INSIDE = "test"  # the name of the run's own test part


class ImageModel(NamedTuple):
    """The density of images x (n, dim) in [0, 1)^dim; a mixture if the flow is given classes."""

    flow: Flow
    form: tuple  # equal for models of the same points: height, width, channels
    classes: int
    divergence: Divergence
    chunk: int

    def log_prob(self, x: np.ndarray, key: Key[Array, ""], solve: Solve) -> np.ndarray:
        """Return log p(x) in nats, (n,); NaN where the solve failed. Consumes `key`.

        For a flow given classes it is log 1/K sum_k p(x | k), because an image from elsewhere
        has no class.
        """
        scored = []
        for label, draw_key in enumerate(jr.split(key, max(self.classes, 1))):
            labels = jnp.full(len(x), label)
            scores = evaluate.log_prob(
                self.flow,
                jnp.asarray(x, float),
                key=draw_key,
                context=jax.nn.one_hot(labels, self.classes) if self.classes else None,
                solve=solve,
                divergence=self.divergence,
                chunk=self.chunk,
            )
            scored.append(scores.log_prob)
        return np.logaddexp.reduce(scored) - np.log(len(scored))


class TableModel(NamedTuple):
    """The density of table rows, in their units: of modeled columns given the others."""

    flow: Flow
    form: tuple  # equal for models of the same points: columns, indices of the modeled ones
    columns: Columns

    def log_prob(self, x: np.ndarray, key: Key[Array, ""], solve: Solve) -> np.ndarray:
        """Return log p of whole rows (n, columns) in nats, (n,); NaN where the solve failed."""
        del key  # not needed: the divergence is exact
        rows, context = self.columns.split(self.columns.scale.standardize(x))
        scores = evaluate.log_prob(self.flow, rows, context=context, solve=solve)
        return scores.log_prob - self.columns.modeled.log_scale


class Sets(NamedTuple):
    """The points of each set: `INSIDE` comes first, all others are outside."""

    x: dict[str, np.ndarray]  # (n, dim), in the units of the data
    reference: np.ndarray  # (m, dim), training points
    warnings: list[str]
    # Only for images: the gray values of `x`, the number of levels, (height, width, channels).
    pixels: dict[str, np.ndarray] = {}  # noqa: RUF012 (never mutated)
    levels: int = 0
    shape: tuple[int, int, int] = (0, 0, 0)


def load_model(run: Path) -> tuple[ImageModel | TableModel, ImageExperiment | TableRun]:
    """Return the density that a run has learned, and what knows the data: its settings or the run.

    **Raises:** `InputError` if it is not a run on images or tables, or has not finished training.
    """
    kind = kind_of(run)
    if issubclass(kind, TableExperiment):
        trained = TableRun.load(run)
        columns = trained.columns
        form = columns.scale.columns, columns.modeled_indices
        return TableModel(trained.flow, form, columns), trained
    if not issubclass(kind, ImageExperiment):
        raise InputError(
            f"{run} was not trained on images or a table ({kind.__name__}), so it has no test "
            "part: use a run of images, density or tabular, or of nice on images"
        )
    flow, settings, _ = load_flow(run, kind)
    measure = settings.measure
    model = ImageModel(
        flow, settings.images.shape, settings.classes, measure.make_divergence(), measure.chunk
    )
    return model, settings


def load_sets(
    run: Path, trained: ImageExperiment | TableRun, outside: Sequence[Path], count: int, seed: int
) -> Sets:
    """Return at most `count` points of each set: the test part, noise, and the `outside` files.

    **Raises:** `InputError` if the data that the run was trained on are missing or have changed,
    if a file does not have their form, or if two sets have the same name.
    """
    if isinstance(trained, TableRun):
        return _tables(trained, outside, count, seed)
    require_data(run, trained.images.files)
    return _images(trained.images, outside, count, seed)


def _images(data: ImageData, outside: Sequence[Path], count: int, seed: int) -> Sets:
    images, rng = data.load(), np.random.default_rng([seed, 0])
    levels, warnings = images.levels, []

    def read(path):
        outer = read_images(path)
        if outer.shape != images.shape:
            sizes = ["x".join(map(str, shape)) for shape in (outer.shape, images.shape)]
            raise InputError(f"{path}: expected images of {sizes[1]}; got {sizes[0]}")
        pixels = outer.pixels[pick_rows(len(outer.pixels), count)]
        if pixels.max() < levels < 256:
            warnings.append(
                f"{path}: no gray value is above {levels - 1}, but 255 is read as white"
            )
        return (pixels.astype(int) * levels // 256).astype(np.uint8)

    test = images.test[pick_rows(len(images.test), count)]
    pixels = {
        INSIDE: test,
        "uniform_noise": uniform_noise(rng, count, data.dim, levels),
        "shuffled": shuffled(rng, test),
    }
    pixels |= _outside(outside, pixels, read)
    train = images.train[pick_rows(len(images.train), count)]
    key = jr.fold_in(jr.key(seed), 1)
    reference, *x = (
        np.asarray(held_out(each, levels, 0, jr.fold_in(key, i)))
        for i, each in enumerate([train, *pixels.values()])
    )
    return Sets(
        dict(zip(pixels, x, strict=True)), reference, warnings, pixels, levels, images.shape
    )


def _tables(trained: TableRun, outside: Sequence[Path], count: int, seed: int) -> Sets:
    table, scale = trained.load_table(), trained.columns.scale
    rng = np.random.default_rng([seed, 0])
    test, train = (
        scale.unstandardize(part[pick_rows(len(part), count)]) for part in (table.test, table.train)
    )
    box = scale.unstandardize(np.stack([table.train.min(axis=0), table.train.max(axis=0)]))
    x = {INSIDE: test, "uniform_noise": rng.uniform(*box, size=(count, len(scale.columns)))}
    if len(scale.columns) > 1:
        x["permuted"] = rng.permuted(test, axis=0)  # makes the columns independent

    def read(path):
        rows = read_rows(path, scale.columns)
        return rows[pick_rows(len(rows), count)]

    x |= _outside(outside, x, read)
    source = trained.settings.table
    noisy = isinstance(source, TableFile) and source.dequantize and outside
    warnings = ["the run's rows have noise added by --dequantize; those of --outside do not"]
    return Sets(x, train, warnings if noisy else [])


def _outside(paths: Sequence[Path], taken: dict, read: Callable) -> dict[str, np.ndarray]:
    """Read each file; name its set after the file, without the ending."""
    sets: dict[str, np.ndarray] = {}
    for path in paths:
        name = Path(path.name.removesuffix(".gz")).stem or str(path)
        if name in taken or name in sets:
            raise InputError(f"{path}: a set is already called {name}: rename the file")
        sets[name] = read(path)
    return sets
