"""Curves on logarithmic axes, which show how something scales, and training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jcnf.plot import _style as c
from jcnf.plot._style import DATA, FIGURE_WIDTH, Figure

Values = Sequence[float] | np.ndarray


class CurvePanel(NamedTuple):
    """Named series of (x, y) on one pair of logarithmic axes."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[Values, Values]]
    labels: Mapping[str, str] = MappingProxyType({})  # for the legend, instead of names


@c.styled
def scaling(panels: Sequence[CurvePanel]) -> Figure:
    """Show each panel's series as lines with markers, with one color for each name.

    Points that are not positive and finite cannot be shown on logarithmic axes and are left out.
    Panels with the same legend share one.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    if not panels:
        raise ValueError("expected at least one panel; got none")
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    figure = c.new_figure(c.FIGURE_WIDTH, 3.6)
    for ax, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, (x, y) in panel.series.items():
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            drawn = np.isfinite(y) & (y > 0)
            place = names.index(name)
            label = panel.labels.get(name, name)
            mark: Any = {"marker": "osD^vPX*"[place % 8], "ms": 8 - place % 8}
            ax.plot(x[drawn], y[drawn], label=label, color=f"C{place}", lw=1, **mark)
        ax.set(xscale="log", yscale="log", title=panel.title)
        ax.set(xlabel=panel.x_label, ylabel=panel.y_label)
        low, high = ax.get_xlim()
        if high < 100 * low:  # labels at powers of ten only would be too few
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1, 3)))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.3, lw=0.5)
    legends = [ax.get_legend_handles_labels() for ax in figure.axes]
    if len(panels) > 1 and all(texts == legends[0][1] for _, texts in legends):
        figure.legend(*legends[0], loc="outside lower center", ncols=len(names))
    else:
        for ax in figure.axes:
            ax.legend()
    return figure


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


CURVES = {  # key of a record: (title with units, whether also smoothed, whether logarithmic)
    "loss": ("training loss ({})", True, False),
    "val_nll": ("validation NLL (nats)", False, False),
    "val_bits": ("validation bits/dim", False, False),
    "val_kl": ("validation KL (nats)", False, True),
    "val_negative_elbo": ("validation $-$ELBO (nats)", False, False),
    "train_nll": ("NLL of all points (nats)", False, False),
    "train_rmse": ("RMSE of windows", False, True),
    "nfe": ("field evaluations (NFE)", False, False),
    "step_ms": ("time per step (ms)", True, False),
    "grad_norm": ("gradient norm", True, True),
    "skipped": ("skipped steps", False, False),
}


@c.styled
def training_curves(records: Sequence[Mapping[str, Any]], *, loss_units: str = "nats") -> Figure:
    """Show what a run logged against its steps: a panel for each key of `CURVES` that occurs.

    `records` are the lines of metrics.jsonl, each with "step"; keys that are absent, null or
    unknown are skipped. Records of the same step are merged and later values win, as after a
    resume.

    **Raises:** `ValueError` if a record has no step, or no record has a known key.
    """
    merged: dict[float, dict[str, Any]] = {}
    for record in records:
        if "step" not in record:
            raise ValueError(f'expected "step" in each record; got only {sorted(record)}')
        merged.setdefault(record["step"], {}).update(record)
    rows = [merged[step] for step in sorted(merged)]
    keys = [key for key in CURVES if any(row.get(key) is not None for row in rows)]
    if not keys:
        raise ValueError(f"no curve to draw: log at least one of {', '.join(CURVES)}")
    columns = len(keys) if len(keys) < 4 else -(-len(keys) // 2)
    lines = -(-len(keys) // columns)
    figure = c.new_figure(FIGURE_WIDTH, 2.3 * lines + 0.2)
    axes = figure.subplots(lines, columns, sharex=True, squeeze=False).ravel()
    for ax in axes[len(keys) :]:
        ax.remove()
    for place, (ax, key) in enumerate(zip(axes, keys, strict=False)):
        name, smooth, logarithmic = CURVES[key]
        every = np.array([[r["step"], r[key]] for r in rows if r.get(key) is not None], np.float64)
        kept = c.finite(every)
        x, y = kept.T
        half = len(y) // 40 if smooth else 0
        raw: Any = {"lw": 0.6, "alpha": 0.6} if half else {"marker": "." if len(y) < 60 else ""}
        ax.plot(x, y, color=DATA, label="logged", **raw)
        if half:
            windows = np.lib.stride_tricks.sliding_window_view(y, 2 * half + 1)
            label = f"median of {2 * half + 1}"
            ax.plot(x[half:-half], np.median(windows, axis=1), color=DATA, label=label)
            ax.legend()
        logarithmic = logarithmic and bool((y > 0).all())
        low, high = np.exp(c.limits_of(np.log(y))) if logarithmic else c.limits_of(y)
        notes = c.notes("", len(every), kept, [-np.inf, low], [np.inf, high])[1:]
        ax.set(yscale="log" if logarithmic else "linear", ylim=(low, high))
        ax.set_title("\n".join([name.format(loss_units), *notes]))
        if place + columns >= len(keys):
            ax.tick_params(labelbottom=True)
            ax.set_xlabel("step")
    return figure
