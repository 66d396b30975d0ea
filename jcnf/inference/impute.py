"""Imputation of tables: missing entries of rows (n, dim) are NaN, in the units of the flow.

    gaussian = Gaussian.fit(train_rows)
    filled = impute(flow, rows, gaussian, key)          # draws of p(x_missing | x_known)
    found = predictive(flow, truth, rows, filled.draws, gaussian, key)    # nats, held out

The Gaussian starts the chains of draws, contributes part of the proposals that integrate the
density, and is the imputation to beat. The flow computes in its own dtype; pass rows of that dtype.
"""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, Key
from scipy.special import gammaln

from jcnf import evaluate
from jcnf._checks import check_finite, check_int, check_key
from jcnf.evaluate.log_prob import full_precision
from jcnf.flows import Flow, check_batch, check_flow
from jcnf.inference.gaussian import Gaussian, log_det, whiten
from jcnf.inference.mala import Density, langevin
from jcnf.ode import Solve

SAMPLING_SOLVE = Solve(rtol=1e-3, atol=1e-3, norm="worst")
SCORING_SOLVE = Solve(rtol=1e-4, atol=1e-4, norm="worst")
GAUSSIAN_SHARE = 0.25  # share of the importance proposals that come from the Gaussian
STUDENT_DOF = 4.0  # degrees of freedom of the other proposals, few so that their tails are heavy
MIN_SPREAD = 0.05  # least spread of a row's draws, relative to the Gaussian conditional's
CHUNK = 1000


class Imputed(NamedTuple):
    """The result of `impute`."""

    draws: Float[np.ndarray, "draws n dim"]  # whole rows; known entries are those of x
    acceptance: Float[np.ndarray, " n"]  # share of proposals accepted; 1 if none are missing
    failed: Int[np.ndarray, " n"]  # number of proposals whose solve failed

    @property
    def mean(self) -> Float[np.ndarray, "n dim"]:
        """Mean of the draws, the estimate of least squared error; float64."""
        return self.draws.mean(axis=0, dtype=np.float64)

    @property
    def std(self) -> Float[np.ndarray, "n dim"]:
        """Standard deviation of the draws, 0 where known; float64."""
        # The standard deviation of equal numbers may be a rounding error instead of 0.
        spread = self.draws.std(axis=0, dtype=np.float64)
        return np.where(np.any(self.draws != self.draws[0], axis=0), spread, 0.0)


def impute(
    flow: Flow,
    x: Float[Array | np.ndarray, "n dim"],
    gaussian: Gaussian,
    key: Key[Array, ""],
    *,
    draws: int = 50,
    steps: int = 100,
    burn_in: int = 50,
    candidates: int = 16,
    solve: Solve = SAMPLING_SOLVE,
    chunk: int = CHUNK,
) -> Imputed:
    """Draw the missing entries (NaN) given the known ones, with one MALA chain per row.

    Each chain starts at one of `candidates` draws from the Gaussian conditional, chosen by
    importance resampling (Rubin 1987). It is a chain of `jcnf.inference.mala.langevin`, scaled
    by the standard deviations of that Gaussian. Returns `draws` states, evenly spaced over the
    `steps` after the burn-in. `key` is consumed once.

    **Raises:** `ValueError` for wrong shapes and numbers, and for a singular covariance.
    """
    x = np.asarray(x)
    _check(flow, x, gaussian, key)
    check_int(draws=draws, steps=steps, candidates=candidates, chunk=chunk)
    check_int(0, burn_in=burn_in)
    if draws > steps:
        raise ValueError(f"draws must be at most steps; got draws={draws} and steps={steps}")
    start_key, chain_key = jr.split(key)
    some = np.flatnonzero(np.isnan(x).any(axis=1))
    result = Imputed(np.repeat(x[None], draws, axis=0), np.ones(len(x)), np.zeros(len(x), int))
    if not len(some):
        return result
    conditional = gaussian.given(x[some])
    start = _resampled(flow, conditional, start_key, candidates, solve, chunk, x.dtype)
    start = np.where(conditional.missing, start, x[some]).astype(x.dtype)
    size = min(chunk, len(some))
    for first in range(0, len(some), size):
        # Repeats of the last row fill the last chunk, so that all chunks have one shape.
        index = np.minimum(np.arange(first, first + size), len(some) - 1)
        chains = _langevin(
            Density(flow, solve=solve),
            jnp.asarray(start[index]),
            jnp.asarray(~conditional.missing[index]),
            jr.fold_in(chain_key, first),
            jnp.asarray(conditional.std[index], x.dtype),
            draws,
            steps,
            burn_in,
        )
        rows, count = some[index], len(np.unique(index))
        for whole, part in zip(
            (result.draws.swapaxes(0, 1), result.acceptance, result.failed),
            (np.swapaxes(chains.x, 0, 1), chains.acceptance, chains.failed),
            strict=True,
        ):
            whole[rows[:count]] = part[:count]
    return result


