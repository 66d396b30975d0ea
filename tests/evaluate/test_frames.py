"""The way from a call of the library to a field is short enough to follow."""

import traceback
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import pytest

import jcnf
from jcnf import evaluate
from jcnf.distributions import StandardNormal
from jcnf.fields import Field

PACKAGE = Path(jcnf.__file__).parent
X = jnp.zeros((10, 2))


class Stop(Exception):
    """Carries the functions of the package that were running when the field was called."""


class Witness(Field):
    """A field without a closed form that stops at its first call."""

    dim: int = eqx.field(static=True, default=2)

    def __call__(self, t, x, context=None):
        frames = [(Path(f.filename), f.name) for f in traceback.extract_stack()]
        raise Stop([f"{file}: {name}" for file, name in frames if PACKAGE in file.parents])


@pytest.mark.parametrize(
    ("call", "most"),
    [
        (lambda flow: evaluate.log_prob(flow, X), 11),
        (lambda flow: jcnf.log_prob(flow, X), 11),
        (lambda flow: jcnf.trajectory(flow, X, jnp.array([0.0, 1.0])), 7),
    ],
    ids=["evaluate.log_prob", "log_prob", "trajectory"],
)
def test_a_field_is_few_calls_away(call, most):
    with pytest.raises(Stop) as stopped:
        call(jcnf.CNF(Witness(), StandardNormal(2)))
    (functions,) = stopped.value.args
    assert len(functions) <= most, "\n".join(functions)
