"""A trained run's density, and what it is tried on: its own data, and what is to be told from them.

Densities are in the units of the data, so that two runs' can be held against each other.
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


class PictureModel(NamedTuple):
    """The density of pictures x (n, dim) in [0, 1)^dim; of a flow given classes, their mixture."""

    flow: Flow
    form: tuple  # what another model of the same points has too: height, width, channels
    classes: int
    divergence: Divergence
    chunk: int

    def log_prob(self, x: np.ndarray, key: Key[Array, ""], solve: Solve) -> np.ndarray:
        """log p(x), nats, (n,); NaN where the solve failed. Consumes `key`.

        Of a flow given classes log 1/K sum_k p(x | k): a picture from elsewhere is of none.
        """
        scored = []
        for label, draw_key in enumerate(jr.split(key, max(self.classes, 1))):
            labels = jnp.full(len(x), label)
            scores = evaluate.score(
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
    """The density of rows in the units of the table; of the modelled columns given the others."""

    flow: Flow
    form: tuple  # the columns, and the places of the modelled ones
    columns: Columns

    def log_prob(self, x: np.ndarray, key: Key[Array, ""], solve: Solve) -> np.ndarray:
        """log p of whole rows (n, columns), nats, (n,); NaN where the solve failed."""
        del key  # the divergence is exact
        rows, context = self.columns.split(self.columns.scale.standardize(x))
        scores = evaluate.score(self.flow, rows, context=context, solve=solve)
        return scores.log_prob - self.columns.modelled.log_scale


class Sets(NamedTuple):
    """Points by the name of their set: the first is `INSIDE`, the others are outside."""

    x: dict[str, np.ndarray]  # (n, dim), in the units of the data
    reference: np.ndarray  # (m, dim), training points
    warnings: list[str]
    # Of pictures: the grey values of `x`, of how many levels, and height, width, channels.
    pixels: dict[str, np.ndarray] = {}  # noqa: RUF012 (nobody writes to it)
    levels: int = 0
    shape: tuple[int, int, int] = (0, 0, 0)


def load_model(run: Path) -> tuple[PictureModel | TableModel, ImageLoop | Density]:
    """The density that a run has learnt, and the run's settings.

    **Raises:** `InputError` where it is no run of pictures or tables, or not trained to its end.
    """
    kind = kind_of(run)
    if not issubclass(kind, ImageLoop | Density):
        raise InputError(
            f"{run} has learnt no pictures and no table ({kind.__name__}), of which there would be "
            "a test part: give a run of images, density or tabular, or of nice on pictures"
        )
    flow, trained, notes = load_flow(run, kind)
    if isinstance(trained, Density):
        columns = Columns.of(Standardizer.from_json(notes["table"]), trained.context)
        form = (columns.scale.columns, columns.places)
        return TableModel(flow, form, columns), trained
    measure = trained.make_measure()
    model = PictureModel(flow, trained.shape, trained.classes, measure.divergence, measure.chunk)
    return model, trained


def load_sets(
    run: Path,
    model: PictureModel | TableModel,
    trained: ImageLoop | Density,
    outside: Sequence[Path],
    count: int,
    seed: int,
) -> Sets:
    """At most `count` points of each set: the test part, noise, and each file of `outside`.

    **Raises:** `InputError` where the data that the run was trained on are gone or are others now,
    for a file that is not of their form, and for two of one name.
    """
    path = trained.data if isinstance(trained, Density) else trained.path
    if path is not None and not Path(path).exists():
        raise InputError(
            f"{run} was trained on {path}, which is not there: put it back, or start from the "
            "folder that it was named in"
        )
    if isinstance(trained, ImageLoop):
        return _pictures(trained, outside, count, seed)
    assert isinstance(model, TableModel)  # by `load_model`
    return _tables(run, model.columns.scale, trained, outside, count, seed)


def _pictures(trained: ImageLoop, outside: Sequence[Path], count: int, seed: int) -> Sets:
    images, rng = trained.load(), np.random.default_rng([seed, 0])
    levels, warnings = images.levels, []

    def read(path):
        pictures = read_images(path)
        if pictures.shape != images.shape:
            sizes = ["x".join(map(str, shape)) for shape in (pictures.shape, images.shape)]
            raise InputError(f"{path}: pictures of {sizes[0]} where the run's have {sizes[1]}")
        pixels = pictures.pixels[some(len(pictures.pixels), count)]
        if pixels.max() < levels < 256:
            warnings.append(
                f"{path}: no grey value is above {levels - 1}, but 255 is read as white"
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
        raise InputError(f"{trained.data} is no longer what {run} was trained on: put that back")
    test, train = (
        scale.unstandardize(part[some(len(part), count)]) for part in (table.test, table.train)
    )
    box = scale.unstandardize(np.stack([table.train.min(axis=0), table.train.max(axis=0)]))
    x = {INSIDE: test, "uniform_noise": rng.uniform(*box, size=(count, len(scale.columns)))}
    if len(scale.columns) > 1:
        x["permuted"] = rng.permuted(test, axis=0)  # each column by itself: independent ones

    def read(path):
        rows = read_rows(path, scale.columns)
        return rows[some(len(rows), count)]

    x |= _outside(outside, x, read)
    noisy = trained.dequantise and outside
    warnings = ["the run's rows have noise added, by --dequantise: --outside's have none"]
    return Sets(x, train, warnings if noisy else [])


def _outside(paths: Sequence[Path], taken: dict, read: Callable) -> dict[str, np.ndarray]:
    """What `read` makes of each file, by its name without its ending."""
    sets: dict[str, np.ndarray] = {}
    for path in paths:
        name = Path(path.name.removesuffix(".gz")).stem or str(path)
        if name in taken or name in sets:
            raise InputError(f"{path}: there is a set called {name} already: rename the file")
        sets[name] = read(path)
    return sets
