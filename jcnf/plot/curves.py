"""Curves on logarithmic axes, which show how something scales, and training curves."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jcnf.plot import _style as c
from jcnf.plot._style import DATA, FIGURE_WIDTH, MODEL, Figure

MAX_MARKERS = 15  # on a curve
Values = Sequence[float] | np.ndarray


class CurvePanel(NamedTuple):
    """Named series of (x, y) on one pair of logarithmic axes, joined by lines unless `unjoined`."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[Values, Values]]
    labels: Mapping[str, str] = MappingProxyType({})  # for the legend, instead of names
    unjoined: Collection[str] = ()  # names of series whose points are not steps of one run
    levels: Mapping[str, float] = MappingProxyType({})  # y of horizontal lines, by their labels


@c.styled
def scaling(panels: Sequence[CurvePanel]) -> Figure:
    """Show each panel's series as lines with markers, with one color for each name.

    Every second line is dashed, and later ones have smaller markers, so that all show where they
    coincide. Points that are not positive and finite cannot be shown on logarithmic axes and are
    left out. Panels with the same legend share one.
    """
    if not panels:
        raise ValueError("expected at least one panel; got none")
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    figure = c.new_figure(c.FIGURE_WIDTH, 3.6)
    for ax, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, (x, y) in panel.series.items():
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            drawn = np.isfinite(y) & (y > 0)
            label = panel.labels.get(name, name)
            style = _nested(names.index(name), len(names), name not in panel.unjoined)
            marked = c.thin(np.arange(drawn.sum()), MAX_MARKERS).tolist()
            ax.plot(x[drawn], y[drawn], label=label, markevery=marked, **style)
        ax.set(xscale="log", yscale="log", title=panel.title)
        ax.set(xlabel=panel.x_label, ylabel=panel.y_label)
        for label, level in panel.levels.items():
            ax.axhline(level, color="black", lw=0.8, ls=":")
            at = {"xy": (0.01, level), "xycoords": ("axes fraction", "data")}
            shift = {"xytext": (0, 3), "textcoords": "offset points"}
            ax.annotate(label, **at, **shift, fontsize=8)
        c.plain_ticks(ax.xaxis, ax.yaxis)
        ax.grid()
    legends = [ax.get_legend_handles_labels() for ax in figure.axes]
    if len(panels) > 1 and all(texts == legends[0][1] for _, texts in legends):
        figure.legend(*legends[0], loc="outside lower center", ncols=len(names))
    else:
        for ax in figure.axes:
            ax.legend()
    return figure


def _nested(place: int, number: int, joined: bool) -> dict[str, Any]:
    """Return a style in which series that coincide stay visible, drawn in order of their places."""
    depth = 1 - place / (number - 1) if number > 1 else 0.0  # 1 for the first, 0 for the last
    line = "-" if place % 2 == 0 else (0, (4, 2))
    return {
        "color": c.color_of(place),
        "ls": line if joined else "",
        "lw": 1.1 + 1.2 * depth,
        "marker": c.MARKERS[place % len(c.MARKERS)],
        "ms": 4.5 + 4.0 * depth if joined else 7.0,
        "mfc": "none",
        "mew": 1.2,
    }


def scaling_exponent(x: Values, y: Values) -> float:
    """Return p of the fit y = c x^p, by least squares on logarithms.

    **Raises:** `ValueError` for fewer than 2 points, and for values that are not positive and
    finite.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2:
        raise ValueError(f"expected x and y of at least 2 points; got {x.shape} and {y.shape}")
    if not all(np.all((values > 0) & (values < np.inf)) for values in (x, y)):
        raise ValueError(f"expected x and y positive and finite; got {x} and {y}")
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


class Curve(NamedTuple):
    """How one key of a training's records is drawn."""

    title: str  # with units
    smooth: bool = False  # also as a running median
    logarithmic: bool = False
    least_view: float = 0.0  # height of the view at least, so that noise does not fill it
    from_zero: bool = False
    mark_least: bool = False  # whether the least value is the best one


