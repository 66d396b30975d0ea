"""Tests of what figures draw and count, and that they change no global state of matplotlib."""

import ast
import io
import pickle
import sys
from pathlib import Path

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from jcnf import plot
from jcnf.plot import _style, density

RNG = np.random.default_rng(0)
TIMES = np.linspace(0.0, 1.0, 12)


def eight(n, rng=RNG):
    angle = 2 * np.pi * rng.integers(0, 8, n) / 8
    return 3 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.2 * rng.normal(size=(n, 2))


def peak(x, y, n=(61, 81), extent=4.0):
    gx, gy = np.linspace(-extent, extent, n[1]), np.linspace(-extent, extent, n[0])
    return -((gx[None] - x) ** 2 + (gy[:, None] - y) ** 2) / 0.02


def straight(n, times=TIMES):
    start, end = np.random.default_rng(1).normal(size=(n, 2)), eight(n, np.random.default_rng(2))
    return (1 - times)[:, None, None] * start + times[:, None, None] * end


def records(n=100, **extra):
    return [{"step": 10 * i, "loss": 2.0 + 1 / (1 + i), **extra} for i in range(n)]


def panels(figure):
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


def pixels(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)


def assert_equal_aspect(figure):
    for ax in panels(figure):
        box = ax.get_window_extent()
        data = np.ptp(ax.get_xlim()) / np.ptp(ax.get_ylim())
        assert box.width / box.height == pytest.approx(data, rel=1e-3)


def assert_same_limits(axes):
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in axes}) == 1


def all_figures():
    x = eight(300)
    yield plot.densities(x, x, peak(0, 0), 4.0, title="title")
    yield plot.trajectories(straight(20), TIMES)
    yield plot.snapshots(straight(20), TIMES)
    yield plot.training_curves(records(nfe=8))
    yield plot.pairs(x, x, ["a", "b"])
    yield plot.histogram(x[:, 0], x[:, 1], TIMES, TIMES)


