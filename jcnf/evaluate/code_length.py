"""How short a picture can be written without a model of its kind."""

import io
import lzma
import math
import zlib
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8

from jcnf._checks import check_int

_PNG = 63  # bytes of any PNG: signature, IHDR, the frames of one IDAT, of its zlib stream, of IEND
_LZMA = [{"id": lzma.FILTER_LZMA1, "preset": 9, "dict_size": 1 << 16, "lc": 0, "pb": 0}]


def code_length(
    pixels: UInt8[np.ndarray, "n dim"], shape: tuple[int, int, int], levels: int
) -> Float[np.ndarray, " n"]:
    """Bits of the shortest of several lossless codes of each picture, whose size is known.

    The L of Serrà et al. 2020 (see `jcnf.evaluate.ood`), by other codes: PNG, deflate and
    LZMA, without what their files have in common; for pictures too small for these, the grey values
    and their differences to the left and above, modulo `levels`, coded one after the other by the
    frequencies so far (Krichevsky and Trofimov 1981, "The performance of universal encoding"); and
    dim log2 `levels`, the plain code. Which of them it is, 3 bits, is not counted.

    `shape` is height, width, channels; grey values are 0 to `levels` - 1.

    **Raises:** `ValueError` for another shape than that of the pixels, channels other than 1 and 3,
    and grey values beyond the levels.
    """
    fits = len(shape) == 3 and shape[2] in (1, 3) and pixels.shape[1:] == (math.prod(shape),)
    if pixels.dtype != np.uint8 or not fits:
        raise ValueError(
            f"expected uint8 pixels (n, dim) of pictures with 1 or 3 channels; got {pixels.dtype} "
            f"{pixels.shape} for {shape}: give the shape they were flattened from, height, width, "
            "channels"
        )
    check_int(levels=levels)
    if levels > 256:
        raise ValueError(f"grey values of uint8 have at most 256 levels; got {levels}")
    if (top := pixels.max(initial=0)) >= levels:
        raise ValueError(f"a grey value is {top}; of {levels} levels the last is {levels - 1}")
    pictures = pixels.reshape(-1, *shape)
    plain = np.full(len(pixels), pixels.shape[1] * math.log2(levels))
    files = (_each(coder, pictures) for coder in (_png, _deflate, _lzma))
    adaptive = (_adaptive(x % levels, levels) for x in _differences(pictures.astype(np.int16)))
    return np.minimum.reduce([plain, *files, *adaptive])


def _each(coder: Callable[[np.ndarray], int], pictures: np.ndarray) -> np.ndarray:
    return 8.0 * np.array([coder(picture) for picture in pictures])


def _png(picture: np.ndarray) -> int:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(
        file, "PNG", optimize=True
    )
    return len(file.getvalue()) - _PNG


def _deflate(picture: np.ndarray) -> int:
    return len(zlib.compress(picture.tobytes(), 9, wbits=-zlib.MAX_WBITS))


def _lzma(picture: np.ndarray) -> int:
    return len(lzma.compress(picture.tobytes(), lzma.FORMAT_RAW, filters=_LZMA))


def _differences(pictures: np.ndarray) -> list[np.ndarray]:
    """The pictures, and what each pixel adds to the one above and to the one at its left."""
    return [pictures, *(np.diff(pictures, axis=axis, prepend=0) for axis in (1, 2))]


def _adaptive(symbols: np.ndarray, levels: int) -> np.ndarray:
    """-log2 of the Krichevsky-Trofimov probability, which depends on the counts alone.

    P = Gamma(k/2) / Gamma(d + k/2) prod_i Gamma(c_i + 1/2) / Gamma(1/2), k levels, d symbols.
    """
    num, dim = len(symbols), math.prod(symbols.shape[1:])
    rows = levels * np.arange(num)[:, None]
    counts = np.bincount((symbols.reshape(num, dim) + rows).ravel(), minlength=levels * num)
    log_gamma = np.array([math.lgamma(count + 0.5) - math.lgamma(0.5) for count in range(dim + 1)])
    log_prob = log_gamma[counts.reshape(num, levels)].sum(axis=1)
    return (math.lgamma(dim + levels / 2) - math.lgamma(levels / 2) - log_prob) / math.log(2)
