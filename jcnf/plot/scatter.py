"""Scatter plots side by side: points by class, and true values against estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jax.typing import ArrayLike

from jcnf._checks import check_number
from jcnf.plot import _style as c
from jcnf.plot._style import FIGURE_WIDTH, MODEL, Figure


@c.styled
def scatter_by_class(clouds: Sequence[tuple[str, ArrayLike, ArrayLike]], half: float) -> Figure:
    """Show each cloud, (title, points (batch, 2), classes (batch,)), in a panel of [-half, half]^2.

    Each class has a color. Titles count points that are non-finite or outside.
    """
    if not clouds:
        raise ValueError("expected at least one cloud of points; got none")
    check_number("(0, inf)", half=half)
    figure = c.new_figure(FIGURE_WIDTH, FIGURE_WIDTH / len(clouds) + 0.75, "compressed")
    axes = figure.subplots(1, len(clouds), sharex=True, sharey=True, squeeze=False)[0]
    box = np.array([[-half, -half], [half, half]])
    for ax, (title, points, classes) in zip(axes, clouds, strict=True):
        x, classes = c.array(points, "points", "(batch, 2)", 2), np.asarray(classes)
        if classes.shape != x.shape[:1] or not np.issubdtype(classes.dtype, np.integer):
            raise ValueError(
                f"expected integer classes of shape {x.shape[:1]}; got {classes.dtype} of shape "
                f"{classes.shape}"
            )
        for label in np.unique(classes):
            kept = c.thin(c.finite(x[classes == label]), c.MAX_DOTS)
            color = c.color_of(int(label))
            ax.scatter(*kept.T, s=2, lw=0, alpha=0.6, color=color, label=f"class {label}")
        notes = c.notes("points", len(x), c.finite(x), *box)
        ax.set_title("\n".join([title, *notes]), fontsize=8)
        ax.set(aspect="equal", xlim=box[:, 0], ylim=box[:, 1], xlabel="$x_1$")
    axes[0].set_ylabel("$x_2$")
    entries = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=8, markerscale=3
    )
    return figure


@c.styled
def scatter_against_truth(truth: ArrayLike, estimates: Mapping[str, ArrayLike]) -> Figure:
    """Show true values (values,) against each of the estimates, {title: (values,)}, in a panel.

    On the line the two agree. All panels have the view of the true values; titles count points
    that are non-finite or outside.
    """
    truth = c.array(truth, "truth", "(values,)")
    if not estimates:
        raise ValueError("expected at least one estimate; got none")
    low, high = c.limits_of(c.finite(truth))
    figure = c.new_figure(FIGURE_WIDTH, FIGURE_WIDTH / len(estimates) + 0.5, "compressed")
    axes = figure.subplots(1, len(estimates), sharex=True, sharey=True, squeeze=False)[0]
    for ax, (title, estimate) in zip(axes, estimates.items(), strict=True):
        estimate = c.array(estimate, "estimates", "(values,)")
        if estimate.shape != truth.shape:
            raise ValueError(f"expected estimates of shape {truth.shape}; got {estimate.shape}")
        points = np.stack([estimate, truth], axis=1)
        kept = c.finite(points)
        c.dots_in(ax, c.thin(kept, c.MAX_DOTS), MODEL)
        ax.plot([low, high], [low, high], color="black", lw=0.6)
        ax.set_title("\n".join([title, *c.notes("values", len(points), kept, low, high)]))
        ax.set(aspect="equal", xlim=(low, high), ylim=(low, high), xlabel="estimate")
    axes[0].set_ylabel("truth")
    return figure
