"""Settings of the tests of simulation-based inference."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _as_users_have_jax():
    """Leave promotion of dtypes and ranks as it is by default, for optax's Adam and numpyro."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield
