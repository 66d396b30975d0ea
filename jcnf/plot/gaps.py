"""Gaps of several models to the best one, on several data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jcnf.plot import _style as c
from jcnf.plot._style import FIGURE_WIDTH, Figure
from jcnf.plot.curves import Values

LINEAR_UP_TO = 0.1  # nats; the axis is logarithmic beyond


@c.styled
def gaps_to_best(
    names: Sequence[str], gaps: Mapping[str, tuple[Values, Values]], *, units: str = "nats"
) -> Figure:
    """Show each model's gap to the best one on each of the named data sets, with error bars.

    `gaps` has (gaps, standard errors), each (names,), by model. The best has gap 0. The axis is
    linear up to 0.1 and logarithmic beyond. Gaps that are NaN or infinite are left out.

    **Raises:** `ValueError` without names or models, or for values of another shape.
    """
    if not (names and gaps):
        raise ValueError(
            f"expected at least one name and one model; got {len(names)} and {len(gaps)}"
        )
    figure = c.new_figure(FIGURE_WIDTH, 3.8)
    ax = figure.subplots()
    for place in range(0, len(names), 2):  # bands show which markers belong together
        ax.axvspan(place - 0.5, place + 0.5, color="black", alpha=0.04, lw=0)
    ax.axhline(0, color="black", lw=0.6)
    offsets = 0.7 * ((np.arange(len(gaps)) + 0.5) / len(gaps) - 0.5)
    for place, (model, (values, errors)) in enumerate(gaps.items()):
        values = c.array(np.asarray(values), "gaps", "(names,)")
        errors = c.array(np.asarray(errors), "errors", "(names,)")
        if not len(values) == len(errors) == len(names):
            raise ValueError(
                f"expected {len(names)} gaps and errors of {model}, one for each name; got "
                f"{len(values)} and {len(errors)}"
            )
        shown = np.isfinite(values)
        bars = np.where(np.isfinite(errors), errors, 0.0)[shown]
        x = np.arange(len(names))[shown] + offsets[place]
        style = {"fmt": c.MARKERS[place % len(c.MARKERS)], "ms": 5, "lw": 1, "capsize": 2}
        ax.errorbar(x, values[shown], bars, color=c.color_of(place), label=model, **style)
    ax.set_yscale("symlog", linthresh=LINEAR_UP_TO, linscale=0.6)
    ax.set_ylim(bottom=min(-LINEAR_UP_TO / 2, ax.get_ylim()[0]))
    ax.set_xticks(range(len(names)), list(names), rotation=30 if len(names) > 8 else 0)
    ax.set(xlim=(-0.5, len(names) - 0.5), ylabel=f"gap to the best ({units}; ± 1 standard error)")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=len(gaps))
    return figure
