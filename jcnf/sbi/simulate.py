"""Run a simulator for parameters drawn from a prior."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from jcnf._checks import InputError, check_callable, check_int, check_key, list_rows
from jcnf.sbi.priors import as_prior

Simulator = Callable[[Key[Array, ""], Any], Any]
"""`simulator(key, theta)` returns data (n, ...) for parameters (n, dim), one row for each."""


class Simulations(NamedTuple):
    """Parameters and the data that a simulator returned for them, row by row."""

    theta: Float[np.ndarray, "n dim"]
    x: Float[np.ndarray, "n ..."]

    def split(self, n: int) -> tuple["Simulations", "Simulations"]:
        """Return the first `n` simulations and the others, for instance to check a posterior."""
        check_int(n=n)
        first, others = (Simulations(self.theta[i], self.x[i]) for i in (slice(n), slice(n, None)))
        return first, others


class SimulatorError(RuntimeError):
    """A simulator failed: `simulations` has the batches before, `theta` the batch at fault."""

    def __init__(self, message: str, simulations: Simulations | None, theta: np.ndarray):
        super().__init__(message)
        self.simulations, self.theta = simulations, theta


def simulate(
    prior: Any,
    simulator: Simulator,
    n: int,
    *,
    key: Key[Array, ""],
    batch: int = 1000,
    progress: bool = True,
) -> Simulations:
    """Draw `n` parameters from the prior and run the simulator for them, in batches.

    **Arguments:**

    - `prior`: anything that `jcnf.sbi.as_prior` takes.
    - `simulator`: `simulator(key, theta)` returns data (b, ...) for parameters theta (b, dim), a
      float64 array of numpy. If it uses numpy, its generator may be
      `np.random.default_rng(np.asarray(jr.key_data(key)))`.
    - `key`: consumed; each batch gets a different key derived from it.
    - `batch`: the number b of parameters in one call; the last may have fewer.

    Simulations may have NaN or infinite values; `jcnf.sbi.fit_posterior` leaves them out and says
    how many.

    **Raises:** `SimulatorError` if the simulator raises; the batches before are in its
    `simulations`. `ValueError` if it returns another number of rows, or rows of another shape.
    """
    prior = as_prior(prior)
    check_callable("a function (key, theta) -> x", simulator=simulator)
    check_int(n=n, batch=batch)
    check_key(key)
    prior_key, key = jr.split(key)
    return run(simulator, prior.sample(prior_key, n), key=key, batch=batch, progress=progress)


def run(
    simulator: Simulator,
    theta: Float[np.ndarray, "n dim"],
    *,
    key: Key[Array, ""],
    batch: int = 1000,
    progress: bool = True,
) -> Simulations:
    """Run the simulator for given parameters, in batches; see `simulate`."""
    from tqdm import tqdm

    found: list[np.ndarray] = []
    with tqdm(total=len(theta), unit="simulation", disable=not progress) as bar:
        for start in range(0, len(theta), batch):
            part = theta[start : start + batch]
            try:
                x = np.asarray(simulator(jr.fold_in(key, start), part), np.float64)
            except Exception as error:
                done = Simulations(theta[:start], np.concatenate(found)) if found else None
                raise SimulatorError(
                    f"the simulator failed for simulations {start} to {start + len(part) - 1}: "
                    f"{type(error).__name__}: {error}",
                    done,
                    part,
                ) from error
            x = x.reshape(len(x), 1) if x.ndim == 1 else x
            shape = found[0].shape[1:] if found else x.shape[1:]
            if x.ndim == 0 or len(x) != len(part) or x.shape[1:] != shape:
                expected = f"({len(part)}, ...)" if not found else str((len(part), *shape))
                raise InputError(
                    f"the simulator returned an array of shape {x.shape} for {len(part)} "
                    f"parameters; expected {expected}"
                )
            found.append(x)
            bar.update(len(part))
    return Simulations(theta, np.concatenate(found))


def finite(simulations: Simulations) -> Simulations:
    """Return the simulations whose data are finite; warn of the others.

    **Raises:** `ValueError` if none is.
    """
    theta, x = simulations
    good = np.isfinite(x.reshape(len(x), -1)).all(axis=1)
    if good.all():
        return simulations
    if not good.any():
        raise InputError("all simulations have NaN or infinite values: check the simulator")
    bad = np.flatnonzero(~good)
    warnings.warn(
        f"{len(bad)} of {len(x)} simulations have NaN or infinite values and are left out (in "
        f"{list_rows(bad, len(x))}). The posterior is that of a prior without such parameters",
        stacklevel=3,
    )
    return Simulations(theta[good], x[good])
