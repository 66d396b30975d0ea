"""Bad input is refused early, in plain words: what was found, where, and what to do."""

import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import jax
import pytest
from bad_calls import FLOWS, SETTINGS, TRAINING
from bad_data import DATA, MEASURES

import jcnf

PACKAGE = Path(jcnf.__file__).parent
CALLS = FLOWS | SETTINGS | TRAINING | MEASURES | DATA
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


def test_the_table_is_long():
    assert len(CALLS) == sum(map(len, (FLOWS, SETTINGS, TRAINING, MEASURES, DATA))) >= 150


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", CALLS)
def test_a_bad_call_is_refused(name):
    call, words = CALLS[name]
    with nothing_compiled(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError) as refused:  # noqa: PT011 (the words are in the table)
            call()
    for word in words:
        assert word in str(refused.value)
    # The package itself raises, not a library that it calls.
    assert PACKAGE in Path(refused.traceback[-1].path).parents


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_bad_calls_are_refused_in_two_seconds():
    seconds = {}
    for name, (call, _) in CALLS.items():
        tic = time.perf_counter()
        with pytest.raises(ValueError):  # noqa: PT011
            call()
        seconds[name] = time.perf_counter() - tic
    assert not {name: took for name, took in seconds.items() if took >= 2}
