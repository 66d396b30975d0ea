"""Fields with the tails of a Gaussian of the data: untrained flows, and saved runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import gaussian_1d
from experiments._runner.config import Run
from experiments._runner.fields import FlowSettings, Logistic, Normal
from experiments._runner.objectives import FlowMatching
from experiments._runner.run_dir import RunDir, load_flow
from experiments._tasks.density2d import ToyFlow
from jcnf import Solve
from jcnf.fields import GaussianTails, ResNet

ROWS = np.random.default_rng(0).multivariate_normal([5.0, -3.0], [[4.0, 1.2], [1.2, 0.5]], 4000)


def untrained(**flow):
    settings = ToyFlow(objective=FlowMatching(reach=3.0), flow=FlowSettings(**flow))
    return settings.make_flow(2, data=ROWS)


@pytest.mark.parametrize(
    "flow",
    [
        {"t1": 3.0},
        {"base": Normal(base_scale=3.0)},
        {"base": Logistic()},
        {"t1": 2.0, "trainable_end_time": True},
    ],
    ids=["t1", "base_scale", "logistic", "trainable_end_time"],
)
def test_far_from_the_data_an_untrained_flow_has_their_covariance(flow):
    """There the flow is an affine map, so two directions of the base tell its covariance."""
    flow = untrained(**flow)
    z = 1e6 * jnp.asarray([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    origin, *ends = flow.bijection.forward(z, None, Solve(rtol=1e-8, atol=1e-8))[0]
    std = float(flow.base.distribution().stddev()[0])
    columns = std * (jnp.stack(ends) - origin[None]) / 1e6
    np.testing.assert_allclose(columns.T @ columns, np.cov(ROWS.T), rtol=1e-3, atol=1e-3)


def test_the_flow_of_a_run_is_loaded_with_its_gaussian(tmp_path):
    flow = FlowSettings(trainable_end_time=True)
    settings = ToyFlow(objective=FlowMatching(reach=3.0), flow=flow, run=Run(out=tmp_path / "run"))
    flow = settings.make_flow(2, data=ROWS)
    RunDir("toy2d", settings).save_flow(flow, {})
    loaded, _, _ = load_flow(tmp_path / "run", ToyFlow)
    np.testing.assert_allclose(loaded.bijection.field.reference.mean, ROWS.mean(axis=0))
    assert jax.tree.structure(loaded) == jax.tree.structure(flow)
    assert all(map(np.array_equal, jax.tree.leaves(loaded), jax.tree.leaves(flow)))


def test_a_reach_of_0_leaves_the_field_alone():
    settings = ToyFlow(objective=FlowMatching(reach=0.0))
    assert isinstance(settings.make_flow(2, data=ROWS).bijection.field, ResNet)


def test_the_reference_of_gaussian_1d_is_that_of_its_points(tmp_path, monkeypatch):
    class Made(Exception):
        pass

    def fit(run_dir, settings, flow, *, data, **others):
        field = flow.bijection.field
        assert isinstance(field, GaussianTails)
        np.testing.assert_allclose(field.reference.mean, np.mean(data, axis=0))
        np.testing.assert_allclose(field.reference.std, np.std(data, axis=0, ddof=1))
        raise Made

    monkeypatch.setattr(gaussian_1d, "fit", fit)
    settings = gaussian_1d.Gaussian1D(
        objective=FlowMatching(reach=3.0), run=Run(out=tmp_path / "run")
    )
    with pytest.raises(Made):
        gaussian_1d.run(settings)
