"""The benchmark: its arithmetic, its suites at a tiny size, its flags, and installed peers."""

import dataclasses
import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import (
    cases,
    evaluate,
    matching,
    ours,
    peers,
    quality,
    roofline,
    scaling,
    startup,
    step,
    timing,
    unrolled,
)
from experiments.benchmark import Benchmark
from jcnf import Solve
from jcnf._checks import InputError

pytestmark = pytest.mark.usefixtures("promotion")
LOOSE = Solve(rtol=1e-3, atol=1e-3)


@pytest.fixture
def promotion():
    """Promotion as it is outside of tests, which optax needs for powers of whole numbers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def tiny():
    return dataclasses.replace(cases.table(dim=3, width=8, batch=8), solve=LOOSE, head=20)


def test_ratios_are_of_the_rounds_that_both_were_in():
    np.testing.assert_allclose(
        timing.ratios(np.array([2.0, 8.0]), np.array([1.0, 2.0, 5.0])), [2.0, 4.0]
    )
    assert timing.quartiles("ms", np.array([1.0, 2.0, 3.0, 4.0, 5.0])) == {
        "ms": 3.0, "ms_q1": 2.0, "ms_q3": 4.0
    }  # fmt: skip


def test_programs_take_turns_after_runs_that_are_not_timed(monkeypatch):
    monkeypatch.setattr(timing, "TURN_SECONDS", 0.0)
    order = []
    programs = {
        name: timing.Program(lambda name=name: order.append(name), {"loss": 1.0}, work=4)
        for name in "ab"
    }
    results = timing.measure(programs, 3)
    assert order[-6:] == list("ababab")
    assert len(order) > 6
    assert results["a"]["ratio"] == 1
    assert results["b"]["rounds"] == 3
    assert results["b"]["loss"] == 1.0


def test_a_turn_of_a_short_program_is_many_runs(monkeypatch):
    monkeypatch.setattr(timing, "TURN_SECONDS", 0.05)
    runs = []
    program = timing.Program(lambda: (runs.append(0), time.sleep(0.005)), {})
    result = timing.measure({"short": program}, 2)["short"]
    assert len(runs) > 10
    assert 5 <= result["ms"] < 50


def test_a_program_that_takes_too_long_sits_out():
    calls = []
    programs = {"ours": timing.Program(lambda: None, {}), "slow": timing.Program(
        lambda: calls.append(np.linalg.svd(np.ones((60, 60)))), {})}  # fmt: skip
    results = timing.measure(programs, 5, seconds=0.0)
    assert results["slow"]["rounds"] == 1
    assert np.isfinite(results["slow"]["ratio"])


def test_flops_of_a_product():
    a, b = jnp.ones((6, 10)), jnp.ones((10, 7))
    assert roofline.flops(jnp.matmul, a, b) == 2 * 6 * 10 * 7


def test_losses_agree_or_not():
    assert step.agrees(2.00005, 2.0)
    assert not step.agrees(2.001, 2.0)
    assert not step.agrees(float("nan"), 2.0)


def test_a_program_of_another_loss_is_not_timed(tiny, capsys):
    right = timing.Program(lambda: None, {"loss": ours.loss(tiny)})
    tight = timing.Program(lambda: None, {"loss": ours.loss(tiny) + 1})
    kept = step.agreeing(tiny, lambda case: {"right": right, "wrong": tight}, {})
    assert list(kept) == ["right"]
    assert "wrong: not timed" in capsys.readouterr().out


@pytest.mark.slow
def test_the_step_of_all_jax_programs_is_the_same_work(tiny):
    results = step.run(tiny, 1, 1.0, with_peers=False)
    assert list(results) == [
        "jcnf", "jcnf, norm=worst", "jcnf, fresh batches", "jcnf, fresh batches, no step plan",
        "batched diffrax", "batched diffrax, tuned",
        "per-sample diffrax", "per-sample diffrax, tuned", "jcnf, Hutchinson",
    ]  # fmt: skip
    exact = [r for name, r in results.items() if not ("Hutchinson" in name or "fresh" in name)]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([r[name] for r in exact], exact[0][name], rtol=1e-3)
    fresh, unaided = (results[f"jcnf, fresh batches{how}"] for how in ("", ", no step plan"))
    assert fresh["loss"] == pytest.approx(unaided["loss"], rel=1e-3) != results["jcnf"]["loss"]
    assert fresh["nfe"] < unaided["nfe"]


@pytest.mark.slow
def test_the_unrolled_program_computes_our_loss(tiny):
    # Larger weights, with which a solve takes several steps.
    flow, solve = jax.tree.map(lambda a: 3 * a, tiny.flow), Solve(rtol=1e-5, atol=1e-5)
    steep = dataclasses.replace(tiny, flow=flow, solve=solve)
    here = ours.training_step(steep)
    again = ours.training_step(steep, unrolled.objective(steep, again=True))
    program = ours.training_step(steep, unrolled.objective(steep))
    assert again.figures["grad_norm"] == pytest.approx(here.figures["grad_norm"], rel=1e-9)
    assert program.figures["loss"] == pytest.approx(here.figures["loss"], rel=1e-9)
    assert program.figures["grad_norm"] == pytest.approx(here.figures["grad_norm"], rel=1e-9)
    # The last evaluation of ours serves only the error estimate.
    assert program.figures["nfe"] == here.figures["nfe"] - 1 >= 3 * 6


@pytest.mark.slow
def test_an_unrolled_program_of_other_steps_is_not_timed(tiny, monkeypatch, capsys):
    times = np.linspace(1, 0, 3)
    monkeypatch.setattr(unrolled, "accepted_times", lambda case: times)
    assert list(roofline.run(tiny, 1, 1.0, 1.0)) == [ours.NAME]
    assert capsys.readouterr().out.count("not timed") == 2


@pytest.mark.slow
def test_many_points_at_one_accuracy(tiny):
    for time_points in (evaluate.log_probs, evaluate.samples):
        found = time_points(tiny, 30, 1, 1.0, with_peers=False)
        assert list(found) == list(evaluate.ERRORS)
        for error, results in found.items():
            assert len(results) == 3  # plain, with a step plan, and diffrax
            for result in results.values():
                assert result["error"] <= error
                assert result["tolerance"] in evaluate.TOLERANCES
                assert result["points"] == 30


def test_the_fastest_of_those_that_are_accurate():
    loose, tight, slow = (
        evaluate.Found("tsit5", *of)
        for of in ((1e-2, 1e-3, 1.0), (1e-3, 1e-5, 2.0), (0.1, 0.0, 3.0))
    )
    assert evaluate.fastest([slow, loose, tight], 1e-3) == loose
    assert evaluate.fastest([slow, loose, tight], 1e-4) == tight
    assert evaluate.fastest([loose], 1e-4) is None


@pytest.mark.slow
def test_flow_matching_against_bare_passes(monkeypatch):
    monkeypatch.setattr(matching, "BATCH", 8)
    monkeypatch.setattr(matching, "STEPS_PER_DISPATCH", 2)
    results = matching.run(matching.residual(2, 4), 1, 1.0)
    assert set(results) == {"jcnf", "bare passes"}


def test_scaling_fits_an_exponent():
    curves = {"batch": {"jcnf": ([1.0, 2.0, 4.0], [3.0, 12.0, 48.0])}}
    assert scaling.exponents(curves) == {"jcnf, exponent of batch": pytest.approx(2.0)}


@pytest.mark.slow
def test_scaling_takes_every_point_of_its_grid():
    grid = {"dim": (2,), "tolerance": (1e-2,)}
    found = scaling.run(1, 1.0, False, 1, grid, say=lambda line: None)
    assert found["dim"]["jcnf"][0] == [2]
    assert found["tolerance"]["jcnf"][0] == [1e-2]


def test_quality_follows_a_training_to_its_target():
    gaps = iter([0.5, 0.15, 0.15, 0.04])
    learner = quality.Learner(lambda steps: None, lambda x: -next(gaps) * np.ones(3))
    follower = quality.Follower(None, np.zeros(3), limit=100.0)
    quality.follow(learner, follower)
    curve = follower.curve
    assert curve[1] == pytest.approx([0.5, 0.15, 0.15, 0.04])
    assert quality.seconds_to(0.2, curve) == curve[0][1]
    assert quality.seconds_to(0.01, curve) is None


def test_startup_times_processes_of_their_own(monkeypatch):
    monkeypatch.setattr(startup, "IMPORTS", {"json": "import json", "csv": "import csv"})
    monkeypatch.setattr(startup, "FIRST_STEP", "pass")
    results = startup.run(1)
    assert list(results)[:2] == ["import json", "import csv"]
    assert results["import json"]["ratio"] == 1


def test_peers_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(peers, "PACKAGES", ("no_such_peer",))
    with pytest.raises(InputError, match=r"no_such_peer: pip install .* '\.\[peers\]'"):
        Benchmark(peers=True).trace()


def test_a_peer_that_cannot_be_imported_is_named_and_left_out(monkeypatch, capsys):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist\nand more")

    monkeypatch.setattr(peers.importlib, "import_module", broken)
    peers._program_of.cache_clear()
    assert peers.load("torchdyn") == peers.load("torchdyn") == {}
    peers._program_of.cache_clear()
    said = "  torchdyn: left out because it cannot be imported (operator torchvision::nms does "
    assert capsys.readouterr().out == said + "not exist)\n"


@pytest.mark.slow
def test_a_run_writes_its_numbers_and_no_torch_is_imported(tmp_path):
    script = "import sys; from experiments import benchmark\n"
    script += "from experiments._runner.cli import main\n"
    script += "benchmark.startup.FIRST_STEP = 'pass'\n"
    script += "main(benchmark.run, benchmark.Benchmark); assert 'torch' not in sys.modules"
    flags = ["--suites", "startup", "--rounds", "1", "--out", tmp_path / "run"]
    done = subprocess.run([sys.executable, "-c", script, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    assert written["conditions"]["threads"] >= 1
    assert {"conditions", "startup"} == set(written)
    assert "summary.json" in [path.name for path in (tmp_path / "run").iterdir()]


@pytest.fixture(scope="module", params=["toy", "circles", "table"])
def case_and_gradient(request):
    """A case and the norm of our gradient."""
    pytest.importorskip("torch")
    with jax.numpy_dtype_promotion("standard"):
        kind = request.param
        case = cases.table(dim=3, width=8, batch=8) if kind == "table" else cases.CASES[kind](0)
        case = dataclasses.replace(case, batch=16)
        return case, ours.training_step(case).figures["grad_norm"]


@pytest.mark.parametrize("name", ["torchdiffeq", "torchdyn", "zuko"])
def test_a_peer_has_our_loss_and_gradient(name, case_and_gradient):
    pytest.importorskip(name)
    case, grad_norm = case_and_gradient
    peer = peers.load(name)[name]
    programs = step.agreeing(case, peer.training_steps, {})
    assert programs
    for program in programs.values():
        assert program.figures["grad_norm"] == pytest.approx(grad_norm, rel=1e-2)


def test_torchcfm_has_our_loss(monkeypatch):
    pytest.importorskip("torchcfm")
    monkeypatch.setattr(matching, "STEPS_PER_DISPATCH", 2)
    assert "torchcfm" in matching.against_torchcfm(matching.dense(2, 8), 1, 1.0)
