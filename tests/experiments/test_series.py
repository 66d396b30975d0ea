"""Learned trajectories: their files when a run is resumed, and their figures."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TIGHT, Linear
from PIL import Image

from experiments._tasks.series import SCORE, LearnedSeries
from jcnf import plot
from jcnf._checks import InputError
from jcnf.data.series import spiral
from jcnf.objectives import sample_windows

RNG = np.random.default_rng(0)
DATA = RNG.normal(size=(20, 2))
CURVES = RNG.normal(size=(5, 30, 2))
TITLES = [f"step {i}" for i in range(5)]
SCENE = plot.Scene(DATA, CURVES[0])
W = jnp.array([[-0.1, -1.0], [1.0, -0.1]])


@pytest.mark.slow
def test_learner_resumed_keeps_one_trajectory_per_validation(tmp_path):
    saved = {}
    (tmp_path / "figures").mkdir()
    run_dir = SimpleNamespace(
        path=tmp_path, log=tmp_path / "metrics.jsonl", save_figures=saved.update
    )
    series = spiral("linear", points=50, noise=0)
    draw_all = sample_windows(None, shortest=1.0, longest=2.0, rows=4)
    solves = {"solve": TIGHT, "val_solve": TIGHT}
    learner = LearnedSeries(run_dir, series, held_out=0, draw_all=draw_all, **solves)

    def logged(scores):
        lines = [{"step": i} | ({} if s is None else {SCORE: s}) for i, s in enumerate(scores)]
        run_dir.log.write_text("".join(json.dumps(line) + "\n" for line in lines))

    truth, _ = learner.follow(Linear(W, dim=2), np.array([0.6, 0.3]))
    np.testing.assert_allclose(truth, learner.truth, atol=1e-6)
    scores = [learner.validate(Linear(W, dim=2))]
    assert scores[0] < 1e-7
    for i in range(3):
        logged([*scores, None])
        scores.append(learner.validate(Linear((1 + i) * W, dim=2)))
    assert learner.curves().shape == (4, len(truth), 2)
    # Resumed from a checkpoint after the second one: what is not in the log is done again.
    logged(scores[:2])
    again = learner.validate(Linear(5 * W, dim=2))
    assert again not in scores
    kept = learner.curves()
    assert kept.shape == (3, len(truth), 2)
    np.testing.assert_allclose(kept[0], truth, atol=1e-6)
    assert np.max(np.abs(kept[2] - truth)) > 0.1
    learner.draw_learning([{"step": i, SCORE: s} for i, s in enumerate((*scores[:2], again))])
    assert set(saved) == {"fit", "learning"}
    assert Image.open(tmp_path / "figures" / "learning.gif").n_frames == 3
    for content in (b"", b"?", learner.file.read_bytes()[:-1]):
        learner.file.write_bytes(content)
        with pytest.raises(InputError, match=r"trajectories\.npy is damaged: restore it"):
            learner.curves()


def test_learning_has_a_panel_for_each_curve():
    figure = plot.learning(CURVES, TITLES, SCENE)
    assert [ax.get_title() for ax in figure.axes] == TITLES
    for ax, curve in zip(figure.axes, CURVES, strict=True):
        lines = {line.get_label(): line.get_xydata() for line in ax.lines}
        np.testing.assert_allclose(lines["learned"], curve)
        np.testing.assert_allclose(lines["data"], DATA)
        np.testing.assert_allclose(lines["truth"], CURVES[0])
    far = plot.learning(1e30 * CURVES, TITLES, SCENE)
    assert far.axes[0].get_xlim() == figure.axes[0].get_xlim()


def test_against_time_draws_held_out_rows_apart():
    times = np.linspace(0, 1, 30)
    settings = {"truth": CURVES[1], "held_out": 3}
    data_times = np.linspace(0, 1, 20)
    figure = plot.against_time(times, CURVES[0], data_times, DATA, ("year", "a", "b"), **settings)
    assert [ax.get_ylabel() for ax in figure.axes] == ["a", "b"]
    assert figure.axes[-1].get_xlabel() == "year"
    for i, ax in enumerate(figure.axes):
        lines = {line.get_label(): line.get_ydata() for line in ax.lines}
        np.testing.assert_allclose(lines["learned"], CURVES[0, :, i])
        np.testing.assert_allclose(lines["truth"], CURVES[1, :, i])
        np.testing.assert_allclose(lines["data"], DATA[:-3, i])
        np.testing.assert_allclose(lines["held out"], DATA[-3:, i])


def test_learning_animation_has_a_frame_for_each_curve(tmp_path):
    path = plot.learning_animation(tmp_path / "learning.gif", CURVES, TITLES, SCENE)
    with Image.open(path) as gif:
        assert gif.n_frames == 5
        gif.seek(4)
        assert gif.info["duration"] >= 1000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot.learning(CURVES, TITLES[1:], SCENE), "a title for each of 5 curves; got 4"),
        (lambda: plot.learning(CURVES[0], TITLES, SCENE), "curves of shape"),
        (
            lambda: plot.learning_animation("no.gif", CURVES[:0], [], SCENE),
            "a title for each of 0 curves; got 0",
        ),
        (
            lambda: plot.against_time(DATA[:, 0], DATA, DATA[:5, 0], DATA, "tab"),
            "a name for the time and for each component; got 5 times for data",
        ),
    ],
)
def test_learning_figures_wrong_shapes_raise(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
