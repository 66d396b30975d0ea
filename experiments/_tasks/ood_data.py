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
from experiments._tasks.image_data import held_out, some
from experiments._tasks.images import ImageLoop
from experiments._tasks.tables import Columns
from experiments.density import Density
from jcnf import Solve, evaluate
from jcnf._checks import InputError
from jcnf.data.images import read_images
from jcnf.data.noise import shuffled, uniform_noise
from jcnf.data.tables import Standardizer, read_rows
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


def load_model(run: Path) -> tuple[ImageModel | TableModel, ImageLoop | Density]:
    """Return the density that a run has learned, and the run's settings.

    **Raises:** `InputError` if it is not a run on images or tables, or has not finished training.
    """
    kind = kind_of(run)
    if not issubclass(kind, ImageLoop | Density):
        raise InputError(
            f"{run} was not trained on images or a table ({kind.__name__}), so it has no test "
            "part: use a run of images, density or tabular, or of nice on images"
        )
    flow, trained, notes = load_flow(run, kind)
    if isinstance(trained, Density):
        columns = Columns.of(Standardizer.from_json(notes["table"]), trained.context)
        form = (columns.scale.columns, columns.places)
        return TableModel(flow, form, columns), trained
    measure = trained.make_measure()
    model = ImageModel(flow, trained.shape, trained.classes, measure.divergence, measure.chunk)
    return model, trained


def load_sets(
    run: Path,
    model: ImageModel | TableModel,
    trained: ImageLoop | Density,
    outside: Sequence[Path],
    count: int,
    seed: int,
) -> Sets:
    """Return at most `count` points of each set: the test part, noise, and the `outside` files.

    **Raises:** `InputError` if the data that the run was trained on are missing or have changed,
    if a file does not have their form, or if two sets have the same name.
    """
    path = trained.data if isinstance(trained, Density) else trained.path
    if path is not None and not Path(path).exists():
        raise InputError(
            f"{run} was trained on {path}, which does not exist: restore it, or start from the "
            "folder to which the path is relative"
        )
    if isinstance(trained, ImageLoop):
        return _images(trained, outside, count, seed)
    assert isinstance(model, TableModel)  # ensured by `load_model`
    return _tables(run, model.columns.scale, trained, outside, count, seed)


def _images(trained: ImageLoop, outside: Sequence[Path], count: int, seed: int) -> Sets:
    images, rng = trained.load(), np.random.default_rng([seed, 0])
    levels, warnings = images.levels, []

    def read(path):
        outer = read_images(path)
        if outer.shape != images.shape:
            sizes = ["x".join(map(str, shape)) for shape in (outer.shape, images.shape)]
            raise InputError(f"{path}: expected images of {sizes[1]}; got {sizes[0]}")
        pixels = outer.pixels[some(len(outer.pixels), count)]
        if pixels.max() < levels < 256:
            warnings.append(
                f"{path}: no gray value is above {levels - 1}, but 255 is read as white"
            )
        return (pixels.astype(int) * levels // 256).astype(np.uint8)

    test = images.test[some(len(images.test), count)]
    pixels = {
        INSIDE: test,
        "uniform_noise": uniform_noise(rng, count, trained.dim, levels),
        "shuffled": shuffled(rng, test),
    }
    pixels |= _outside(outside, pixels, read)
    train = images.train[some(len(images.train), count)]
    key = jr.fold_in(jr.key(seed), 1)
    reference, *x = (
        np.asarray(held_out(each, levels, 0, jr.fold_in(key, i)))
        for i, each in enumerate([train, *pixels.values()])
    )
    return Sets(
        dict(zip(pixels, x, strict=True)), reference, warnings, pixels, levels, images.shape
    )


def _tables(
    run: Path,
    scale: Standardizer,
    trained: Density,
    outside: Sequence[Path],
    count: int,
    seed: int,
) -> Sets:
    table, rng = trained.load(), np.random.default_rng([seed, 0])
    same = table.scale.columns == scale.columns
    if not same or not np.allclose(table.scale.mean, scale.mean, atol=1e-6 * scale.std):
        raise InputError(f"{trained.data} has changed since {run} was trained on it: restore it")
    test, train = (
        scale.unstandardize(part[some(len(part), count)]) for part in (table.test, table.train)
    )
    box = scale.unstandardize(np.stack([table.train.min(axis=0), table.train.max(axis=0)]))
    x = {INSIDE: test, "uniform_noise": rng.uniform(*box, size=(count, len(scale.columns)))}
    if len(scale.columns) > 1:
        x["permuted"] = rng.permuted(test, axis=0)  # makes the columns independent

    def read(path):
        rows = read_rows(path, scale.columns)
        return rows[some(len(rows), count)]

    x |= _outside(outside, x, read)
    noisy = trained.dequantize and outside
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
