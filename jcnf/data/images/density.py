"""Images as densities in the plane, after FFJORD's img2d (Grathwohl et al. 2019).

The density is proportional to the image's darkness. It is constant on each pixel, and so known
exactly; FFJORD blurs each pixel by a Gaussian. The longer side of the image spans [-4, 4], its
center is the origin, and y points upwards.
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
from jcnf.data.toys import Toy, batched, checked_sampler

EXTENT = 4.0
MAX_SIDE = 1000  # pixels on the longer side, so that the sum of all levels is an int32
# Samples stay this share of a pixel away from its edges, so that float32 rounds none of them into
# the next pixel, where the density may be zero.
_PIXEL_MARGIN = 1e-4


def read_image_file(path: str | os.PathLike[str]) -> Any:
    """Read an image file, in any format that Pillow knows, as an upright Pillow image.

    **Raises:** `InputError` for a missing file, a directory, a file that is not a complete image,
    and more than 8 bits per channel.
    """
    from PIL import Image, ImageOps

    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a directory: give the path of an image in it")
    if not path.is_file():
        raise InputError(f"{path}: no such file: check the path")
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except Image.UnidentifiedImageError:
        raise InputError(f"{path}: is not an image that Pillow knows: use a .png or .jpg") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read ({error}): download or save it again") from None
    if upright.mode[0] in "IF":  # Pillow would clip these values
        raise InputError(f"{path}: has more than 8 bits per channel: save it with 8")
    return upright


def render_text(text: str, height: int = 80) -> Any:
    """Draw black letters, `height` pixels high, on white, as a Pillow image."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(height)
    left, top, right, bottom = font.getbbox(text)
    pad = height / 4
    image = Image.new("L", (round(right - left + 2 * pad), round(bottom - top + 2 * pad)), "white")
    ImageDraw.Draw(image).text((pad - left, pad - top), text, fill="black", font=font)
    return image


def image_density(image: Any, name: str, *, invert: bool = False, side: int = 200) -> Toy:
    """Return the density proportional to an image's darkness, or with `invert` to its brightness.

    `image` is a Pillow image. If its longer side has more than `side` pixels (at most 1000), it is
    scaled down to `side`, and each new pixel is the mean of those it covers. Transparent pixels are
    background: white, or black with `invert`.

    **Raises:** `InputError` for an image with one gray value or no pixels, and `ValueError` for a
    `side` out of range.
    """
    from PIL import Image

    if not 2 <= side <= MAX_SIDE:
        raise ValueError(f"side must be from 2 to {MAX_SIDE} pixels; got {side}")
    check_instance(Image.Image, "a Pillow image, as from read_image_file(path)", image=image)
    if min(image.size) < 1:
        raise InputError(f"{name}: has no pixels: use another image")
    ground = Image.new("RGBA", image.size, "black" if invert else "white")
    gray = Image.alpha_composite(ground, image.convert("RGBA")).convert("L")
    gray.thumbnail((side, side), Image.Resampling.BOX)
    levels = np.asarray(gray, np.int32)
    levels = levels if invert else 255 - levels
    if levels.min() == levels.max():
        raise InputError(
            f"{name}: all pixels have the same gray value, so that there is no shape to learn: use "
            f"another image, or try invert={not invert}"
        )
    return piecewise_constant(levels, name)


def piecewise_constant(levels: Integer[np.ndarray, "rows columns"], name: str) -> Toy:
    """Return the density proportional to `levels`, whole numbers >= 0, on square pixels.

    The first row is at the top. `log_prob` is -inf where the level is 0 and outside the image, and
    no sample lies there. Pixels are drawn with exactly their probabilities: a uniform whole number
    below the sum of all levels is looked up in the cumulative sum.
    """
    if levels.ndim != 2 or levels.min(initial=0) < 0 or not levels.any():
        raise ValueError(
            "expected levels of shape (rows, columns), whole numbers >= 0 and not all 0; got shape "
            f"{levels.shape}"
        )
    rows, columns = levels.shape
    size = 2 * EXTENT / max(rows, columns)  # side of a pixel
    cumulative = np.cumsum(levels, dtype=np.int32)
    share = levels / cumulative[-1]
    with np.errstate(divide="ignore"):
        log_density = np.log(share / size**2)

    def sample(key, num_samples):
        pixel_key, place_key = jr.split(key)
        drawn = jr.randint(pixel_key, (num_samples,), 0, int(cumulative[-1]), jnp.int32)
        pixel = jnp.searchsorted(jnp.asarray(cumulative), drawn, side="right")
        corner = jnp.stack([pixel % columns, rows - 1 - pixel // columns], axis=-1).astype(float)
        low, high = _PIXEL_MARGIN, 1 - _PIXEL_MARGIN
        place = jr.uniform(place_key, (num_samples, 2), minval=low, maxval=high)
        return size * (corner + place - jnp.array([[columns / 2, rows / 2]]))

    def density(x):
        place = jnp.floor(x / size + jnp.array([columns / 2, rows / 2], x.dtype))
        inside = jnp.all((place >= 0) & (place < jnp.array([columns, rows], x.dtype)))
        column, row = jnp.where(inside, place, 0).astype(int)
        found = jnp.asarray(log_density, x.dtype)[rows - 1 - row, column]
        return jnp.where(inside, found, -jnp.inf)

    occupied = share[share > 0]
    entropy = float(-np.sum(occupied * np.log(occupied / size**2)))
    # The margin makes the entropy of the samples lower than that of the density by this much.
    error = -2 * math.log1p(-2 * _PIXEL_MARGIN)
    return Toy(
        name, checked_sampler(sample), batched(density), entropy, entropy_error=error, extent=EXTENT
    )