class Predictive(NamedTuple):
    """The result of `predictive`; NaN where a solve failed at the truth."""

    log_prob: Float[np.ndarray, " n"]  # log p(x_missing | x_known), nats; 0 if none are missing
    stderr: Float[np.ndarray, " n"]  # its standard error, from the importance sampling
    ess: Float[np.ndarray, " n"]  # effective share of the importance samples, from 0 to 1
    mean: Float[np.ndarray, "n dim"]  # their weighted mean: a second estimate of missing entries


def predictive(
    flow: Flow,
    truth: Float[Array | np.ndarray, "n dim"],
    x: Float[Array | np.ndarray, "n dim"],
    draws: Float[np.ndarray, "draws n dim"],
    gaussian: Gaussian,
    key: Key[Array, ""],
    *,
    samples: int = 64,
    solve: Solve = SCORING_SOLVE,
    chunk: int = CHUNK,
) -> Predictive:
    """Return log p(x_missing | x_known) = log p(x) - log p(x_known) of the truth where `x` is NaN.

    p(x_known), the integral of p over the missing entries, is estimated with `samples` importance
    samples. A quarter of them come from the Gaussian conditional, which covers regions that the
    draws may have missed (a defensive mixture, Hesterberg 1995); the others come from Student's t
    distributions around the `draws`. The estimate of p(x_known) is unbiased. Its logarithm is too
    low by about stderr^2/2 on average, and the result is too high by as much. If a whole row is
    missing, p(x_known) is 1. `key` is consumed once.

    **Raises:** `ValueError` for wrong shapes and numbers, and for a singular covariance.
    """
    truth, x = np.asarray(truth), np.asarray(x)
    _check(flow, x, gaussian, key)
    check_int(2, samples=samples)
    check_int(chunk=chunk)
    if truth.shape != x.shape or draws.shape[1:] != x.shape or not len(draws):
        raise ValueError(
            f"expected truth and each draw of x's shape {x.shape}; got truth of shape "
            f"{truth.shape} and draws of shape {draws.shape}"
        )
    check_finite(truth=truth)
    missing = np.isnan(x)
    log_prob, stderr, ess = np.zeros(len(x)), np.zeros(len(x)), np.ones(len(x))
    mean = np.where(missing, draws.mean(axis=0, dtype=np.float64), x)
    some, part = (
        np.flatnonzero(rows) for rows in (missing.any(1), missing.any(1) & ~missing.all(1))
    )
    if len(some):
        log_prob[some] = evaluate.log_prob(
            flow, jnp.asarray(truth[some]), solve=solve, chunk=chunk
        ).log_prob
    if len(part):
        proposals, log_q = _propose(gaussian.given(x[part]), draws[:, part], key, samples)
        proposals = np.where(missing[part], proposals, x[part]).astype(x.dtype)
        log_w = _score(flow, proposals, solve, chunk) - log_q
        log_w = np.where(np.isnan(log_w), -np.inf, log_w)
        top = log_w.max(axis=0)
        w = np.exp(log_w - top)
        mass = w.mean(axis=0)
        log_prob[part] -= np.log(mass) + top
        stderr[part] = w.std(axis=0, ddof=1) / mass / np.sqrt(samples)
        ess[part] = mass**2 / np.mean(w**2, axis=0)
        weighted = np.einsum("sn,snd->nd", w / w.sum(axis=0), proposals.astype(np.float64))
        mean[part] = np.where(missing[part], weighted, x[part])
    return Predictive(log_prob, stderr, ess, mean)


def _check(flow, x, gaussian, key):
    check_key(key)
    check_flow(flow)
    if x.ndim != 2 or not len(x) or x.dtype.kind != "f" or np.isinf(x).any():
        raise ValueError(
            "expected floating x of shape (n, dim), finite or NaN where missing; got "
            f"{x.dtype} of shape {x.shape}"
        )
    if gaussian.mean.shape != x.shape[1:] or not np.isfinite(gaussian.covariance).all():
        raise ValueError(
            f"expected a finite Gaussian of dimension {x.shape[1]}, fitted to rows without NaN; "
            f"got one of dimension {len(gaussian.mean)}"
        )
    check_batch(flow, np.nan_to_num(x), None)


