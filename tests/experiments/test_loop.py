"""The training loop of the experiments, on a model that compiles quickly."""

import dataclasses
import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments._runner import run_dir
from experiments._runner.config import Loop, LoopExperiment, Run, Training
from experiments._runner.loop import fit
from experiments._runner.recorder import MAX_ROLLBACKS
from experiments._runner.run_dir import RunDir
from experiments._runner.signals import Stopped
from experiments._runner.stages import Stage, train_stages
from jcnf import Solve, sharding, training
from jcnf._checks import InputError
from jcnf.ode import NUM_BINS
from jcnf.training import Snapshot, checkpoint

DRIVER = importlib.import_module("jcnf.training.fit")  # the function hides the module
MAX_SKIPS = DRIVER.MAX_SKIPS
ADAM, SGD = optax.adam(0.1), optax.sgd(0.01)
TARGET = jnp.array([1.0, -2.0])
START = {"w": jnp.zeros(2)}
DATA = jnp.asarray(np.random.default_rng(0).normal(size=(50, 2)))


def squares(model, x, key, *, solve=None):
    """(w - target)^2 with noise and with a step plan that each step passes to the next; it fails
    where w has diverged."""
    plan = jnp.zeros(NUM_BINS)
    if solve is not None and solve.step_plan is not None:
        plan = solve.step_plan
    loss = jnp.sum((model["w"] - TARGET + 0.1 * jnp.mean(x, axis=0) + 0.01 * plan[0]) ** 2)
    failed = jnp.max(jnp.abs(model["w"])) > 1e3
    return loss, {"nll": loss, "failed": failed, "step_plan": 0.5 * plan + loss}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(LoopExperiment):
    training: Training = Training(steps=40)
    loop: Loop = Loop(log_every=5, checkpoint_every=10, validate_every=20)
    run: Run = Run()

    def make_stages(self):
        """Two stages with different optimizers."""
        steps = self.training.steps
        first = Stage(squares, steps, ADAM, Solve(), average=0.9, batch=8)
        return [first, first._replace(optimizer=SGD, steps=steps // 2)]


@pytest.fixture(autouse=True, scope="module")
def promotion():
    """Allow optax's Adam to mix dtypes, which is an error elsewhere in the tests."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True, scope="module")
def programs():
    """Reuse compiled programs when a run is resumed."""
    known, plain = {}, DRIVER.make_train_loop

    def make(model, objective, draw_batch, optimizer, **settings):
        def compiled(*arguments):
            name = objective, optimizer
            if name not in known:
                loop = plain(model, objective, draw_batch, optimizer, **settings)
                known[name] = loop.compile(*arguments)
            return known[name]

        return SimpleNamespace(compile=compiled)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DRIVER, "make_train_loop", make)
        yield


def before_each_dispatch(monkeypatch, act):
    """Call `act(state)` before each dispatch."""
    plain = DRIVER.make_train_loop

    def make(*args, **settings):
        def compiled(*arguments):
            program, nothing = plain(*args, **settings).compile(*arguments)

            def run(state, *others):
                act(state)
                return program(state, *others)

            return run, nothing

        return SimpleNamespace(compile=compiled)

    monkeypatch.setattr(DRIVER, "make_train_loop", make)


def distance(model):
    return float(jnp.sum((model["w"] - TARGET) ** 2))


def settings_of(out, *, resume=False, seed=0, **loop):
    loop = dataclasses.replace(Settings().loop, resume=resume, **loop)
    return Settings(loop=loop, run=Run(out=out, seed=seed))


def trained(out, *, validate=distance, stages=None, data=DATA, **given):
    settings = settings_of(out, **given)
    run = RunDir("toy2d", settings)
    return fit(run, settings, START, training.draw_rows, data, validate, stages=stages)


def log_of(out):
    """The records without the times."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    times = ("step_ms", "train_s")
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in lines]


def newest(out):
    """The arrays of the newest checkpoint, as bytes, and the progress that it notes."""
    path = max((out / "checkpoints").glob("*.jcnf"))
    notes = checkpoint.read_notes(path)
    numbers = {name: value for name, value in notes["snapshot"].items() if name != "seconds"}
    return path.read_bytes().split(b"\n", 1)[1], notes["run_state"], numbers


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, trained(out)


def assert_the_same(out, whole):
    assert log_of(out) == log_of(whole[0])
    assert newest(out) == newest(whole[0])


def test_an_uninterrupted_run(whole):
    out, fitted = whole
    assert distance(fitted.flow) == fitted.score < 0.1
    records = log_of(out)
    assert [r["step"] for r in records] == list(range(5, 61, 5))
    assert [r["step"] for r in records if "val_nll" in r] == [20, 40, 60]
    assert all(r["loss"] == r["nll"] > 0 and r["skipped"] == 0 for r in records)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        f"0000000{step}.jcnf" for step in (40, 50, 60)
    ]
    assert fitted.numerics() == {"skipped_updates": 0, "rollbacks": 0}
    assert 0 < fitted.timing["checkpoint_stall_s"] < fitted.timing["fit_s"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(tmp_path, whole, monkeypatch, number):
    """The run is stopped after every step."""
    if signal.getsignal(number) == signal.SIG_IGN:  # as in a shell's background jobs
        signal.signal(number, signal.SIG_DFL)
    handler = signal.getsignal(number)
    before_each_dispatch(monkeypatch, lambda state: os.kill(os.getpid(), number))
    out = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["toy2d", "--steps", "40"])
    for stop in range(1, 61):
        with pytest.raises(Stopped, match=f"stopped at step {stop}, which is saved") as stopped:
            trained(out, resume=stop > 1)
        assert stopped.value.number == number
        again = f"python -m experiments.toy2d --steps 40 --out {out} --resume"
        assert str(stopped.value).endswith(again)
    trained(out, resume=True)
    assert_the_same(out, whole)
    assert signal.getsignal(number) == handler