def test_plot_modules_import_no_matplotlib_at_the_top():
    for module in (density, _style):
        body = ast.parse(Path(module.__file__).read_text()).body
        imports = [
            ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        assert not [line for line in imports if "matplotlib" in line or "PIL" in line]


def test_figures_are_savable_and_leave_no_global_state(tmp_path):
    before, pyplot = dict(mpl.rcParams), "matplotlib.pyplot" in sys.modules
    for i, figure in enumerate(all_figures()):
        assert isinstance(figure, Figure)
        figure.savefig(tmp_path / f"{i}.png")
        with Image.open(tmp_path / f"{i}.png") as image:
            assert 800 <= image.width <= 1400 or i == 4  # a pair plot of two columns is small
    assert dict(mpl.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot


def test_figures_show_themselves_in_notebooks():
    figure = plot.trajectories(straight(5), TIMES)
    for each in (figure, pickle.loads(pickle.dumps(figure))):
        with Image.open(io.BytesIO(each._repr_png_())) as image:
            assert image.size == (600, 600)


def test_titles_stay_inside_the_figure_and_do_not_overlap():
    bad = eight(400)
    bad[:5], bad[5:20] = np.nan, 50.0
    grid = peak(0, 0)
    grid[:2] = np.nan
    u = np.concatenate([straight(390), np.full((len(TIMES), 10, 2), np.nan)], axis=1)
    u[:, :3] = 1e5
    for figure in (
        plot.densities(bad, bad, grid, 4, true_log_density=grid),
        plot.densities(bad, bad, grid, 4, title="title"),
        plot.snapshots(u, TIMES),
        plot.training_curves(records(nfe=1, step_ms=np.inf, grad_norm=1, skipped=0)),
    ):
        boxes = [ax.title.get_window_extent() for ax in panels(figure)]
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
        assert all(box.y0 >= 0 and box.y1 <= figure.bbox.y1 + 1 for box in boxes)
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


# --- densities


@pytest.mark.parametrize("count", [2_000, 20_000])
def test_densities_share_view_scale_and_aspect(count):
    figure = plot.densities(
        eight(count), eight(count), peak(0, 0), 4.0, true_log_density=peak(1, 1)
    )
    axes = panels(figure)
    assert len(axes) == 4
    assert_same_limits(axes)
    assert axes[0].get_xlim() == (-4, 4)
    assert_equal_aspect(figure)
    assert [ax.get_xlabel() for ax in axes] == ["$x_1$"] * 4
    assert axes[0].get_ylabel() == "$x_2$"
    assert [ax.get_title().split("\n")[0] for ax in axes] == [
        "data",
        "samples",
        "model log-density",
        "true log-density",
    ]
    assert axes[2].images[0].get_clim() == axes[3].images[0].get_clim() == (-8, 0)
    assert figure.axes[-1].get_ylabel() == "log-density (nats)"
    assert "8 nats" in axes[2].get_title()
    if count > _style.MAX_DOTS:
        assert axes[0].images[0].get_clim() == axes[1].images[0].get_clim()
    else:
        assert [len(ax.collections[0].get_offsets()) for ax in axes[:2]] == [count, count]


def test_densities_grid_entry_i_j_is_drawn_at_x_j_y_i():
    figure = plot.densities(eight(10), eight(10), peak(3, -2), 4.0, nats=4)
    rgb = pixels(figure)
    ax = panels(figure)[2]
    row, column = np.nonzero((np.abs(rgb - [253, 231, 37]) < 30).all(axis=-1))
    inside = column < ax.get_window_extent().x1  # not the color bar
    center = np.array([column[inside].mean() + 0.5, len(rgb) - row[inside].mean() - 0.5])
    np.testing.assert_allclose(ax.transData.inverted().transform(center), [3, -2], atol=0.05)


def test_densities_of_many_points_are_drawn_at_the_points():
    cloud = np.array([3.0, -2.0]) + 0.02 * RNG.normal(size=(6_000, 2))
    image = panels(plot.densities(cloud, cloud, peak(0, 0), (-4, 4, -6, 2)))[0].images[0]
    counts, (x0, x1, y0, y1) = image.get_array().filled(0), image.get_extent()
    i, j = np.unravel_index(counts.argmax(), counts.shape)
    assert image.origin == "lower"
    assert x0 + (j + 0.5) / counts.shape[1] * (x1 - x0) == pytest.approx(3, abs=0.2)
    assert y0 + (i + 0.5) / counts.shape[0] * (y1 - y0) == pytest.approx(-2, abs=0.2)
    assert counts.sum() == pytest.approx(1)


def test_densities_titles_count_non_finite_and_outside():
    data, grid = eight(100), peak(0, 0)
    data[:3, 0], data[3:5] = [np.nan, np.inf, -np.inf], 1e6
    grid[0, :7], grid[-1] = np.nan, -np.inf
    titles = [ax.get_title() for ax in panels(plot.densities(data, eight(90), grid, 4))]
    assert titles[0] == "data\n97 points\n3 non-finite dropped\n2 outside the view"
    assert titles[1] == "samples\n90 points"
    assert "7 cells non-finite (red)" in titles[2]


def test_densities_without_finite_points_still_draw():
    nothing = np.full((5, 2), np.nan)
    figure = plot.densities(nothing, np.empty((0, 2)), np.full((4, 4), -np.inf), 1)
    assert "5 non-finite" in panels(figure)[0].get_title()


# --- paths


def test_trajectories_decreasing_times_still_run_from_base_to_data():
    paths = straight(900)
    for figure in (plot.trajectories(paths, TIMES), plot.trajectories(paths[::-1], TIMES[::-1])):
        (ax,) = panels(figure)
        lines, base, end = ax.collections
        # Pieces of paths in order of time, from the color of the base to that of the data.
        assert len(lines.get_segments()) == plot.MAX_PATHS * (len(TIMES) - 1)
        assert np.diff(lines.get_array()).min() >= 0
        np.testing.assert_allclose(lines.get_segments()[0], paths[:2, 0])
        figure.canvas.draw()
        first, last = lines.get_colors()[[0, -1], :3]
        assert np.ptp(first) < 0.1 < 0.5 < np.ptp(last)
        np.testing.assert_allclose(base.get_offsets()[0], paths[0, 0])
        np.testing.assert_allclose(end.get_offsets()[-1], paths[-1, -1])
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [
            "t = 0, base",
            "t = 1, data end",
        ]
        assert ax.get_title() == "100 of 900 paths"
        assert_equal_aspect(figure)


def test_trajectories_outliers_are_counted_and_do_not_widen_the_view():
    paths = straight(80)
    paths[5:, 7], paths[-1, 9] = np.nan, 1e30
    (ax,) = panels(plot.trajectories(paths, TIMES))
    assert ax.get_title() == "79 paths, 1 non-finite dropped, 1 outside the view"
    assert np.abs([*ax.get_xlim(), *ax.get_ylim()]).max() < 8
    (ax,) = panels(plot.trajectories(paths, TIMES, extent=(-1, 2, -3, 4)))
    assert (ax.get_xlim(), ax.get_ylim()) == ((-1, 2), (-3, 4))


@pytest.mark.parametrize("batch", [100, 6_000])
def test_snapshots_show_five_times_in_one_view(batch):
    paths = straight(batch)
    paths[-1, :4] = np.nan
    figure = plot.snapshots(jnp.asarray(paths), TIMES)
    axes = panels(figure)
    assert [ax.get_title().split("\n")[0] for ax in axes] == [
        f"t = {TIMES[i]:.2f}" for i in (0, 3, 5, 8, 11)
    ]
    assert_same_limits(axes)
    assert_equal_aspect(figure)
    assert "4 non-finite dropped" in axes[-1].get_title()
    assert "non-finite" not in axes[0].get_title()
    if batch > _style.MAX_DOTS:
        assert len({ax.images[0].get_clim() for ax in axes}) == 1


# --- the GIF


@pytest.mark.slow
def test_animation_has_a_frame_per_time_and_is_small(tmp_path):
    times = np.linspace(0, 1, 60)
    path = plot.animation(tmp_path / "flow.gif", straight(3_000, times), times)
    assert path.stat().st_size < 2e6
    assert list(tmp_path.iterdir()) == [path]
    with Image.open(path) as gif:
        durations = []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            durations.append(gif.info["duration"])
    assert durations == [50] * 59 + [1050]


def test_animation_dots_move_with_the_particles(tmp_path):
    x = np.linspace(-3, 3, len(TIMES))
    paths = np.stack([x, 0 * x], axis=1)[:, None] + 0.1 * RNG.normal(size=(1, 50, 2))
    forward = plot.animation(tmp_path / "a.gif", paths, TIMES, extent=4)
    backward = plot.animation(str(tmp_path / "b.gif"), paths[::-1], TIMES[::-1], extent=4)
    assert forward.read_bytes() == backward.read_bytes()
    centers = []
    with Image.open(forward) as gif:
        for frame in range(gif.n_frames):
            gif.seek(frame)
            rgb = np.asarray(gif.convert("RGB")).astype(int)
            centers.append(np.nonzero(rgb[..., 0] - rgb[..., 2] > 100)[1].mean())
    assert len(centers) == len(TIMES)
    assert np.diff(centers).min() > 0.05 * gif.width


def test_animation_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "flow.gif"
    path.write_text("old")

    def broken(_, part, *__, **___):
        Path(part).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        plot.animation(path, straight(10), TIMES)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("flow.gif", "old")]


# --- curves


def test_training_curves_have_a_panel_for_each_key_that_occurs():
    rows = records(100, nfe=14, unknown=3)
    rows[50]["val_nll"], rows[20]["loss"], rows[30]["loss"] = 1.5, float("nan"), 1e4
    rows.append({"step": 40, "loss": 2.5})  # logged again after a resume
    rows.append({"step": 50, "loss": None})
    figure = plot.training_curves(rows)
    axes = panels(figure)
    assert [ax.get_title().split("\n")[0] for ax in axes] == [
        "training loss (nats)",
        "validation NLL (nats)",
        "field evaluations (NFE)",
    ]
    assert axes[0].get_title().split("\n")[1:] == ["1 non-finite dropped", "1 outside the view"]
    assert axes[0].get_ylim()[1] < 4
    assert all(ax.get_shared_x_axes().joined(ax, axes[0]) for ax in axes)
    assert {ax.get_xlabel() for ax in axes} == {"step"}
    raw, smooth = axes[0].lines
    x, y = raw.get_data()
    assert len(x) == 98  # without the NaN and the null
    assert y[list(x).index(40)] == 2.5
    assert smooth.get_label() == "median of 5"
    assert smooth.get_ydata()[-1] == np.median(y[-5:])
    assert len(axes[1].lines) == 1


def test_training_curves_name_the_loss_and_take_logarithms():
    figure = plot.training_curves(records(10, grad_norm=0.1), loss_units="squared error")
    axes = panels(figure)
    assert axes[0].get_title() == "training loss (squared error)"
    assert axes[1].get_yscale() == "log"
    assert len(axes[0].lines) == 1  # too few points to smooth


def test_training_curves_mark_the_best_validation_and_do_not_zoom_into_its_noise():
    rows = records(60, skipped=0)
    for i, row in enumerate(rows):
        row["val_nll"] = 2.8 + 1e-3 * np.cos(i)  # least at i = 22, of all cosines up to 59
    figure = plot.training_curves(rows)
    loss, validation = panels(figure)  # no panel of skipped steps, which are always 0
    np.testing.assert_array_equal(
        validation.collections[0].get_offsets(), [[220, rows[22]["val_nll"]]]
    )
    (label,) = (text.get_text() for text in validation.get_legend().get_texts())
    assert label == "best: 2.799 at step 220"
    assert np.ptp(validation.get_ylim()) == pytest.approx(0.1)
    assert not loss.collections


@pytest.mark.parametrize(("number", "rows"), [(1, [1]), (3, [3]), (5, [3, 2]), (7, [3, 2, 2])])
def test_rows_of_panels_fill_the_figure(number, rows):
    figure = _style.new_figure(9, 6)
    axes = _style.panels_in(figure, number, 3)
    figure.draw_without_rendering()
    tops = [round(ax.get_position().y1, 6) for ax in axes]
    assert [tops.count(top) for top in sorted(set(tops), reverse=True)] == rows
    for top in set(tops):
        row = [ax.get_position() for ax, y in zip(axes, tops, strict=True) if y == top]
        assert min(box.x0 for box in row) < 0.1
        assert max(box.x1 for box in row) > 0.97


def test_training_curves_without_known_keys_raise():
    none = [{"step": 1, "skipped": 0}]
    for rows, message in (([], "no curve"), (none, "no curve"), ([{"loss": 1}], "step")):
        with pytest.raises(ValueError, match=message):
            plot.training_curves(rows)


# --- tables


def test_pairs_of_eight_columns_draw_six_with_limits_from_the_data():
    data = RNG.normal(size=(400, 8))
    samples = data[:300].copy()
    data[0, 2], samples[:3, 1], samples[3, 0], data[1, 7] = 1e9, np.nan, 1e9, np.nan
    figure = plot.pairs(data, samples, [f"c{i}" for i in range(8)])
    axes = np.reshape(panels(figure), (6, 6))
    assert figure.get_suptitle().split("\n") == [
        "first 6 of 8 columns",
        "data: 400 rows, 1 outside the view",
        "samples: 297 rows, 3 non-finite dropped, 1 outside the view",
        "scatter plots: 297 rows of each",
    ]
    assert [ax.get_xlabel() for ax in axes[-1]] == [ax.get_ylabel() for ax in axes[:, 0]]
    for i in range(6):
        ours, theirs = axes[i, i].patches
        np.testing.assert_array_equal(ours.get_data().edges, theirs.get_data().edges)
        assert axes[i, i].get_xlim()[1] < 6
        for j in range(i):
            assert axes[i, j].get_xlim() == axes[j, i].get_ylim()
            assert axes[i, j].get_ylim() == axes[j, i].get_xlim() == axes[i, i].get_xlim()
    below, above = axes[1, 0].collections[0].get_offsets(), axes[0, 1].collections[0].get_offsets()
    np.testing.assert_array_equal(below, _style.thin(data, 297)[:, [0, 1]])
    np.testing.assert_array_equal(above, samples[4:, [1, 0]])


def test_histogram_counts_all_mass_and_draws_the_density():
    data = np.concatenate([RNG.standard_t(2, 5_000), [np.nan, 1e7]])
    grid = np.linspace(-6, 6, 50)
    figure = plot.histogram(
        data, RNG.normal(size=(800, 1)), grid[::-1], np.exp(-grid), "depth (km)"
    )
    (ax,) = panels(figure)
    assert "data: 5,001 values, 1 non-finite dropped" in ax.get_title()
    low, high = ax.get_xlim()
    assert -40 < low < high < 40
    finite = data[np.isfinite(data)]
    heights, edges, _ = ax.patches[0].get_data()
    seen = np.mean((finite >= low) & (finite <= high))
    assert (heights * np.diff(edges)).sum() == pytest.approx(seen, rel=1e-12)
    np.testing.assert_allclose(ax.lines[0].get_data(), [grid, np.exp(grid)])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("depth (km)", "density")
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["data", "samples", "model density"]


@pytest.mark.parametrize(
    "x", [np.zeros(9), np.array([5.0]), np.r_[np.zeros(99), 1e6], np.array([]), np.r_[1e38, -1e300]]
)
def test_histogram_of_degenerate_column_has_finite_limits(x):
    low, high = panels(plot.histogram(x, x))[0].get_xlim()
    assert np.isfinite([low, high]).all()
    assert low < high


# --- wrong input

X, G = np.zeros((9, 2)), np.zeros((4, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot.densities(X[:, 0], X, G, 1), r"data of shape \(batch, 2\); got \(9,\)"),
        (lambda: plot.densities(X, np.zeros((9, 3)), G, 1), "samples of shape"),
        (lambda: plot.densities(X, X, G[0], 1), "log_density of shape"),
        (lambda: plot.densities(X, X, G, 1, true_log_density=G[0]), "true_log_density of shape"),
        (lambda: plot.densities(X, X, G[:1], 1), "2 x 2"),
        (lambda: plot.densities(X, X, G, 0), "extent > 0"),
        (lambda: plot.densities(X, X, G, (0, 1, 2)), "extent > 0"),
        (lambda: plot.densities(X, X, G, (1, 0, 0, 1)), "extent > 0"),
        (lambda: plot.trajectories(X, TIMES), "paths of shape"),
        (lambda: plot.trajectories(straight(3), TIMES[1:]), "one for each of the 12 rows"),
        (lambda: plot.snapshots(straight(3), TIMES * np.nan), "finite times"),
        (lambda: plot.animation("x.gif", straight(3)[:1], TIMES[:1]), "two or more"),
        (lambda: plot.pairs(X, X, ["a"]), "histogram"),
        (lambda: plot.pairs(X, X[:, :1], ["a", "b"]), "samples of shape"),
        (lambda: plot.histogram(X, X[:, 0]), r"data of shape \(batch,\)"),
        (lambda: plot.histogram(X[:, 0], X[:, 0], grid=TIMES), "grid and density together"),
        (lambda: plot.histogram(X[:, 0], X[:, 0], TIMES, TIMES[1:]), "grid and density together"),
    ],
)
def test_plot_functions_wrong_shapes_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
