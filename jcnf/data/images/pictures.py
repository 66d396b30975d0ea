"""Pictures as densities in the plane, after FFJORD's img2d (Grathwohl et al. 2019).

A picture's darkness is its density: constant on each pixel, and so known exactly, where FFJORD
blurs each by a Gaussian. Its longer side spans [-4, 4], its centre is the origin, y points upwards.
"""

import math
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Integer

from jcnf._checks import InputError, check_instance
from jcnf.data.toys import Toy, batched, drawing

EXTENT = 4.0
LONGEST = 1000  # pixels a side: the sum of all levels is an int32
# Samples keep off their pixel's edges by this share of it: in float32 none is rounded into the next
# pixel, where the density may be zero.
_MARGIN = 1e-4


def read_picture(path: str | os.PathLike[str]) -> Any:
    """The picture of a file in any format that pillow knows, upright, as a pillow image.

    **Raises:** `InputError` for a missing file, a directory, what is no whole picture, and more
    than 8 bits a channel.
    """
    from PIL import Image, ImageOps

    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a directory; give the path of one picture in it")
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; check the path")
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except Image.UnidentifiedImageError:
        raise InputError(f"{path}: is no picture that pillow knows; give a .png or .jpg") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read ({error}); fetch or write it anew") from None
    if upright.mode[0] in "IF":  # pillow would clip them
        raise InputError(f"{path}: has more than 8 bits a channel; save it with 8")
    return upright


def draw_text(text: str, height: int = 80) -> Any:
    """Black letters of that many pixels on white, as a pillow image."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(height)
    left, top, right, bottom = font.getbbox(text)
    pad = height / 4
    image = Image.new("L", (round(right - left + 2 * pad), round(bottom - top + 2 * pad)), "white")
    ImageDraw.Draw(image).text((pad - left, pad - top), text, fill="black", font=font)
    return image


def picture(image: Any, name: str, *, invert: bool = False, side: int = 200) -> Toy:
    """The density of a pillow image, proportional to its darkness, or with `invert` brightness.

    A longer side of more than `side` pixels, at most 1000, is scaled down to it, each pixel a mean
    of those it covers. Transparent pixels are background: white, or with `invert` black.

    **Raises:** `InputError` for a picture that is all background or has no pixels, and `ValueError`
    for a `side` out of range.
    """
    from PIL import Image

    if not 2 <= side <= LONGEST:
        raise ValueError(f"side must be from 2 to {LONGEST} pixels; got {side}")
    check_instance(Image.Image, "pillow's, as read_picture(path) gives it", image=image)
    if min(image.size) < 1:
        raise InputError(f"{name}: has no pixels; give another")
    ground = Image.new("RGBA", image.size, "black" if invert else "white")
    grey = Image.alpha_composite(ground, image.convert("RGBA")).convert("L")
    grey.thumbnail((side, side), Image.Resampling.BOX)
    levels = np.asarray(grey, np.int32)
    levels = levels if invert else 255 - levels
    if levels.min() == levels.max():
        hint = "white shows on black with --invert" if not invert else "leave out --invert"
        raise InputError(f"{name}: is of one grey throughout, which is nothing to learn; {hint}")
    return piecewise_constant(levels, name)


def piecewise_constant(levels: Integer[np.ndarray, "rows columns"], name: str) -> Toy:
    """The density proportional to whole numbers >= 0 on square pixels, the first row uppermost.

    Its `log_prob` is -inf where the level is 0 and outside the picture; no sample lies there. A
    sample's pixel is had exactly as often as is its due: by the pixels' cumulative sum, in which a
    whole number below their total is looked up.
    """
    if levels.ndim != 2 or levels.min(initial=0) < 0 or not levels.any():
        raise ValueError(
            f"expected levels (rows, columns) of whole numbers >= 0, not all 0; got {levels.shape}"
        )
    rows, columns = levels.shape
    size = 2 * EXTENT / max(rows, columns)  # of a pixel
    cumulative = np.cumsum(levels, dtype=np.int32)
    share = levels / cumulative[-1]
    with np.errstate(divide="ignore"):
        log_density = np.log(share / size**2)

    def sample(key, num_samples):
        pixel_key, place_key = jr.split(key)
        drawn = jr.randint(pixel_key, (num_samples,), 0, int(cumulative[-1]), jnp.int32)
        pixel = jnp.searchsorted(jnp.asarray(cumulative), drawn, side="right")
        corner = jnp.stack([pixel % columns, rows - 1 - pixel // columns], axis=-1).astype(float)
        place = jr.uniform(place_key, (num_samples, 2), minval=_MARGIN, maxval=1 - _MARGIN)
        return size * (corner + place - jnp.array([[columns / 2, rows / 2]]))

    def density(x):
        place = jnp.floor(x / size + jnp.array([columns / 2, rows / 2], x.dtype))
        inside = jnp.all((place >= 0) & (place < jnp.array([columns, rows], x.dtype)))
        column, row = jnp.where(inside, place, 0).astype(int)
        found = jnp.asarray(log_density, x.dtype)[rows - 1 - row, column]
        return jnp.where(inside, found, -jnp.inf)

    occupied = share[share > 0]
    entropy = float(-np.sum(occupied * np.log(occupied / size**2)))
    # Samples keep off the edges of pixels: so much lower is their own entropy.
    error = -2 * math.log1p(-2 * _MARGIN)
    return Toy(name, drawing(sample), batched(density), entropy, entropy_error=error, extent=EXTENT)
