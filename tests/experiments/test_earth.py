"""The experiment on places, run whole on a small table."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import earth
from experiments._runner.config import Run
from experiments._runner.fields import ResNet
from experiments.earth import Earth, EarthMeasure, FlowTraining
from jcnf._checks import InputError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("places") / "places.csv"
    rng = np.random.default_rng(0)
    x = np.array([[40.0, 10], [-20, 120]])[rng.integers(0, 2, 60)] + 5 * rng.normal(size=(60, 2))
    x = np.repeat(x, 2, axis=0)
    np.savetxt(path, x, "%.4f", delimiter=",", header="lat,lon", comments="")
    return path


@pytest.fixture(scope="module")
def settings(table, tmp_path_factory):
    return Earth(
        data=table,
        seeds=2,
        components=2,
        features=2,
        field=ResNet(width=4, blocks=1),
        training=FlowTraining(steps=4, batch=8),
        measure=EarthMeasure(samples=5, cells=4, test_tolerance=1e-3),
        run=Run(out=tmp_path_factory.mktemp("earth") / "run"),
    )


@pytest.fixture(scope="module")
def finished(settings):
    run(settings)
    return settings.run.out


def run(settings):
    # optax needs promotion
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.warns(UserWarning, match="repeat the very place"),
    ):
        earth.run(settings)


def test_a_run_compares_the_models_and_draws_the_last(finished):
    summary = json.loads((finished / "summary.json").read_text())
    metrics = summary["metrics"]
    assert metrics["leaked_test_rows"] > 0.5
    for model in earth.MODELS:
        results = json.loads((finished / "results.json").read_text())[model]
        nlls = [seed["test_nll"] for seed in results["seeds"]]
        assert metrics[f"{model}_test_nll"] == pytest.approx(np.mean(nlls))
        assert metrics[f"{model}_test_nll_std"] == pytest.approx(np.std(nlls, ddof=1))
        assert metrics[f"{model}_test_nll"] < np.log(4 * np.pi)
        line = f"| {model} | {metrics[f'{model}_test_nll']:.3f}"
        assert line in (finished / "results.md").read_text()
    assert {path.name for path in (finished / "figures").iterdir()} == {"globe.png", "map.png"}
    samples = np.loadtxt(finished / "samples.csv", delimiter=",", skiprows=1)
    assert samples.shape == (5, 2)
    assert summary["numerics"]["nfe_sample"] > 0


def test_a_resumed_run_repeats_nothing_that_is_saved(finished, settings, monkeypatch):
    before = (finished / "results.json").read_bytes()
    (finished / "summary.json").unlink()
    for model in ("kernels", "combined"):
        (finished / "results" / f"{model}-1.json").unlink()
    for name in ("fit_flow", "fit_mixture"):
        monkeypatch.delattr(earth, name)
    run(dataclasses.replace(settings, resume=True))
    old, new = json.loads(before), json.loads((finished / "results.json").read_text())
    assert old["flow"] == new["flow"]
    for model in ("kernels", "combined"):
        assert old[model]["seeds"] == new[model]["seeds"]


def test_results_of_other_places_are_not_mixed_in(finished, settings, table):
    text = table.read_text()
    try:
        table.write_text(text.replace("\n", "\n0,0\n", 1))
        (finished / "summary.json").unlink(missing_ok=True)
        with pytest.raises(InputError, match="has changed"):
            earth.run(dataclasses.replace(settings, resume=True))
    finally:
        table.write_text(text)
