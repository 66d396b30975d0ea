"""Lengths of lossless codes of an image, without a model of its kind."""

import io
import lzma
import math
import zlib
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8

from jcnf._checks import check_int

# Bytes of any PNG: its signature, IHDR and IEND, and the framing of one IDAT and its zlib stream.
_PNG_OVERHEAD = 63
_LZMA_FILTERS = [{"id": lzma.FILTER_LZMA1, "preset": 9, "dict_size": 1 << 16, "lc": 0, "pb": 0}]


def code_length(
    pixels: UInt8[np.ndarray, "n dim"], shape: tuple[int, int, int], levels: int
) -> Float[np.ndarray, " n"]:
    """Return the bits of the shortest of several lossless codes of each image, of known size.

    This is the L of Serrà et al. 2020 (see `jcnf.evaluate.ood`), with other codes: PNG, deflate and
    LZMA, without the bytes that all their files have; for images too small for these, the pixel
    values and their differences from the left and upper neighbors, modulo `levels`, coded one after
    the other by the frequencies so far (Krichevsky and Trofimov 1981, "The performance of universal
    encoding"); and the plain code of dim log2 `levels` bits. The 3 bits that would say which code
    it is are not counted.

    `shape` is (height, width, channels); pixel values are 0 to `levels` - 1.

    **Raises:** `ValueError` if `shape` is not that of the pixels, if there are not 1 or 3 channels,
    and for pixel values above `levels` - 1.
    """
    fits = len(shape) == 3 and shape[2] in (1, 3) and pixels.shape[1:] == (math.prod(shape),)
    if pixels.dtype != np.uint8 or not fits:
        raise ValueError(
            f"expected uint8 pixels (n, dim) of images with 1 or 3 channels; got {pixels.dtype} "
            f"{pixels.shape} for {shape}: give as shape the (height, width, channels) that they "
            "were flattened from"
        )
    check_int(levels=levels)
    if levels > 256:
        raise ValueError(f"levels must be at most 256 for uint8 pixels; got levels={levels}")
    if (top := pixels.max(initial=0)) >= levels:
        raise ValueError(f"pixels must be at most {levels - 1} for levels={levels}; got {top}")
    images = pixels.reshape(-1, *shape)
    plain = np.full(len(pixels), pixels.shape[1] * math.log2(levels))
    files = (_each(coder, images) for coder in (_png, _deflate, _lzma))
    adaptive = (_adaptive(x % levels, levels) for x in _differences(images.astype(np.int16)))
    return np.minimum.reduce([plain, *files, *adaptive])


def _each(coder: Callable[[np.ndarray], int], images: np.ndarray) -> np.ndarray:
    return 8.0 * np.array([coder(image) for image in images])


def _png(image: np.ndarray) -> int:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
        file, "PNG", optimize=True
    )
    return len(file.getvalue()) - _PNG_OVERHEAD


def _deflate(image: np.ndarray) -> int:
    return len(zlib.compress(image.tobytes(), 9, wbits=-zlib.MAX_WBITS))


def _lzma(image: np.ndarray) -> int:
    return len(lzma.compress(image.tobytes(), lzma.FORMAT_RAW, filters=_LZMA_FILTERS))


def _differences(images: np.ndarray) -> list[np.ndarray]:
    """Return the images, and each pixel's difference from the one above and the one to its left."""
    return [images, *(np.diff(images, axis=axis, prepend=0) for axis in (1, 2))]


def _adaptive(symbols: np.ndarray, levels: int) -> np.ndarray:
    """Return -log2 P for the Krichevsky-Trofimov probability P, which only needs the counts c_i.

    P = Gamma(k/2) / Gamma(d + k/2) prod_i Gamma(c_i + 1/2) / Gamma(1/2) with k levels, d symbols.
    """
    num, dim = len(symbols), math.prod(symbols.shape[1:])
    rows = levels * np.arange(num)[:, None]
    counts = np.bincount((symbols.reshape(num, dim) + rows).ravel(), minlength=levels * num)
    log_gamma = np.array([math.lgamma(count + 0.5) - math.lgamma(0.5) for count in range(dim + 1)])
    log_prob = log_gamma[counts.reshape(num, levels)].sum(axis=1)
    return (math.lgamma(dim + levels / 2) - math.lgamma(levels / 2) - log_prob) / math.log(2)