@eqx.filter_jit
@full_precision
def _langevin(density, x, known, key, scale, keep, steps, burn_in):
    return langevin(density, x, known, key, steps=steps, burn_in=burn_in, keep=keep, scale=scale)


def _resampled(flow, conditional, key, candidates, solve, chunk, dtype):
    """Draw one of the candidates per row by weight p / q; the mean if all weights are 0."""
    draw_key, choice_key = jr.split(key)
    rows = conditional.sample(draw_key, candidates)
    log_w = _score(flow, rows.astype(dtype), solve, chunk) - conditional.log_prob(rows)
    log_w = np.where(np.isnan(log_w), -np.inf, log_w)
    # The Gumbel-max trick: the argmax of log w plus Gumbel noise is a draw by the weights w.
    chosen = np.argmax(log_w + np.asarray(jr.gumbel(choice_key, log_w.shape)), axis=0)
    found = rows[chosen, np.arange(rows.shape[1])]
    return np.where(np.isfinite(log_w.max(axis=0))[:, None], found, conditional.mean)


def _score(flow, rows, solve, chunk):
    """Return the log-densities (samples, n) of rows (samples, n, dim); NaN if the solve failed."""
    flat = jnp.asarray(rows.reshape(-1, rows.shape[-1]))
    return evaluate.log_prob(flow, flat, solve=solve, chunk=chunk).log_prob.reshape(rows.shape[:2])


def _propose(conditional, draws, key, samples):
    """Draw whole rows (samples, n, dim), and return them with their log-density, (samples, n).

    The number of rows from each part of the mixture is fixed, and the log-density is that of the
    whole mixture for all of them: the balance heuristic (Veach & Guibas 1995).
    """
    keys = jr.split(key, 4)
    defensive = max(1, round(GAUSSIAN_SHARE * samples))
    number, n, dim = draws.shape
    missing = conditional.missing
    count = missing.sum(axis=1)
    # A kernel around each draw has the covariance of the row's draws, scaled by Silverman's rule.
    # The small share of the conditional's covariance keeps it regular if a chain hardly moved.
    width = (4 / (count + 2) / number) ** (1 / (count + 4))
    centered = np.where(missing, draws - draws.mean(axis=0, dtype=np.float64), 0.0)
    covariance = np.einsum("sni,snj->nij", centered, centered) / number
    covariance += MIN_SPREAD**2 * conditional.factor @ np.swapaxes(conditional.factor, 1, 2)
    covariance = covariance * width[:, None, None] ** 2
    both = missing[:, :, None] & missing[:, None]
    factor = np.linalg.cholesky(np.where(both, covariance, np.eye(dim)))

    chosen = np.asarray(jr.randint(keys[0], (samples - defensive, n), 0, number))
    e = np.asarray(jr.normal(keys[1], (samples - defensive, n, dim)), np.float64)
    chi = np.asarray(jr.chisquare(keys[2], STUDENT_DOF, shape=chosen.shape), np.float64)[..., None]
    e = np.einsum("nij,snj->sni", factor, e * np.sqrt(STUDENT_DOF / chi))
    around = draws[chosen, np.arange(n)] + np.where(missing, e, 0.0)
    rows = np.concatenate([conditional.sample(keys[3], defensive), around])

    # Squared distances |a - b|^2 from every row to every draw, and from them the log-density of the
    # Student's t mixture at each row.
    a, b = (whiten(factor, np.where(missing, y - conditional.mean, 0.0)) for y in (rows, draws))
    squares = np.sum(a**2, -1)[:, None] + np.sum(b**2, -1) - 2 * np.einsum("sni,tni->stn", a, b)
    kernel = -(STUDENT_DOF + count) / 2 * np.log1p(np.maximum(squares, 0.0) / STUDENT_DOF)
    log_kernels = np.logaddexp.reduce(kernel, axis=1) - np.log(number) - log_det(factor)
    log_kernels += gammaln((STUDENT_DOF + count) / 2) - gammaln(STUDENT_DOF / 2)
    log_kernels -= count / 2 * np.log(STUDENT_DOF * np.pi)
    share = defensive / samples
    log_q = np.logaddexp(np.log(share) + conditional.log_prob(rows), np.log1p(-share) + log_kernels)
    return rows, log_q
