"""Models of the density of a table, as `tables` compares them."""

import functools
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments._tasks.autoregressive_flow import Transformer, train_autoregressive_flow
from jcnf import training
from jcnf.data.tables import Table
from jcnf.flows import Affine

BATCH = 512  # of the autoregressive flows
COMPONENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
COVARIANCES = ("full", "diag", "tied")
REGULARIZATIONS = (1e-6, 1e-3, 1e-1)  # added to variances, of standardized columns
BANDWIDTHS = np.geomspace(0.02, 2.0, 25)  # in standard deviations
MAX_KERNELS, MAX_KERNEL_VALIDATION = 10_000, 2_000  # rows, of kernel density estimates


class Fitted(NamedTuple):
    """A fitted model of standardized rows."""

    log_prob: Callable[[np.ndarray], np.ndarray]  # of rows (batch, dim), in nats
    size: float  # how many numbers the model holds; NaN if that is not known
    chosen: dict[str, Any]  # what validation chose, and how far training came
    note: str = ""  # how the training differs from what was asked for


FitModel = Callable[[Table, float, int], Fitted]  # of a table, seconds and a seed


def fit_ours(table: Table, seconds: float, seed: int) -> Fitted:
    """Fit `jcnf.sklearn.FlowDensity` to the training and validation rows together."""
    from jcnf.sklearn import FlowDensity

    model = FlowDensity(random_state=seed, progress=False)
    model.fit(np.concatenate([table.train, table.val]))
    flows = model.mixture_.flows
    chosen = {"flows": len(flows), "held_out_nll": model.held_out_nll_}
    return Fitted(model.score_samples, sum(map(_flow_size, flows)), chosen)


def fit_autoregressive(transformer: Transformer, table: Table, seconds: float, seed: int) -> Fitted:
    """Train a masked autoregressive flow; keep its parameters that are best on validation."""
    train, val = (jnp.asarray(part, float) for part in (table.train, table.val))
    draw = training.draw_rows(BATCH)
    fitted = train_autoregressive_flow(
        draw, train, transformer=transformer, seconds=seconds, seed=seed, val=val
    )
    return Fitted(
        lambda rows: fitted.log_prob(jnp.asarray(rows, float)),
        fitted.parameters,
        {"steps": fitted.steps},
    )


def fit_mixture(table: Table, seconds: float, seed: int) -> Fitted:
    """Fit Gaussian mixtures of more and more components; return the best on validation."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    train, val = (np.asarray(part, np.float64) for part in (table.train, table.val))

    def fit(**settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return GaussianMixture(**settings, random_state=seed).fit(train)

    grid = (
        {"n_components": count, "covariance_type": kind, "reg_covar": added}
        for count in COMPONENTS
        for kind in COVARIANCES
        for added in REGULARIZATIONS
        if count == 1 or 2 * count <= len(train)
    )
    model, chosen = _best(fit, list(grid), val, seconds)
    count, dim = model.means_.shape
    size = count - 1 + count * dim + _covariance_size(chosen["covariance_type"], count, dim)
    return Fitted(model.score_samples, size, chosen)


def fit_kernels(table: Table, seconds: float, seed: int) -> Fitted:
    """Put a Gaussian kernel on each training row, with the bandwidth best on validation."""
    from sklearn.neighbors import KernelDensity

    rng = np.random.default_rng(seed)
    train = _subsample(rng, table.train, MAX_KERNELS)
    val = _subsample(rng, table.val, MAX_KERNEL_VALIDATION)
    usual = len(train) ** (-1 / (train.shape[1] + 4))  # Scott's rule; the nearest come first
    widths = sorted(BANDWIDTHS, key=lambda width: abs(np.log(width / usual)))
    grid = [{"bandwidth": float(width)} for width in widths]
    model, chosen = _best(
        lambda bandwidth: KernelDensity(bandwidth=bandwidth).fit(train), grid, val, seconds
    )
    given = len(table.train)
    note = "" if len(train) == given else f"kernels on {len(train)} of {given} training rows only"
    return Fitted(model.score_samples, train.size, chosen, note)


MODELS: Mapping[str, FitModel] = {
    "ours": fit_ours,
    "spline": functools.partial(fit_autoregressive, "spline"),
    "maf": functools.partial(fit_autoregressive, "affine"),
    "mixture": fit_mixture,
    "kde": fit_kernels,
}


def _best(fit, grid: Iterable[dict], val, seconds: float) -> tuple[Any, dict[str, Any]]:
    """Return the model of a grid that is best on validation rows, and what was chosen.

    The grid ends before a fit that would exceed the seconds if it took as long as the longest one.
    Settings that have no density, because a covariance is singular, are passed over.
    """
    start, longest, tried = time.perf_counter(), 0.0, 0
    best, best_score, chosen = None, -np.inf, {}
    failure = ValueError("no setting of the grid has finite log-densities of validation rows")
    for settings in grid:
        begun = time.perf_counter()
        if best is not None and begun - start + longest > seconds:
            break
        tried += 1
        try:
            model = fit(**settings)
        except ValueError as error:
            failure = error
        else:
            score = np.mean(model.score_samples(val))
            if score > best_score:
                best, best_score, chosen = model, score, settings
        longest = max(longest, time.perf_counter() - begun)
    if best is None:
        raise failure
    return best, chosen | {"settings_tried": tried}


def _flow_size(flow):
    """Return how many numbers of a flow are fitted: a normal has a mean and a variance a column."""
    if isinstance(flow.bijection, Affine):
        return 2 * flow.dim
    return sum(p.size for p in jax.tree.leaves(training.partition(flow)[0]))


def _covariance_size(kind, count, dim):
    """Return how many free numbers the covariances of a Gaussian mixture have."""
    full = dim * (dim + 1) // 2
    return {"full": count * full, "diag": count * dim, "tied": full}[kind]


def _subsample(rng, rows, most):
    """Return at most `most` rows, drawn without replacement, in float64."""
    kept = rows if len(rows) <= most else rng.permutation(rows)[:most]
    return np.asarray(kept, np.float64)
