"""Tests of images as densities (exact values on few pixels) and of reading image files."""

import io

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from PIL import Image

from jcnf._checks import InputError
from jcnf.data.images import (
    MAX_SIDE,
    image_density,
    piecewise_constant,
    read_image_file,
    render_text,
)

NUM = 20_000
# The upper left pixel has 1/10 of the mass, the lower left 3/10 and the lower right 6/10; each
# pixel is 4 x 4.
LEVELS = np.array([[1, 0], [3, 6]])
CENTERS = jnp.array([[-2.0, 2.0], [2.0, 2.0], [-2.0, -2.0], [2.0, -2.0]])


def image(levels):
    return Image.fromarray(np.asarray(levels, np.uint8))


@pytest.fixture(scope="module")
def four():
    return piecewise_constant(LEVELS, "four")


def test_piecewise_constant_log_prob_and_entropy_equal_hand_values(four):
    shares = LEVELS.ravel() / 10
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(four.log_prob(CENTERS), np.log(shares / 16), rtol=1e-12)
    expected = -(0.1 * np.log(0.1 / 16) + 0.3 * np.log(0.3 / 16) + 0.6 * np.log(0.6 / 16))
    assert four.entropy == pytest.approx(expected, rel=1e-12)
    edges = jnp.array([[-4.01, 2.0], [4.0, -2.0], [0.0, -4.01], [-2.0, 4.0], [-4.0, 3.99]])
    outside = np.asarray(four.log_prob(edges))
    assert np.isneginf(outside[:4]).all()
    assert np.isfinite(outside[4])
    assert np.isnan(four.log_prob(jnp.array([[np.nan, 0.0]])))[0]


def test_piecewise_constant_samples_follow_the_pixel_masses(four):
    x = np.asarray(jax.jit(four.sample, static_argnums=1)(jr.key(0), NUM))
    assert x.dtype == np.float64
    row, column = (x[:, 1] < 0).astype(int), (x[:, 0] > 0).astype(int)
    found = np.bincount(2 * row + column, minlength=4) / NUM
    due = LEVELS.ravel() / 10
    assert (np.abs(found - due) <= 4 * np.sqrt(due * (1 - due) / NUM)).all()
    # Within a pixel they are uniform, so |x| has mean 2 and standard deviation 4 / sqrt(12).
    np.testing.assert_allclose(np.abs(x).mean(axis=0), 2, atol=4 * 4 / np.sqrt(12 * NUM))
    np.testing.assert_allclose(np.abs(x).std(axis=0), 4 / np.sqrt(12), rtol=0.02)


def test_piecewise_constant_float32_samples_have_finite_log_prob():
    """On a fine chessboard, a sample rounded into the next pixel would have density zero."""
    board = np.indices((3, MAX_SIDE)).sum(axis=0) % 2
    fine = piecewise_constant(board, "board")
    with jax.enable_x64(False):
        x = fine.sample(jr.key(1), 500_000)
        log_p = fine.log_prob(x)
    assert (x.dtype, log_p.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose(log_p, -np.log(board.sum() * (8 / MAX_SIDE) ** 2), rtol=1e-6)
    assert -log_p.mean() == pytest.approx(fine.entropy, rel=1e-6)


def test_image_density_upper_left_pixel_is_at_negative_x_positive_y():
    levels = np.full((4, 8), 255)
    levels[0, 0] = 0
    dark = image_density(image(levels), "corner")
    x = np.asarray(dark.sample(jr.key(0), 100))
    # The longer side spans [-4, 4]; the other has half as many pixels and spans [-2, 2].
    assert (x > [-4, 1]).all()
    assert (x < [-3, 2]).all()
    assert dark.entropy == pytest.approx(0)  # a uniform density on a unit square
    bright = image_density(image(levels), "corner", invert=True)
    assert bright.entropy == pytest.approx(np.log(31))
    assert np.isneginf(bright.log_prob(jnp.array([[-3.5, 1.5]])))


def test_image_density_transparent_pixels_are_background():
    pixels = np.zeros((2, 2, 4))
    pixels[0, 0] = 255
    pixels[1, 1] = [0, 0, 0, 255]  # the others are black, but transparent
    dark, bright = (image_density(image(pixels), "p", invert=i) for i in (False, True))
    np.testing.assert_allclose(np.exp(dark.log_prob(CENTERS)), np.array([0, 0, 0, 1]) / 16)
    np.testing.assert_allclose(np.exp(bright.log_prob(CENTERS)), np.array([1, 0, 0, 0]) / 16)


def test_image_density_large_image_is_scaled_down_by_means():
    levels = np.full((40, 60), 255)
    levels[:20, :20] = 0
    levels[20:, 20:40] = np.indices((20, 20)).sum(axis=0) % 2 * 254 + 1  # a mean of 128
    small = image_density(image(levels), "large", side=3)
    p = np.exp(small.log_prob(jnp.array([[-3.0, 1.0], [0.0, -1.0], [3.0, 1.0]])))
    np.testing.assert_allclose(p * (8 / 3) ** 2, np.array([255, 127, 0]) / 382)


def test_render_text_letters_are_dark_on_light():
    letters = image_density(render_text("l"), "l")
    x = np.asarray(letters.sample(jr.key(0), 1000))
    assert np.abs(x.mean(axis=0)).max() < 0.2
    assert np.ptp(x[:, 0]) < 0.3 * np.ptp(x[:, 1])  # a stroke, not its background


def test_read_image_file_rotated_by_exif_is_upright(tmp_path):
    row = image([[0, 255, 255]])
    row.save(tmp_path / "row.png", exif=_turned())
    assert read_image_file(tmp_path / "row.png").size == (1, 3)
    row.convert("P").save(tmp_path / "palette.gif")
    x = image_density(read_image_file(tmp_path / "palette.gif"), "row").sample(jr.key(0), 10)
    assert (x[:, 0] < -1).all()


def _png():
    file = io.BytesIO()
    image(np.random.default_rng(0).integers(0, 256, (40, 40))).save(file, "PNG")
    return file.getvalue()


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    return exif


def test_read_image_file_and_image_density_bad_input_raise(tmp_path):
    for name, content, message in (
        ("text.png", b"letters", "not an image"),
        ("empty.png", b"", "not an image"),
        ("cut.png", _png()[:-500], "cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: .*{message}"):
            read_image_file(tmp_path / name)
    Image.fromarray(np.zeros((2, 2), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match="8 bits"):
        read_image_file(tmp_path / "deep.png")
    with pytest.raises(InputError, match="directory"):
        read_image_file(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        read_image_file(tmp_path / "none.png")
    with pytest.raises(InputError, match="same gray value"):
        image_density(image(np.full((3, 3), 7)), "flat")
    with pytest.raises(InputError, match="no pixels"):
        image_density(Image.new("L", (0, 3)), "nothing")
    with pytest.raises(ValueError, match="side"):
        image_density(image(LEVELS), "p", side=0)
