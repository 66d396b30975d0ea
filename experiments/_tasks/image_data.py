"""Images to learn: their settings, and the arrays for training and measuring."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

from experiments._runner.settings import Settings
from jcnf import training
from jcnf.data.images import Images, dequantize, load_images, shape_of
from jcnf.evaluate.chunks import evenly_spaced


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageData(Settings):
    """The images to learn."""

    # data set; the digits are 8x8 and come with scikit-learn
    data: Literal["digits", "mnist", "fashion_mnist", "cifar10"] = "digits"
    # .npz file or folder of idx files (by default downloaded from openml.org)
    files: Path | None = None

    def check(self) -> None:
        if self.data == "digits" and self.files is not None:
            raise ValueError("the digits come with scikit-learn: leave out --files")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return shape_of(self.data)

    @property
    def dim(self) -> int:
        """The number of values: height x width x channels."""
        return math.prod(self.shape)

    def load(self) -> Images:
        """Return the training, validation and test images."""
        return load_images(self.data, self.files)


def dequantized_batches(levels: int, batch: int | None) -> training.DrawBatch:
    """Return a function that draws batches x (batch, dim) in [0, 1) from a table of gray values.

    Each batch gets fresh noise. From a pair (gray values, contexts) it draws pairs (x, context).
    """
    draw_rows = training.draw_rows(batch)

    def draw(key: Key[Array, ""], data: Any):
        row_key, noise_key = jr.split(key)
        rows = draw_rows(row_key, data)
        if isinstance(rows, tuple):
            return dequantize(noise_key, rows[0], levels), rows[1]
        return dequantize(noise_key, rows, levels)

    return draw


def held_out(pixels: np.ndarray, levels: int, count: int, key: Key[Array, ""]) -> Array:
    """Return `count` evenly spaced images (0 for all) as x (n, dim), with one draw of the noise."""
    return jax.jit(dequantize, static_argnums=2)(
        key, jnp.asarray(pixels[pick_rows(len(pixels), count)]), levels
    )


def pick_rows(total: int, count: int) -> np.ndarray:
    """Return the indices of `count` evenly spaced rows out of `total`; 0 for all of them."""
    return evenly_spaced(total, count or total)