CURVES = {
    "loss": Curve("training loss ({})", smooth=True),
    "val_nll": Curve("validation NLL (nats)", least_view=0.1, mark_least=True),
    "val_bits": Curve("validation bits/dim", least_view=0.05, mark_least=True),
    "val_kl": Curve("validation KL (nats)", logarithmic=True, mark_least=True),
    "val_negative_elbo": Curve("validation $-$ELBO (nats)", least_view=0.1, mark_least=True),
    "train_nll": Curve("NLL of all points (nats)", least_view=0.1),
    "train_rmse": Curve("RMSE of windows", logarithmic=True),
    "nfe": Curve("field evaluations (NFE)", from_zero=True),
    "step_ms": Curve("time per step (ms)", smooth=True, from_zero=True),
    "grad_norm": Curve("gradient norm", smooth=True, logarithmic=True),
    "skipped": Curve("skipped steps", from_zero=True),
}


@c.styled
def training_curves(records: Sequence[Mapping[str, Any]], *, loss_units: str = "nats") -> Figure:
    """Show what a run logged against its steps: a panel for each key of `CURVES` that occurs.

    The best validation is marked. `records` are the lines of metrics.jsonl, each with "step"; keys
    that are absent, null, unknown or always 0 are skipped. Records of the same step are merged and
    later values win, as after a resume.

    **Raises:** `ValueError` if a record has no step, or no record has a known key that is not 0.
    """
    merged: dict[float, dict[str, Any]] = {}
    for record in records:
        if "step" not in record:
            raise ValueError(f'expected "step" in each record; got only {sorted(record)}')
        merged.setdefault(record["step"], {}).update(record)
    rows = [merged[step] for step in sorted(merged)]
    keys = [key for key in CURVES if any(row.get(key) not in (None, 0) for row in rows)]
    if not keys:
        raise ValueError(f"no curve to draw: log at least one of {', '.join(CURVES)}, not all 0")
    most = len(keys) if len(keys) < 4 else -(-len(keys) // 2)  # panels in a row
    figure = c.new_figure(FIGURE_WIDTH, 2.3 * -(-len(keys) // most) + 0.2)
    axes = c.panels_in(figure, len(keys), most, share=True)
    for ax, key in zip(axes, keys, strict=True):
        curve = CURVES[key]
        every = np.array([[r["step"], r[key]] for r in rows if r.get(key) is not None], np.float64)
        kept = c.finite(every)
        x, y = kept.T
        half = len(y) // 40 if curve.smooth else 0
        raw: Any = {"lw": 0.6, "alpha": 0.6} if half else {"marker": "." if len(y) < 60 else ""}
        ax.plot(x, y, color=DATA, label="logged", **raw)
        if half:
            windows = np.lib.stride_tricks.sliding_window_view(y, 2 * half + 1)
            label = f"median of {2 * half + 1}"
            ax.plot(x[half:-half], np.median(windows, axis=1), color=DATA, label=label)
            ax.legend()
        logarithmic = curve.logarithmic and bool((y > 0).all())
        low, high = np.exp(c.limits_of(np.log(y))) if logarithmic else c.limits_of(y)
        if not logarithmic and high - low < curve.least_view:
            low, high = (low + high + curve.least_view * np.array([-1, 1])) / 2
        if curve.from_zero:
            low, high = 0.0, high + 0.1 * abs(high)
        notes = c.notes("", len(every), kept, [-np.inf, low], [np.inf, high])[1:]
        ax.set(yscale="log" if logarithmic else "linear", ylim=(low, high))
        if logarithmic:
            c.plain_ticks(ax.yaxis)
        if curve.mark_least and len(y) > 1:
            best = int(np.argmin(y))
            label = f"best: {y[best]:.4g} at step {x[best]:g}"
            ring: Any = {"s": 50, "facecolors": "none", "edgecolors": MODEL, "linewidths": 1.5}
            ax.scatter(x[best], y[best], label=label, zorder=3, clip_on=False, **ring)
            ax.legend(*(each[1:] for each in ax.get_legend_handles_labels()))
        ax.set_title("\n".join([curve.title.format(loss_units), *notes]))
        ax.locator_params(axis="x", nbins=5)
        if ax.get_subplotspec().is_last_row():
            ax.set_xlabel("step")
    return figure
