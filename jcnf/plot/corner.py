"""Corner plots: the parameters of a posterior, by pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike

from jcnf.plot import _style as c
from jcnf.plot._style import DATA, FIGURE_WIDTH, MODEL, Figure

MAX_PARAMETERS = 6
TRUTH = {"color": "black", "lw": 0.9, "ls": "--"}


@c.styled
def corner(
    samples: ArrayLike,
    names: Sequence[str],
    *,
    reference: ArrayLike | None = None,
    truth: ArrayLike | None = None,
    title: str | None = None,
) -> Figure:
    """Show the parameters of a posterior by pairs, beside reference samples or the truth.

    Samples are below the diagonal, reference samples above it, and the diagonal has histograms of
    both on common bins. Limits follow the quantiles of both, and include the truth.

    **Arguments:**

    - `samples`: (batch, dim).
    - `names`: the names of the parameters; the first 6 are drawn.
    - `reference`: (batch, dim), samples of the true posterior, such as those of a long MCMC chain.
      Pass as many as `samples` if a scatter plot of one is to be as dense as that of the other.
    - `truth`: (dim,), the parameters that produced the data; dashed lines mark them.
    - `title`: printed above the numbers of samples.

    **Raises:** `ValueError` for other shapes.
    """
    dim, number = len(names), min(len(names), MAX_PARAMETERS)
    given = {"samples": samples} | ({} if reference is None else {"reference": reference})
    every = {n: c.array(x, n, f"(batch, {dim})", dim) for n, x in given.items()}
    clouds = {name: c.finite(x[:, :number]) for name, x in every.items()}
    if not all(x.size for x in clouds.values()):
        raise ValueError("expected at least one parameter, and one sample that is finite")
    notes = [title] if title else []
    limits = np.array([c.limits_of(x) for x in np.concatenate([*clouds.values()]).T])
    if truth is not None:
        truth = c.array(truth, "truth", f"({dim},)", dim)[:number]
        pad = 0.04 * (limits[:, 1] - limits[:, 0])
        limits[:, 0] = np.minimum(limits[:, 0], truth - pad)
        limits[:, 1] = np.maximum(limits[:, 1], truth + pad)
    if number < dim:
        notes.append(f"first {number} of {dim} parameters")
    for name, x in clouds.items():
        notes.append(f"{name}: {', '.join(c.notes('rows', len(every[name]), x, *limits.T))}")
    side = max(4.2, min(FIGURE_WIDTH, 1.9 * number + 0.6))
    figure = c.new_figure(side, side)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(number, number, sharex="col", squeeze=False)
    mine, other = clouds["samples"], clouds.get("reference")
    for i in range(number):
        _histograms(axes[i, i], {n: x[:, i] for n, x in clouds.items()}, limits[i])
        for j in range(i):
            shown = [(axes[i, j], mine[:, [j, i]], limits[[j, i]].T, MODEL)]
            if other is None:
                axes[j, i].set_axis_off()
            else:
                shown.append((axes[j, i], other[:, [i, j]], limits[[i, j]].T, DATA))
            c.clouds_in(*zip(*shown, strict=True))
        axes[i, 0].set_ylabel(names[i] if i else "density")
        axes[-1, i].set_xlabel(names[i])
    for i, j in np.ndindex(number, number):
        if truth is not None and axes[i, j].axison:
            axes[i, j].axvline(truth[j], **TRUTH)
            if i != j:
                axes[i, j].axhline(truth[i], **TRUTH)
        scale = j == 0 and i > 0  # densities have no scale, and the last column's is on the right
        right = other is not None and j == number - 1 > i
        axes[i, j].tick_params(left=scale, labelleft=scale, right=right, labelright=right)
        axes[i, j].locator_params(nbins=4)
    figure.suptitle("\n".join(notes))
    handles, texts = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=3)
    return figure


def _histograms(ax, clouds, limits):
    """Draw densities on common bins, normalized over all points, also those outside."""
    # The rule of Rice; a rule by quartiles has too few bins for two narrow modes.
    number = int(np.clip(2 * min(map(len, clouds.values())) ** (1 / 3), 15, 60))
    bins = np.linspace(limits[0], limits[1], number + 1)
    styles = {
        "reference": {"fill": True, "alpha": 0.35, "color": DATA},
        "samples": {"color": MODEL},
    }
    for name, x in reversed(clouds.items()):
        heights = np.histogram(x, bins)[0] / (len(x) * np.diff(bins))
        ax.stairs(heights, bins, label=name, **styles[name])
    ax.set(xlim=limits, ylim=(0, None))
