"""Bad input is refused early, by an error of the package that names the argument."""

import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import bad_data  # noqa: F401 (it adds cases)
import jax
import pytest
from bad_calls import CASES

import jcnf

PACKAGE = Path(jcnf.__file__).parent
# Compiled programs of the package. Anything else that is compiled is a single operation, such as
# jnp.ones.
PROGRAMS = {"_score", "_carry", "_transport", "_weigh_all", "_loss", "_flat_gradient", "_langevin"}
PROGRAMS |= {"_transform", "_transform_without_logdet", "_log_prob", "_sample_and_log_prob"}
PROGRAMS |= {"_solve_trajectory", "solve_bound"}
PROGRAMS |= {"run", "one_step", "log_prob", "_mmd_squared", "while", "scan"}
COMPILED = []


def _note(event, duration, **about):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(about["fun_name"].removeprefix("jit(").removesuffix(")"))


@contextmanager
def nothing_compiled():
    """Fail if a program of the package is compiled inside the `with` block."""
    jax.monitoring.register_event_duration_secs_listener(_note)
    COMPILED.clear()
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(_note)
    assert not PROGRAMS & set(COMPILED)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", CASES)
def test_a_bad_argument_is_refused(case):
    words, call = CASES[case]
    with nothing_compiled(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=rf"(?<!\w)({words})") as refused:
            call()
    # The package itself raises, not a library that it calls.
    assert PACKAGE in Path(refused.traceback[-1].path).parents


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_refused_in_two_seconds():
    seconds = {}
    for case, (_, call) in CASES.items():
        tic = time.perf_counter()
        with pytest.raises(ValueError):  # noqa: PT011
            call()
        seconds[case] = time.perf_counter() - tic
    assert not {case: took for case, took in seconds.items() if took >= 2}