def test_a_run_killed_at_its_very_beginning_goes_on(tmp_path):
    """The kill comes in the first write, or right after it."""
    out = tmp_path / "run"
    out.mkdir()
    (out / ".config.json.123").write_bytes(b"{")
    RunDir("toy2d", settings_of(out))
    (out / "figures").rmdir()
    run = RunDir("toy2d", settings_of(out, resume=True))
    run.write_json("figures/of.json", [1])


def test_a_second_signal_does_not_wait(tmp_path):
    def twice(model):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it waited")

    with pytest.raises(Stopped):
        trained(tmp_path / "run", validate=twice)


@pytest.mark.parametrize("harm", ["truncated", "flipped"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path, whole, harm):
    out = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        trained(out, validate=lambda model: distance(model) if steps_in(out) < 35 else 1 / 0)
    path = max((out / "checkpoints").glob("*.jcnf"))
    content = path.read_bytes()
    flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    path.write_bytes(content[:-9] if harm == "truncated" else flipped)
    with pytest.warns(UserWarning, match=f"{path.name}.damaged: going on from step 20"):
        fitted = trained(out, resume=True)
    assert_the_same(out, whole)
    assert distance(fitted.flow) == distance(whole[1].flow)


def steps_in(out):
    return max((r["step"] for r in log_of(out)), default=0)


def test_without_its_checkpoints_a_run_is_not_begun_anew(tmp_path, whole):
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):
        content = (whole[0] / name).read_bytes()
        (out / name).write_bytes(content.replace(str(whole[0]).encode(), str(out).encode()))
    with pytest.raises(InputError, match=r"has no checkpoint, though metrics.jsonl goes to step 6"):
        trained(out, resume=True)
    assert log_of(out) == log_of(whole[0])


def unfinished(out):
    """A run that ended at step 20 of 40."""
    with pytest.raises(ZeroDivisionError):
        trained(out, validate=lambda model: distance(model) if steps_in(out) < 35 else 1 / 0)
    return out


