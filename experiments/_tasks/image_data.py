"""Pictures to learn: which, and in what form training and measuring have them."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

from experiments._runner.config import RunSettings
from jcnf import training
from jcnf._checks import InputError
from jcnf.data.images import Images, dequantise, load_images, shape_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSettings(RunSettings):
    """Pictures to learn."""

    # digits (8x8, scikit-learn's), mnist, fashion_mnist, cifar10
    data: str = "digits"
    # .npz, folder of idx files, or CIFAR-10's batches; without it, from openml.org
    path: Path | None = None
    # pictures of the test part to measure on; 0 for all
    test_images: int = 0
    # pictures of the validation part that training is judged by; 0 for all
    validation_images: int = 1000

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work, before anything is compiled."""
        super().check()
        shape_of(self.data)
        if self.data == "digits" and self.path is not None:
            raise InputError("the digits come with scikit-learn: leave out --path")
        if self.path is not None and not Path(self.path).exists():
            raise InputError(f"{self.path}: there is no such file; check --path")
        self.at_least(0, "test_images", "validation_images")
        if self.test_images == 1:
            raise InputError("--test-images: one has no standard error; give 2 or more, or 0")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return shape_of(self.data)

    @property
    def dim(self) -> int:
        """height x width x channels."""
        return int(np.prod(self.shape))

    def load(self) -> Images:
        """The pictures, in their three parts."""
        return load_images(self.data, self.path)


def draw_pictures(levels: int, batch: int | None) -> training.DrawBatch:
    """Batches x (batch, dim) in [0, 1) of a table of grey values, with fresh noise each time.

    Of a pair (grey values, contexts), pairs.
    """
    draw_rows = training.draw_rows(batch)

    def draw(key: Key[Array, ""], data: Any):
        row_key, noise_key = jr.split(key)
        rows = draw_rows(row_key, data)
        if isinstance(rows, tuple):
            return dequantise(noise_key, rows[0], levels), rows[1]
        return dequantise(noise_key, rows, levels)

    return draw


def held_out(pixels: np.ndarray, levels: int, count: int, key: Key[Array, ""]) -> Array:
    """Some of the pictures, evenly chosen, as x (n, dim) with one draw of the noise; 0 for all."""
    return jax.jit(dequantise, static_argnums=2)(
        key, jnp.asarray(pixels[some(len(pixels), count)]), levels
    )


def some(total: int, count: int) -> np.ndarray:
    """Indices of `count` of `total` rows, evenly spread; all of them for a count of 0."""
    return np.linspace(0, total - 1, min(count or total, total)).astype(int)
