"""`fit_lbfgs`: one batch, one noise draw and one step plan for all steps, and where it ends."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jcnf import Solve
from jcnf.ode import NUM_BINS
from jcnf.training import fit_lbfgs

KEY = jr.key(7)
DATA = jnp.asarray(np.random.default_rng(0).normal([1.0, -0.5], [0.5, 1.5], (64, 2)))


@pytest.fixture(scope="module", autouse=True)
def promotion():
    """Optax mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def gaussian(flow, x, key):
    """Mean NLL of N(loc, diag(exp(2 log_scale))); it fails where loc[0] < 0.9, near its minimum."""
    z = (x - flow["loc"][None]) * jnp.exp(-flow["log_scale"])[None]
    nll = jnp.mean(jnp.sum(z**2, axis=1)) / 2 + jnp.sum(flow["log_scale"])
    return nll, {"failed": flow["loc"][0] < 0.9}


@pytest.mark.optimized
def test_fit_lbfgs_on_all_rows_finds_the_maximum_and_keeps_out_of_where_solves_fail():
    model = {"loc": jnp.array([1.6, -2.0]), "log_scale": jnp.array([-0.5, 0.0])}
    result = fit_lbfgs(model, DATA, key=KEY, objective=gaussian, steps=60, progress=False)
    np.testing.assert_allclose(result.flow["loc"], DATA.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(jnp.exp(result.flow["log_scale"]), DATA.std(axis=0), atol=1e-6)
    assert sum(record["skipped"] for record in result.history) == 0


def test_fit_lbfgs_has_one_batch_one_noise_draw_and_one_step_plan():
    seen = []

    def objective(model, x, key, *, solve):
        given = jnp.concatenate([jnp.ravel(x), jr.normal(key, (1,)), solve.step_plan])
        jax.debug.callback(lambda given: seen.append(np.asarray(given).tobytes()), given)
        return model**2, {"step_plan": 2 * solve.step_plan}

    settings = {"steps": 3, "batch": 8, "solve": Solve(step_plan=jnp.full(NUM_BINS, 0.25))}
    fit_lbfgs(jnp.ones(()), DATA, key=KEY, objective=objective, progress=False, **settings)
    assert len(seen) > 3
    assert len(set(seen)) == 1


def test_fit_lbfgs_ends_at_the_first_step_that_fails_and_warns():
    def failing(model, x, key):
        return model**2, {"failed": jnp.asarray(True)}

    def sample(key, num):
        return jr.normal(key, (num,))

    with pytest.warns(UserWarning, match="ended before step 50, after 1 skipped"):
        result = fit_lbfgs(
            *(jnp.ones(()), sample), key=KEY, objective=failing, steps=50, batch=4, progress=False
        )
    assert result.flow == 1
    assert [record["step"] for record in result.history] == [1]
