"""Curves on logarithmic axes, for how something scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jcnf import _canvas as c

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # a name that run-time type checkers can resolve without matplotlib

Values = Sequence[float] | np.ndarray


class Panel(NamedTuple):
    """Named series of (x, y) on one pair of logarithmic axes."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[Values, Values]]
    labels: Mapping[str, str] = MappingProxyType({})  # for the legend, in place of names


@c.styled
def scaling(panels: Sequence[Panel]) -> Figure:
    """Show each panel's series as lines with a marker at each point; one colour a name.

    Points that are not positive and finite have no place on such axes: they are left out. Panels
    with the same legend share one.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    if not panels:
        raise ValueError("expected at least one panel")
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    figure = c.new_figure(c.WIDTH, 3.6)
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
        if high < 100 * low:  # of so few powers of ten not all have a label of their own
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


def exponent(x: Values, y: Values) -> float:
    """p of the fit y = c x^p, by least squares on logarithms.

    **Raises:** `ValueError` for fewer than 2 points, and for some that are not positive and finite.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2:
        raise ValueError(f"expected x and y of at least 2 points; got {x.shape} and {y.shape}")
    if not all(np.all((values > 0) & (values < np.inf)) for values in (x, y)):
        raise ValueError(f"expected x and y positive and finite; got {x} and {y}")
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
