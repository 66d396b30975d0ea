"""Figures of a posterior's calibration: coverage, ranks, and the local two-sample test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike
from scipy.stats import binom

from jcnf.plot import _style as c
from jcnf.plot._style import FIGURE_WIDTH, Figure

MAX_CURVES = 8  # in one panel
BAND = {"color": "black", "alpha": 0.12, "lw": 0}


@c.styled
def calibration(
    levels: ArrayLike,
    coverage: ArrayLike,
    lower: ArrayLike,
    upper: ArrayLike,
    names: Sequence[str] | None = None,
    *,
    difference: bool = False,
) -> Figure:
    """Show coverage against level, with its band and the diagonal of an exact posterior.

    **Arguments:**

    - `levels`, `lower`, `upper`: (levels,), as of `jcnf.sbi.Calibration`.
    - `coverage`: (levels,), or (curves, levels) for up to 8 curves in one panel.
    - `names`: the names of the curves, such as parameters or models.
    - `difference`: show coverage minus level, which makes small errors visible.

    **Raises:** `ValueError` for shapes that do not agree, and for more than 8 curves.
    """
    levels = c.array(levels, "levels", "(levels,)")
    edges = [c.array(x, n, "(levels,)") for n, x in (("lower", lower), ("upper", upper))]
    curves = c.array(np.atleast_2d(np.asarray(coverage)), "coverage", "(curves, levels)")
    if not len(levels) == curves.shape[1] == len(edges[0]) == len(edges[1]):
        raise ValueError(
            "expected coverage, lower and upper at each of the levels; got shapes "
            f"{np.shape(coverage)}, {edges[0].shape} and {edges[1].shape} for {levels.shape}"
        )
    if len(curves) > MAX_CURVES:
        raise ValueError(
            f"expected at most {MAX_CURVES} curves in a panel; got {len(curves)}: make a figure of "
            "each part of them"
        )
    labels = _names(names, len(curves), "curve")
    figure = c.new_figure(5.6 if difference else 4.6, 4.0 if difference else 4.4)
    ax = figure.subplots()
    baseline = levels if difference else np.zeros_like(levels)
    ax.fill_between(levels, edges[0] - baseline, edges[1] - baseline, label="band", **BAND)
    ax.plot(levels, levels - baseline, color="black", lw=0.8, ls="--", label="exact")
    for place, (curve, label) in enumerate(zip(curves, labels, strict=True)):
        label = label if names is not None else "posterior" if len(curves) == 1 else label
        ax.plot(levels, curve - baseline, color=c.color_of(place), lw=1.4, label=label)
    ax.set(xlabel="level", xlim=(0, 1), ylabel="coverage − level" if difference else "coverage")
    if not difference:
        ax.set(ylim=(0, 1), aspect="equal")
    ax.grid()
    if difference:
        figure.legend(loc="outside lower center", ncols=min(2 + len(curves), 5))
    else:
        ax.legend(loc="upper left")
    return figure


@c.styled
def ranks(
    ranks: ArrayLike, draws: int, names: Sequence[str] | None = None, *, bins: int = 20
) -> Figure:
    """Show histograms of the ranks of truths among posterior draws, one panel for each parameter.

    The gray band has the central 99 % of a bin's count under uniform ranks, as in Talts et al.
    2018. It holds for each bin separately: with 20 bins, about one panel in six of an exact
    posterior has a bin outside. A posterior that is too narrow has too many ranks at both ends, one
    that is too wide too few; one that lies too low has too many high ranks.

    **Arguments:**

    - `ranks`: (n,) or (n, dim), from 0 to `draws`, as of `jcnf.sbi.ranks`.
    - `draws`: number of draws that each truth was ranked among.
    - `names`: the names of the parameters.
    - `bins`: number of bins, at most draws + 1. Bins differ by one rank if they do not divide
      draws + 1; their heights and bands are relative to what is expected of each.

    **Raises:** `ValueError` for ranks outside 0, ..., `draws` and for other shapes.
    """
    x = np.asarray(ranks)
    x = c.array(x[:, None] if x.ndim == 1 else x, "ranks", "(n, dim)")
    if not (x.size and draws >= 1 and (x >= 0).all() and (x <= draws).all()):
        raise ValueError(
            f"expected ranks (n, dim) from 0 to draws={draws}; got shape {x.shape}: pass the "
            "number of draws that each truth was ranked among"
        )
    if not 1 <= bins <= draws + 1:
        raise ValueError(f"bins must be at least 1 and at most draws + 1 = {draws + 1}; got {bins}")
    labels = _names(names, x.shape[1], "parameter")
    edges = np.linspace(0, draws + 1, bins + 1).round()
    share = np.diff(edges) / (draws + 1)
    band = binom.ppf([[0.005], [0.995]], len(x), share) / (len(x) * share)
    most = 4 if x.shape[1] in (4, 7, 8) or x.shape[1] > 9 else 3
    rows = -(-x.shape[1] // most)
    width = 4.6 if x.shape[1] == 1 else FIGURE_WIDTH
    figure = c.new_figure(width, 3.2 if rows == 1 else 2.3 * rows)
    for ax, column, label in zip(c.panels_in(figure, x.shape[1], most), x.T, labels, strict=True):
        heights = np.histogram(column, edges)[0] / (len(x) * share)
        ax.stairs(band[1], edges / (draws + 1), baseline=band[0], fill=True, **BAND)
        ax.axhline(1, color="black", lw=0.8, ls="--")
        ax.stairs(heights, edges / (draws + 1), color=c.DATA, lw=1.2)
        ax.set(title=label, xlim=(0, 1), ylim=(0, 1.08 * max(heights.max(), band.max())))
        ax.set(xlabel="rank / (draws + 1)", ylabel="count / expected count")
    return figure


@c.styled
def local_c2st(
    statistic: ArrayLike, null: ArrayLike, names: Sequence[str] | None = None, *, bins: int = 25
) -> Figure:
    """Show the statistic of the local C2ST against its null distribution, by observation.

    Titles have the p-values, the share of statistics, the observed one included, that are at least
    as large as it.

    **Arguments:**

    - `statistic`: a number, or (observations,), as of `jcnf.sbi.LocalC2ST`.
    - `null`: (trials,) or (trials, observations).
    - `names`: the names of the observations.
    - `bins`: number of bins of the histogram.

    **Raises:** `ValueError` for shapes that do not agree.
    """
    observed = c.array(np.atleast_1d(np.asarray(statistic)), "statistic", "(observations,)")
    trials = np.asarray(null)
    trials = trials[:, None] if trials.ndim == 1 else trials
    trials = c.array(trials, "null", "(trials, observations)", len(observed))
    if not trials.size or not (np.isfinite(trials).all() and np.isfinite(observed).all()):
        raise ValueError("statistic and null must be finite, with at least one trial")
    labels = _names(names, len(observed), "observation")
    most = 3
    rows = -(-len(observed) // most)
    figure = c.new_figure(
        4.6 if len(observed) == 1 else FIGURE_WIDTH, 3.2 if rows == 1 else 2.5 * rows
    )
    axes = c.panels_in(figure, len(observed), most)
    for ax, value, others, label in zip(axes, observed, trials.T, labels, strict=True):
        p_value = (1 + (others >= value).sum()) / (1 + len(others))
        top = max(others.max(), value)
        heights, edges = np.histogram(others, np.linspace(0, top * 1.05 or 1.0, bins + 1))
        style = {"fill": True, "alpha": 0.35, "color": c.BASE}
        ax.stairs(heights, edges, label="null", **style)
        ax.axvline(value, color=c.MODEL, lw=1.6, label="observed")
        title = f"p = {p_value:.2g}"
        ax.set(title=f"{label}: {title}" if names is not None or len(observed) > 1 else title)
        ax.set(xlabel="statistic", ylabel="trials", xlim=(0, edges[-1]), ylim=(0, None))
        ax.locator_params(axis="x", nbins=5)
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=2)
    return figure


def _names(names, number, noun):
    if names is None:
        return [f"{noun} {i}" for i in range(number)]
    if len(names) != number:
        raise ValueError(f"expected a name for each {noun}, {number} in all; got {len(names)}")
    return list(names)
