"""One device, four devices, and two processes with two devices each give the same numbers."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from experiments._runner.config import Loop, Training
from experiments._tasks.density2d import ToyFlow
from jcnf import Solve, sharding
from jcnf._checks import InputError
from jcnf.evaluate import chunks

HERE = Path(__file__).parent
# Groups of tasks that one worker runs together.
GROUPS = (
    ("agreement",),
    ("matching",),
    ("likelihood",),
    ("evaluation", "failing"),
    ("public", "pictures", "adjoints"),
)
LAYOUTS = {"one": (1, 1), "four": (1, 4), "two processes": (2, 2)}  # processes, devices of each


def environment(processes, devices, folder):
    """Environment variables of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = {
        **os.environ,
        "PYTHONPATH": str(HERE.parent),
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "FOUND": str(folder / "found.json"),
    }
    if processes > 1:
        found |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(processes),
        }
    return [found | {"JAX_PROCESS_ID": str(i)} for i in range(processes)]


def run(command, processes, devices, folder, timeout=300):
    """Run the command in all processes, and return the standard output of each."""
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            env=env,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for env in environment(processes, devices, folder)
    ]
    try:
        said = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, said, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [output for output, _ in said]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Results of a task of `sharding_worker` in a layout; each is run once."""
    known = {}

    def of(layout, task):
        if (layout, task) not in known:
            folder = tmp_path_factory.mktemp("worker")
            tasks = next(group for group in GROUPS if task in group)
            run([HERE / "sharding_worker.py", *tasks], *LAYOUTS[layout], folder)
            done = json.loads((folder / "found.json").read_text())
            assert done.pop("devices") == np.prod(LAYOUTS[layout])
            known.update({(layout, name): value for name, value in done.items()})
        return known[layout, task]

    return of


many = pytest.mark.parametrize("layout", ["four", "two processes"])
many_slowly = pytest.mark.parametrize(
    "layout", ["four", pytest.param("two processes", marks=pytest.mark.slow)]
)


def assert_close(one, other, rtol, atol):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(other[name], one[name], rtol, atol, err_msg=name)


def assert_trained_alike(one, other):
    """Compare losses, gradient norms, NFE and parameters of a hundred steps."""
    assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert one["losses"][-1][0] < one["losses"][0][0]


@pytest.mark.slow
@many
def test_flow_matching_takes_the_same_steps(found, layout):
    assert_trained_alike(found("one", "matching"), found(layout, "matching"))


@pytest.mark.slow
@many
def test_likelihood_takes_the_same_steps(found, layout):
    assert_trained_alike(found("one", "likelihood"), found(layout, "likelihood"))


@pytest.mark.slow
@many
def test_evaluation_is_the_same(found, layout):
    one, other = (dict(found(name, "evaluation")) for name in ("one", layout))
    for name in ("noise", "drawn"):  # bit for bit
        assert one.pop(name) == other.pop(name)
    assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert np.shape(one["samples"]) == (37, 2)


@many_slowly
def test_rows_that_fail_fail_alone_on_every_device(found, layout):
    one, other = found("one", "failing"), found(layout, "failing")
    assert_close(one, other, rtol=1e-4, atol=1e-4)
    for name in one:
        if name.endswith("failed"):
            np.testing.assert_array_equal(np.flatnonzero(one[name]), [0, 9, 40, 63])


@many
def test_processes_agree(found, layout):
    assert found(layout, "agreement") == {
        "first": {"path": "of 0", "bytes": [0, 255], "zero": "-0.0"},
        "error": "nothing there",
        "anywhere": [True, False],
        "key": np.asarray(jr.key_data(jr.key(5))).tolist(),
        "uneven": "expected a batch size that is a multiple of the 4 devices; got 65",
    }


@pytest.mark.slow
@many
@pytest.mark.parametrize("task", ["public", "pictures", "adjoints"])
def test_every_way_gives_the_same(found, layout, task):
    one, other = (dict(found(name, task)) for name in ("one", layout))
    if task == "pictures":
        # Devices exchange sums of gradients, but no images.
        assert one.pop("sent") == other.pop("sent") == []
    assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_in_two_processes(tmp_path):
    """An experiment interrupted on one device is finished by two processes of two devices."""
    words = ["--steps", "20", "--batch", "64", "--log-every", "10", "--validate-every", "10"]
    words += ["--checkpoint-every", "10", "--test-points", "100", "--cells", "20", "--frames", "2"]
    field = ["field:mlp", "--widths", "8"]
    stop = (
        "from jcnf.training import checkpoint\n"
        "save = checkpoint.save\n"
        "def until_ten(path, *rest):\n"
        "    save(path, *rest)\n"
        "    if '10' in path.stem:\n"
        "        raise SystemExit\n"
        "checkpoint.save = until_ten\n"
    )
    toy = "import runpy; runpy.run_module('experiments.toy2d', run_name='__main__')"
    whole, broken = (["--out", str(tmp_path / name)] for name in ("whole", "broken"))
    run(["-c", toy, *words, *whole, *field], 1, 1, tmp_path)
    run(["-c", stop + toy, *words, *broken, *field], 1, 1, tmp_path)
    assert not (tmp_path / "broken" / "summary.json").exists()
    more = ["--resume", "--devices", "0"]
    said = run(["-c", toy, *words, *broken, *more, *field], 2, 2, tmp_path)
    assert "test_nll" in said[0]
    assert "test_nll" not in said[1]
    one, many = (
        json.loads((tmp_path / name / "summary.json").read_text())["metrics"]
        for name in ("whole", "broken")
    )
    assert_close(one, many, rtol=1e-4, atol=1e-4)
    names = [sorted(path.name for path in (tmp_path / n).iterdir()) for n in ("whole", "broken")]
    assert names[0] == names[1]


def test_nothing_changes_outside_a_mesh():
    tree = {"x": jnp.ones((3, 2)), "keys": jr.split(jr.key(0), 3), "none": None}
    assert sharding.num_devices() == 1
    for function in (sharding.shard, sharding.shard_if_even, sharding.replicate):
        assert function(tree) is tree
    assert sharding.on_process_zero(lambda: tree) is tree
    assert not sharding.any_process(False)
    text = str(jax.make_jaxpr(sharding.shard)(jnp.ones((4, 2))))
    assert "sharding" not in text


def test_a_mesh_of_one_device_changes_nothing():
    with jax.set_mesh(sharding.make_mesh(1)):
        assert sharding.num_devices() == 1
        assert "sharding" not in str(jax.make_jaxpr(sharding.shard)(jnp.ones((4, 2))))


def test_a_chunk_is_of_the_same_rows_on_any_number_of_devices(monkeypatch):
    """Rows solved together share their steps, so a row's result depends on its chunk."""
    shapes = []

    def program(solve, x):
        shapes.append(x.shape)
        return x - x.max(), SimpleNamespace(nfe=1, failed=np.zeros(len(x), bool))

    rows, found = np.arange(37.0), []
    for number in (1, 4):
        same = {"shard": lambda batch: batch, "to_host": lambda tree: tree}
        patched = SimpleNamespace(num_devices=lambda number=number: number, **same)
        monkeypatch.setattr(chunks, "sharding", patched)
        found.append(chunks.solve_in_chunks(program, Solve(step=1.0), (rows,), 15))
    assert shapes == 3 * [(15,)] + 3 * [(16,)]
    for one, four in zip(*found, strict=True):
        np.testing.assert_array_equal(one, four)
    np.testing.assert_array_equal(found[1][0][[0, 14, 15, 36]], [-14, 0, -14, 0])


