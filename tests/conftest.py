"""Test settings: x64, strict dtype promotion, no rank promotion, and checked annotations.

Tests of numbers are marked `optimized` and compiled as users compile. The others are compiled
without XLA's optimizations, which takes a third of the time; compiling is most of their run time.
"""

import os

# A program is compiled in one part: parts cost more in all, and other tests use the other cores.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1",
)

import gc

import jax
import jaxtyping
import pytest

# Tracing makes millions of long-lived objects, and collecting garbage among them took a tenth of
# the time.
gc.set_threshold(100_000, 50, 1000)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOMS = [
    *(
        "_checks",
        "_rows",
        "sharding",
        "distributions",
        "fields",
        "divergence",
        "manifolds",
        "regularizers",
        "ode",
    ),
    *("flows", "objectives", "training", "evaluate", "inference"),
]
jaxtyping.install_import_hook([f"jcnf.{name}" for name in ROOMS], "beartype.beartype")


@pytest.fixture
def unchecked():
    """Leave annotations unchecked, so that the package raises its own errors, as for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def as_users_have_jax():
    """Leave float32 and the promotion of dtypes and ranks, which optax and numpyro need."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


@pytest.fixture(autouse=True)
def as_users_compile(request):
    """Fail tests marked `optimized` in a process with XLA flags."""
    if request.node.get_closest_marker("optimized") and os.environ["XLA_FLAGS"]:
        pytest.fail("run this test with `make test`, or with `XLA_FLAGS= pytest -m optimized`")
