"""x64, strict dtype promotion, no rank promotion, and the annotations of the core checked.

Programs are compiled as users compile them: no XLA flag is set here.
"""

import jax
import jaxtyping
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

CORE = [
    "errors",
    "parallel",
    "fields",
    "divergence",
    "regularizers",
    "distributions",
    "runge_kutta",
    "norms",
    "solve",
    "integrate",
    "pixels",
    "flow",
    "bijective",
    "nice",
    "cnf",
    "chain",
    "multiscale",
    "trajectories",
    "as_distrax",
    "augmented",
    "inpaint",
    "vae",
    "paths",
    "times",
    "couplings",
    "objectives",
    "train",
    "checkpoint",
    "keeper",
    "evaluate",
    "gaussian",
    "impute",
]
jaxtyping.install_import_hook([f"jcnf.{name}" for name in CORE], "beartype.beartype")


@pytest.fixture
def unchecked():
    """Annotations unchecked: the package's own errors, as people meet them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
