"""x64, strict dtype promotion, no rank promotion, and the annotations checked.

Tests of numbers are marked `optimized` and compiled as users compile. The others compile without
XLA's optimizations, in a third of the time, which is most of what they take.
"""

import os

os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)

import gc

import jax
import jaxtyping
import pytest

# Tracing makes millions of objects that live on, and going over them took a tenth of the time.
gc.set_threshold(100_000, 50, 1000)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOMS = [
    *("_checks", "sharding", "distributions", "fields", "divergence", "regularizers", "ode"),
    *("flows", "objectives", "training", "evaluate", "inference"),
]
jaxtyping.install_import_hook([f"jcnf.{name}" for name in ROOMS], "beartype.beartype")


@pytest.fixture
def unchecked():
    """Annotations unchecked: the package's own errors, as people meet them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def as_users_compile(request):
    """Tests marked `optimized` need a process without flags: `XLA_FLAGS= pytest -m optimized`."""
    if request.node.get_closest_marker("optimized") and os.environ["XLA_FLAGS"]:
        pytest.fail("run this test by `make test`, or by `XLA_FLAGS= pytest -m optimized`")
