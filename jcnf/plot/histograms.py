"""Histograms of scores of points inside and outside, and of one column of data and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from jcnf.plot import _style as c
from jcnf.plot._style import FIGURE_WIDTH, Figure

NUM_BINS = 60
MAX_VIEW_EXTENSION = 1.5  # beyond the inside on each side, in widths of the inside


class HistogramPanel(NamedTuple):
    """Values (n,) of one score for named sets: the first set is inside, the others outside."""

    score: str  # with units
    sets: Mapping[str, ArrayLike]
    auroc: Mapping[str, float] = MappingProxyType({})  # of outside sets, for the legend


@c.styled
def score_histograms(panels: Sequence[HistogramPanel]) -> Figure:
    """Show each panel's sets as histograms of shares of the set, with one color for each name.

    The view is the range of the inside without outliers, extended by up to `MAX_VIEW_EXTENSION`
    where there are values. Values beyond it count in the bins at the edges, whose bars may exceed
    the panel, and in the title. Values that are not finite are left out and counted in the title.
    """
    if not panels or not all(panel.sets for panel in panels):
        raise ValueError("expected at least one panel, and at least one set in each")
    names = list(dict.fromkeys(name for panel in panels for name in panel.sets))
    most = 2 if len(panels) == 4 else 3  # panels in a row
    figure = c.new_figure(FIGURE_WIDTH, 3.2 * -(-len(panels) // most))
    axes = c.panels_in(figure, len(panels), most)
    for ax, panel in zip(axes, panels, strict=True):
        given = {name: c.array(x, name, "(n,)") for name, x in panel.sets.items()}
        sets = {name: c.finite(x) for name, x in given.items()}
        view = _view(*sets.values())
        bins, highest = np.linspace(*view, NUM_BINS + 1), 0.0
        for i, (name, x) in enumerate(sets.items()):
            shares = np.histogram(np.clip(x, *view), bins)[0] / max(len(x), 1)
            highest = max(highest, *shares[1:-1])
            auroc = f", AUROC {panel.auroc[name]:.3f}" if name in panel.auroc else ""
            color, fill = c.color_of(names.index(name)), {"fill": True, "alpha": 0.35}
            ax.stairs(shares, bins, color=color, label=name + auroc, **({} if i else fill))
        ax.set(xlabel=panel.score, ylabel="share of the set", xlim=view)
        room = 1.1 + 0.1 * len(sets)  # for the legend, above the bars
        ax.set(ylim=(0, room * highest or 1.0), title=_title(given, sets, view))
        ax.legend()
    return figure


def _view(inside: np.ndarray, *outside: np.ndarray) -> tuple[float, float]:
    low, high = c.limits_of(inside)
    every = np.concatenate([inside, *outside, [low, high]])
    least, most = low - MAX_VIEW_EXTENSION * (high - low), high + MAX_VIEW_EXTENSION * (high - low)
    shown = every[(every >= least) & (every <= most)]
    return (
        least if every.min() < least else float(shown.min()),
        most if every.max() > most else float(shown.max()),
    )


def _title(given: Mapping, sets: Mapping, view: tuple[float, float]) -> str:
    lines = []
    for name, x in sets.items():
        beyond = int(((x < view[0]) | (x > view[1])).sum())
        lost = {"beyond the view": beyond, "not finite, left out": len(given[name]) - len(x)}
        lines += [f"{name}: {n:,} {what}" for what, n in lost.items() if n]
    return "\n".join(lines)


@c.styled
def histogram(
    data: ArrayLike,
    samples: ArrayLike,
    grid: ArrayLike | None = None,
    density: ArrayLike | None = None,
    column: str | None = None,
) -> Figure:
    """Show one column of data and samples on common bins, and the model's density if given.

    **Arguments:**

    - `data`, `samples`: (batch,) or (batch, 1).
    - `grid`, `density`: (points,); the density itself, not its logarithm, per unit of the column.
    - `column`: the name of the column.

    **Raises:** `ValueError` for other shapes, and for `grid` or `density` without the other.
    """
    data, samples = (np.asarray(x) for x in (data, samples))
    data, samples = (x[:, 0] if x.shape[1:] == (1,) else x for x in (data, samples))
    tables = c.both(data, samples, "(batch,)")
    ours, theirs = (c.finite(x) for x in tables.values())
    limits, notes = c.limits_of(ours), []
    for (name, every), kept in zip(tables.items(), (ours, theirs), strict=True):
        notes.append(f"{name}: {', '.join(c.notes('values', len(every), kept, *limits))}")
    figure = c.new_figure(6.0, 3.8)
    ax = figure.subplots()
    c.histograms_in(ax, ours, theirs, limits)
    if grid is not None or density is not None:
        if grid is None or density is None or np.shape(grid) != np.shape(density):
            raise ValueError("expected grid and density together, both of shape (points,)")
        curve = np.stack([c.array(x, "grid", "(points,)") for x in (grid, density)], axis=1)
        kept = c.finite(curve[np.argsort(curve[:, 0])])
        ax.plot(*kept.T, color="black", lw=1.2, label="model density")
        if len(kept) < len(curve):
            notes.append(f"density: {len(curve) - len(kept):,} non-finite dropped")
    ax.set(title="\n".join(notes), xlabel=column or "$x$", ylabel="density")
    ax.set_ylim(bottom=0)
    ax.legend()
    return figure