def test_bad_meshes_are_refused():
    with pytest.raises(ValueError, match="expected 1 to 1 devices; got 3"):
        sharding.make_mesh(3)
    with jax.set_mesh(jax.make_mesh((1,), ("batch",))), pytest.raises(ValueError, match="Auto"):
        sharding.num_devices()


def test_processes_are_numbered(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(InputError, match="set JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        sharding.initialize()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost")
    with pytest.raises(InputError, match="must be HOST:PORT; got 'localhost'"):
        sharding.initialize()


def test_signals_end_what_has_joined(tmp_path):
    command = (
        "import os, signal\n"
        "from experiments._runner.cli import main\n"
        "from experiments._tasks.density2d import ToyFlow\n"
        "def run(settings):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    raise AssertionError('it goes on')\n"
        "main(run, ToyFlow)\n"
    )
    env = environment(2, 1, tmp_path)[0] | {"JAX_NUM_PROCESSES": "1"}
    done = subprocess.run(
        [sys.executable, "-c", command], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr


def test_devices_must_divide_the_batches(monkeypatch):
    class Four:
        size = 4

    monkeypatch.setattr(sharding, "make_mesh", lambda devices: Four)
    ToyFlow(
        loop=Loop(devices=4), training=Training(batch=64, lbfgs_steps=1, lbfgs_batch=8)
    ).make_mesh()
    for settings in ({"batch": 66}, {"lbfgs_steps": 1, "lbfgs_batch": 9}):
        with pytest.raises(InputError, match="cannot be split among 4 devices"):
            ToyFlow(loop=Loop(devices=4), training=Training(**settings)).make_mesh()


def test_more_devices_than_there_are():
    with pytest.raises(InputError, match="--devices: expected 1 to 1 devices; got 3"):
        ToyFlow(loop=Loop(devices=3)).make_mesh()