@pytest.mark.parametrize("line", [b"garbage", b"5", b"{}", b"\xff\xfe", b'{"step": null}'])
def test_a_damaged_line_of_the_log_is_named_and_the_others_stay(tmp_path, line):
    log = unfinished(tmp_path / "run") / "metrics.jsonl"
    lines = log.read_bytes().splitlines()
    content = b"\n".join([lines[0], line, *lines[2:]])
    log.write_bytes(content)
    with pytest.raises(InputError, match=r"line 2 of .*metrics\.jsonl is damaged: repair it"):
        trained(tmp_path / "run", resume=True)
    assert log.read_bytes() == content


def test_a_last_line_of_the_log_that_a_kill_cut_short_is_written_anew(tmp_path, whole):
    out = unfinished(tmp_path / "run")
    with (out / "metrics.jsonl").open("ab") as log:
        log.write(b'{"step": 40, "lo\xc3')
    trained(out, resume=True)
    assert_the_same(out, whole)


def test_without_its_log_a_run_is_not_gone_on_with(tmp_path):
    out = unfinished(tmp_path / "run")
    (out / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="has no record, though the newest checkpoint is from"):
        trained(out, resume=True)


HOLD = """
import filelock, sys
with filelock.FileLock(sys.argv[1]):
    print(flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_go_on_with_one_run(tmp_path, whole):
    out = unfinished(tmp_path / "run")
    filelock.FileLock(out / ".lock", is_singleton=True).release(force=True)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, out / ".lock"], **pipes) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(InputError, match="in use by another process: wait for it to end"):
            trained(out, resume=True)
    trained(out, resume=True)
    assert_the_same(out, whole)


@pytest.mark.parametrize("content", ["[1]", "5", "{", "\x00", "[" * 100_000])
def test_a_damaged_config_is_refused(tmp_path, content):
    out = unfinished(tmp_path / "run")
    (out / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json is damaged: restore it"):
        trained(out, resume=True)


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ({"versions": {"jcnf": "0.0.1"}}, "was written by jcnf 0.0.1, this is "),
        ({"config": {"training": {"steps": 41}}}, r"other settings \(.*steps 41 -> 40"),
        ({"run_state": None}, "is not a checkpoint of a training"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_by_name(tmp_path, whole, notes, message):
    out = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        trained(out, validate=lambda model: 1 / 0)
    path = max((out / "checkpoints").glob("*.jcnf"))
    header, payload = path.read_bytes().split(b"\n", 1)
    written = json.loads(header)["notes"]
    for name, change in notes.items():
        if change is None:
            del written[name]
        else:
            written[name] |= change
    head = {"format": checkpoint.FORMAT, "sha256": checkpoint._digest(written, payload)}
    head |= {"bytes": len(payload), "notes": written}
    path.write_bytes(json.dumps(head).encode() + b"\n" + payload)
    with pytest.raises(InputError, match=message):
        trained(out, resume=True)


def test_other_data_than_before_are_told(tmp_path, recwarn):
    out = unfinished(tmp_path / "run")
    for data, times in ((DATA, 0), (DATA.at[7, 1].add(1.0), 1)):
        with pytest.raises(ZeroDivisionError):
            trained(out, resume=True, data=data, validate=lambda model: 1 / 0)
        told = [str(each.message) for each in recwarn]
        assert sum("the data have changed" in each for each in told) == times


def test_processes_of_different_data_are_refused(tmp_path, monkeypatch):
    def first(make):
        made = make()
        return "another digest" if isinstance(made, str) else made

    monkeypatch.setattr(sharding, "on_process_zero", first)
    with pytest.raises(InputError, match="different data: give each of them the same files"):
        trained(tmp_path / "run")


def test_other_versions_of_the_libraries_are_told(tmp_path, monkeypatch):
    out = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        trained(out, validate=lambda model: 1 / 0)
    later = run_dir.versions() | {"jax": "99"}
    monkeypatch.setattr(run_dir, "versions", lambda: later)
    with pytest.warns(UserWarning, match="bit for bit: jax"):
        trained(out, resume=True)


def test_losses_of_nan_are_skipped_and_counted(tmp_path):
    """Some batches of 8 out of 50 rows contain row 0."""

    def objective(model, x, key, *, solve):
        loss, metrics = squares(model, x, key)
        return jnp.where(jnp.any(x == DATA[0][None]), jnp.nan, loss), metrics

    stages = [stage._replace(objective=objective) for stage in Settings().make_stages()]
    with pytest.warns(UserWarning, match="were skipped"):
        fitted = trained(tmp_path / "run", stages=stages)
    records = log_of(tmp_path / "run")
    skipped = sum(r["skipped"] for r in records)
    assert 0 < skipped == sum(r["skipped_loss"] for r in records) < 20
    assert fitted.skipped == skipped
    assert distance(fitted.flow) < 0.1


def wild(rate):
    """Plain gradient descent, which diverges at a rate above 1 and not below."""
    stage = Settings().make_stages()[0]
    return [stage._replace(optimizer=optax.sgd(rate), steps=300, average=0.0)]


def test_training_that_breaks_down_goes_back_at_a_smaller_rate(tmp_path):
    out = tmp_path / "run"
    with pytest.warns(UserWarning, match=r"back from step \d+ to step 0, at 0.0625 times"):
        fitted = trained(out, stages=wild(6.0))
    assert fitted.rollbacks == 2, "6 / 4 is still above 1"
    assert distance(fitted.flow) < 0.1
    place = checkpoint.read_notes(out / "checkpoints" / "000000300.jcnf")["run_state"]
    assert [r["rate"] for r in place["rollbacks"]] == [1 / 4, 1 / 16]
    # Each time, exactly the 50 steps before the rollback failed.
    assert fitted.skipped == 2 * MAX_SKIPS
    records = log_of(out)
    assert [r["step"] for r in records] == list(range(5, 301, 5)), "cut back each time"
    assert all(np.isfinite(r["loss"]) for r in records)


def climbing(limit, **others):
    """w rises by 0.1 per step at the full rate; steps fail above `limit`."""

    def objective(model, x, key, *, solve):
        return -model["w"][0], {"failed": model["w"][0] > limit}

    stage = Settings().make_stages()[0]
    return [stage._replace(objective=objective, optimizer=optax.sgd(0.1), average=0.0, **others)]


def rollbacks_of(out):
    return json.loads((out / "report.json").read_text())["rollbacks"]


def test_a_return_waits_for_a_checkpoint_that_is_still_being_written(tmp_path, monkeypatch):
    save, out = checkpoint.save, tmp_path / "run"

    def slowly(path, *others):
        if path.stem == "000000020":
            time.sleep(1)
        save(path, *others)

    monkeypatch.setattr(checkpoint, "save", slowly)
    with pytest.raises(InputError, match="details are in"):
        trained(out, stages=climbing(1.35, steps=1000), validate_every=1000)
    # Back from 1.4 to 1.0, at 0.025 per step; that breaks down after step 20, where w is 1.25.
    assert [r["to"] for r in rollbacks_of(out)][:2] == [10, 20]


def test_a_signal_between_skipped_updates_leaves_what_is_gone_back_to(tmp_path, monkeypatch):
    """This also holds if only one checkpoint is kept."""
    parts, out, stops = climbing(2.05, steps=1000), tmp_path / "run", [30, 45]

    def stop(state):
        if stops and int(state.step) == stops[0]:
            del stops[0]
            os.kill(os.getpid(), signal.SIGTERM)

    before_each_dispatch(monkeypatch, stop)
    again = {"keep_checkpoints": 1, "validate_every": 1000, "stages": parts}
    for _ in range(2):
        with pytest.raises(Stopped):
            trained(out, resume=out.exists(), **again)
    with pytest.raises(InputError, match="details are in"):
        trained(out, resume=True, **again)
    first = rollbacks_of(out)[0]
    assert (first["from"], first["to"]) == (71, 20)


def test_the_best_parameters_outlive_a_return_to_before_them(tmp_path):
    """w is best at step 20, and after the second return trains on from step 10."""
    out = tmp_path / "run"
    fitted = trained(
        out,
        stages=climbing(2.05, steps=100),
        validate=lambda model: abs(float(model["w"][0]) - 2),
        validate_every=10,
    )
    assert fitted.rollbacks == 2
    assert log_of(out)[1]["step"] == 10
    assert log_of(out)[-1]["val_nll"] > 0.4
    assert fitted.score == abs(float(fitted.flow["w"][0]) - 2) < 1e-9
    notes = checkpoint.read_notes(out / "checkpoints" / "000000010.jcnf")
    assert notes["run_state"]["best_step"] == 10, "it has the best parameters"


@pytest.mark.parametrize("reason", ["solve", "loss", "gradient"])
def test_training_that_cannot_go_on_says_why_and_keeps_the_last_good_state(tmp_path, reason):
    out = tmp_path / "run"

    def bad(model, x, key, *, solve):
        loss, metrics = squares(model, x, key)
        late = model["w"][0] > 0.5
        if reason == "loss":
            loss = jnp.where(late, jnp.nan, loss)
        if reason == "gradient":
            loss = loss + 0 * jnp.sqrt(jnp.where(late, 0.0, 1.0) * jnp.sum(model["w"] ** 2))
        return loss, metrics | {"failed": late & (reason == "solve")}

    stage = Settings().make_stages()[0]._replace(objective=bad, steps=500)
    with pytest.raises(InputError, match=f"nor after {MAX_ROLLBACKS} rollbacks .* details are in"):
        trained(out, stages=[stage])
    report = json.loads((out / "report.json").read_text())
    assert report["steps_without_update"] == MAX_SKIPS
    rates = [0.25**n for n in range(1, MAX_ROLLBACKS + 1)]
    assert [r["rate"] for r in report["rollbacks"]] == rates
    assert report["learning_rate_factor"] == 0.25**MAX_ROLLBACKS
    assert report["last_records"][-1][f"skipped_{reason}"] == 5
    path = max((out / "checkpoints").glob("*.jcnf"))
    (state, _), notes = checkpoint.load(path, Snapshot.first(START, stage.optimizer).arrays)
    assert float(state.params["w"][0]) <= 0.5 + 0.1
    assert int(state.stuck) == 0
    assert len(notes["run_state"]["rollbacks"]) == MAX_ROLLBACKS


def test_stages_without_a_loop_say_where_they_break_down(recwarn):
    with pytest.warns(UserWarning, match="ended before step 100, after 50 skipped updates"):
        trained = train_stages(START, climbing(0.55, steps=100), training.draw_rows, DATA)
    assert (trained.steps, trained.skipped) == (6 + MAX_SKIPS, MAX_SKIPS)
    train_stages(START, climbing(0.55, steps=6), training.draw_rows, DATA)
    assert not [each for each in recwarn if each.category is UserWarning]


def test_a_stage_on_one_batch_ends_where_it_breaks_down(tmp_path):
    stage = wild(6.0)[0]._replace(fixed=True)
    with pytest.warns(UserWarning, match="ended before step 300, after 1 skipped"):
        fitted = trained(tmp_path / "run", stages=[stage])
    assert (fitted.skipped, fitted.rollbacks) == (1, 0)
    assert log_of(tmp_path / "run")[-1]["step"] < 10


@pytest.mark.parametrize("allowed", [0, 1, 2, 3, 5, 8])
def test_a_full_disk_ends_the_run_with_the_last_checkpoint_whole(
    tmp_path, monkeypatch, whole, allowed
):
    """The disk is full after `allowed` files; with free space, the run then ends as usual."""
    out, written, replace = tmp_path / "run", [], os.replace

    def filling(*paths):
        written.append(paths)
        if len(written) > allowed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(*paths)

    monkeypatch.setattr(os, "replace", filling)
    with pytest.raises((OSError, InputError), match="No space left"):
        trained(out)
    monkeypatch.undo()
    for path in (out / "checkpoints").glob("*"):
        checkpoint.read_notes(path)
    trained(out, resume=(out / "config.json").exists())
    assert_the_same(out, whole)


def test_noise_and_data_order_come_from_seed_and_step(tmp_path, whole):
    again = trained(tmp_path / "again")
    assert_the_same(tmp_path / "again", whole)
    other = trained(tmp_path / "other", seed=1)
    assert distance(again.flow) == distance(whole[1].flow) != distance(other.flow)
