"""float32 by default, x64 on request, and fields in bfloat16 under states of float32."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import jcnf
from jcnf import CNF, Solve, fields, objectives, training
from jcnf.distributions import StandardNormal
from jcnf.ode import check_tolerance


@pytest.mark.slow
def test_a_field_in_bfloat16_under_states_of_float32():
    with jax.enable_x64(False):
        flow = CNF(fields.MLP(2, (16,), key=jr.key(0)), StandardNormal(2))
        x = jr.normal(jr.key(1), (32, 2))
        solve = Solve(solver="rk4", step=0.25)

        def loss(params, dtype):
            objective = objectives.likelihood
            if dtype is not None:
                objective = objectives.cast_fields(objective, dtype)
            whole = training.with_params(flow, params)
            return objective(whole, x, None, solve=solve)[0]

        both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
        params = training.partition(flow)[0]
        (exact, _), (low, gradient) = both(params, None), both(params, jnp.bfloat16)
    assert low.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert 0 < abs(float(low - exact)) < 4 * float(jnp.finfo(jnp.bfloat16).eps)


@pytest.mark.parametrize(("dtype", "finest"), [("float32", 1e-7), ("float64", 1e-15)])
def test_tolerances_end_where_the_dtype_does(dtype, finest):
    check_tolerance(Solve(rtol=finest, atol=finest), dtype)
    check_tolerance(Solve(rtol=finest / 100, atol=finest), dtype)
    check_tolerance(Solve(step=0.1), "bfloat16")
    with pytest.raises(ValueError, match=f"for {dtype}; got {finest / 100:g}: raise it"):
        check_tolerance(Solve(rtol=finest / 100, atol=finest / 100), dtype)


def test_gradients_of_tolerances_beyond_float32_are_refused_too():
    with jax.enable_x64(False):
        flow = CNF(fields.MLP(2, (4,), key=jr.key(0)), StandardNormal(2))
        solve = Solve(rtol=1e-9, atol=1e-9, adjoint="reversible")
        with pytest.raises(ValueError, match="float32; got 1e-09: raise it, or use float64"):
            jcnf.sample(flow, jr.key(1), 3, solve=solve)
