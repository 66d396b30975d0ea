"""`FlowDensity`: the density of a table, or of some columns given others, in one line."""

import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Float
from scipy.stats import qmc
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted, validate_data

from jcnf import evaluate
from jcnf._checks import InputError, check_int, list_rows
from jcnf.distributions import StandardNormal
from jcnf.flows import Affine, Chain, Flow
from jcnf.ode import Solve
from jcnf.sklearn import _saving
from jcnf.sklearn._conditional import Draws
from jcnf.sklearn._contexts import network_of, unembedded
from jcnf.sklearn._table_checks import (
    check_constant,
    check_rows,
    refuse_nan,
    refuse_text,
    warn_of_outliers,
)
from jcnf.sklearn.columns import resolve
from jcnf.sklearn.mixture import (
    MAX_CHUNK,
    Plan,
    from_scores,
    train,
)
from jcnf.sklearn.sides import (
    ContextRows,
    Side,
    apply,
    cast,
    from_pickle,
    single,
    to_pickle,
)

MIN_ROWS = 5
NOISE_DRAWS = 8  # of the noise of rounded columns, over which a log-density is averaged
DRAW_SOLVE = Solve(rtol=1e-3, atol=1e-3, norm="worst")  # of draws for means and quantiles
FLOW_DRAWS_AT_ONCE = 100_000


def _has_context(estimator):
    if getattr(estimator, "context_", None) is None:
        raise AttributeError("this needs a density fitted with a context: fit(y, context=x)")
    return True


class FlowDensity(BaseEstimator):
    """The density of a table by continuous normalizing flows, as a scikit-learn estimator.

    ```python
    density = FlowDensity().fit(X)
    density.score_samples(X_new)  # log-densities, nats in the units of X
    density.sample(1000)          # a DataFrame if X is one
    ```

    Inside, each column is transformed so that its values never leave its support
    (`jcnf.sklearn.Column`) and are about normal (`jcnf.flows.Columns`), the columns together are
    whitened, and flows are trained by flow matching (`jcnf.sklearn.mixture` says how, and how rows
    are held out). Circular columns become angles, which are not whitened, and the flows are on
    circles there. All of it is part of the density. With `context=`, the density is that of X given
    the context.

    **Arguments:**

    - `columns`: the supports of columns, by name or by number from 0: "unbounded", "positive",
      "whole", a pair of bounds, or a `jcnf.sklearn.Column`, for example of angles. Those of other
      columns are chosen from their values by the rule of `jcnf.sklearn.columns.choose`; `columns_`
      has what was chosen, and printing `density.describe()` shows it.
    - `steps`: the largest number of training steps of one flow; by default 20,000, or 10,000 for
      fewer than 5,000 rows, which takes two minutes or so on one core.
    - `random_state`: seed of the weights, the noise and the rows held out; as in scikit-learn.
    - `embedding`: for long or set-valued contexts (n, ...), a function of a key that returns an
      Equinox module from one context (...) to features (k,). It is trained with the flow. The
      entries come to it transformed to be about normal, those at one place of the last axis in the
      same way if there are more axes. Without an embedding, the mean of X given the context is
      modeled by linear regression, to which the flow adds.
    - `progress`: whether to show a progress bar.

    **Attributes** of a fitted estimator: `columns_` (the support of each column), `mixture_` (the
    trained flows and their weights), `held_out_nll_` (nats a row in the units of X), `history_`
    (the records of `jcnf.fit`; `held_out_nll` is there in nats a row of whitened columns),
    `n_features_in_`, `names_` (of the columns, or their numbers) and, if these are strings,
    `feature_names_in_`.

    For columns of whole or rounded numbers, log-densities are those of the numbers with uniform
    noise one step wide, averaged over 8 fixed draws. In units of the step, this is a lower bound on
    the log-probability of the number, on average (Theis et al. 2016).
    """

    n_features_in_: int
    feature_names_in_: np.ndarray
    names_: list

    def __init__(self, *, columns=None, steps=None, random_state=0, embedding=None, progress=True):
        self.columns = columns
        self.steps = steps
        self.random_state = random_state
        self.embedding = embedding
        self.progress = progress

    def fit(self, X: Any, y: Any = None, *, context: Any = None) -> "FlowDensity":
        """Learn the density of the rows of X (n, dim), given those of `context` (n, ...).

        `y` is ignored, as in other density estimators of scikit-learn. To learn p(y given x), call
        `fit(y, context=x)`.

        **Raises:** `ValueError` for fewer than 5 rows, constant columns, values that are not finite
        numbers, and values outside the supports that `columns` gives. Warns of columns that only
        count the rows, of outliers, and of fewer than two rows per column.
        """
        if self.steps is not None:
            check_int(steps=self.steps)
        rows = _numbers(self, X, reset=True)
        self.dtypes_ = _dtypes(X)
        self.names_ = X.columns.tolist() if self.dtypes_ else list(range(rows.shape[1]))
        check_rows(rows, self.names_)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.columns_ = resolve(self.names_, rows, self.columns)
        warn_of_outliers(rows, self.names_, self.columns_)
        side = Side.fit(rows, self.columns_, seed)
        self.context_ = None
        given = None
        if context is not None:
            self._fit_context(rows, context, seed + 1)
            given = self.transformed_context(context)
        elif self.embedding is not None:
            raise InputError("an embedding needs a context: fit(y, context=x)")
        normal, logdet = side.to_base(side.noisy(rows, seed + 2))
        with jax.enable_x64(True):
            circular = tuple(support.circular for support in self.columns_)
            whiten = _whiten(normal, None if self.embedding else given, circular)
        z, more = apply(whiten, normal, "to_base", given)
        self.outer_ = (whiten, side.map)
        self.plan_ = Plan.of(len(rows), self.steps, circular, given is not None)
        network = None if given is None else network_of(self.embedding, self.context_shape_)
        with _bar(self.plan_.steps, self.progress) as tell, jax.enable_x64(False):
            trained = train(z, given, self.plan_, jr.key(seed), tell, network)
        self.mixture_, self.history_ = trained.mixture, trained.history
        self.held_out_nll_ = trained.held_out_nll - float(np.mean(logdet + more))
        return self

    def score_samples(self, X: Any, *, context: Any = None) -> Float[np.ndarray, " n"]:
        """Return the log-density of each row, nats in the units of X; -inf outside the support.

        NaN where no flow could be solved. Warns of rows outside the support.
        """
        rows, given = self._rows(X), self.transformed_context(context)
        self._check_pair(rows, given)
        inside = self._inside(rows)
        safe = np.where(inside[:, None], rows, self._middle())
        noises = self._noises()
        found = np.stack([self._score(safe + noise, given) for noise in noises], axis=1)
        scores = np.logaddexp.reduce(found, axis=1) - np.log(len(noises))
        return np.where(inside, scores, -np.inf)

    def score(self, X: Any, y: Any = None, *, context: Any = None) -> float:
        """Return the mean log-density of the rows, in nats."""
        return float(np.mean(self.score_samples(X, context=context)))

    def sample(self, n_samples: int = 1, *, context: Any = None, random_state: Any = None) -> Any:
        """Draw samples (n_samples, dim); a DataFrame with the dtypes of X, if X was one.

        With a context, its rows are used in turn. `random_state` is by default that of the
        estimator; give another for other samples.
        """
        check_is_fitted(self)
        check_int(n_samples=n_samples)
        state = self.random_state if random_state is None else random_state
        seed = int(check_random_state(state).randint(2**31 - 1))
        given = self.transformed_context(context)
        if given is not None:
            given = given[np.arange(n_samples) % len(given)]
        rng = np.random.default_rng(seed)
        weights = self.mixture_.weights
        which = rng.choice(len(weights), size=n_samples, p=weights / weights.sum())
        with jax.enable_x64(False):
            z = np.asarray(StandardNormal(self.n_features_in_).sample(jr.key(seed), n_samples))
        drawn = self._in_columns(self._carry(z, which, given), given)
        return self._framed(self._finished(drawn))

    @available_if(_has_context)
    def predict(self, context: Any) -> Float[np.ndarray, "n dim"]:
        """Return the mean of X given each row of the context, (n, dim), or (n,) for one column."""
        draws, x = self._drawn(context)
        mean = np.einsum("d,ndk->nk", draws.shares, x)
        return mean[:, 0] if mean.shape[1] == 1 else mean

    @available_if(_has_context)
    def quantile(self, q: Any, context: Any) -> Float[np.ndarray, "n ..."]:
        """Return the quantiles `q` of each column of X given each row of the context.

        The shape is (n, len(q), dim); the axes of a scalar `q` and of a single column are left out.
        For one column they are those of the mixture's distribution function, interpolated between
        points of it, up to levels of 3e-6 from 0 and 1. For more columns, or a circular one, they
        are those of 200 draws, and levels within 0.01 of 0 and 1 are rough. They are NaN where a
        draw could not be solved.
        """
        levels = np.atleast_1d(np.asarray(q, float))
        if levels.ndim != 1 or not ((levels > 0) & (levels < 1)).all():
            raise ValueError(f"q must be between 0 and 1, a number or a list of them; got {q!r}")
        draws, x = self._drawn(context)
        # The flow of a circular column jumps where its circle is cut.
        increasing = x.shape[2] == 1 and not self.columns_[0].circular
        found = draws.quantiles(x, levels, increasing)
        found = self._finished(found)
        found = found[:, :, 0] if found.shape[2] == 1 else found
        return found[:, 0] if np.ndim(q) == 0 else found

    def describe(self) -> str:
        """Return one line for each column: its name, its support, and whether it has a spline."""
        check_is_fitted(self)
        knots = np.asarray(self.outer_[1].knots)
        return "\n".join(
            f"{name}: {support}" + (f", spline of {k} knots" if k else "")
            for name, support, k in zip(self.names_, self.columns_, knots, strict=True)
        )

    @property
    def flow_(self) -> Flow:
        """The trained flow of greatest weight, for the functions of jcnf, in the units of the data.

        It is one component of the density, computed in float32, and a normal distribution only if
        the mixture has no trained flow. For whole numbers its density is that of the numbers with
        noise. It takes the transformed context, not the one of `fit`.
        """
        check_is_fitted(self)
        flow, _ = max(
            zip(self.mixture_.flows, self.mixture_.weights, strict=True),
            key=lambda pair: (not isinstance(pair[0].bijection, Affine), pair[1]),
        )
        with jax.enable_x64(True):
            outer = [cast(part, jnp.float32) for part in self.outer_]
        return Chain([flow.bijection, *outer], flow.base)

    def save(self, path: str | Path) -> None:
        """Save the fitted estimator to a file that `load` reads. It has no pickles."""
        check_is_fitted(self)
        _saving.save(self, path)

    @classmethod
    def load(cls, path: str | Path, *, embedding: Any = None) -> "FlowDensity":
        """Return an estimator that `save` wrote, which needs its `embedding` again, if it has one.

        **Raises:** `ValueError` if the file is missing, damaged or not of an estimator.
        """
        params, state = _saving.load(path, embedding)
        self = cls(**params, embedding=embedding)
        vars(self).update(state)
        return self

    def __getstate__(self):
        return to_pickle(super().__getstate__(), "outer_")

    def __setstate__(self, state):
        super().__setstate__(from_pickle(state, "outer_"))

    def _rows(self, X):
        check_is_fitted(self)
        return _numbers(self, X, reset=False)

    def transformed_context(self, context: Any) -> Float[np.ndarray, "n context"] | None:
        """Return a context as the flows take it, each column about normal; None without one."""
        if (context is None) != (self.context_ is None):
            raise ValueError(
                "this density was fitted without a context: leave out context"
                if self.context_ is None
                else f"this density is given {_listed(self.context_[0])}: pass context"
            )
        if self.context_ is None:
            return None
        names, side = self.context_
        frame = self._context_rows(context)
        known = frame.named and names != [str(i) for i in range(len(names))]
        if frame.rows.shape[1] != len(names) or (known and frame.names != names):
            raise ValueError(
                f"expected a context of {_listed(names)}, in this order; got {_listed(frame.names)}"
            )
        z, _ = side.to_base(side.clipped(frame.rows))
        return z.astype(np.float32)

    def _fit_context(self, rows, context, seed):
        self.context_shape_ = np.shape(context)[1:]
        frame = self._context_rows(context)
        self._check_pair(rows, frame.rows)
        if self.embedding is not None and len(self.context_shape_) > 1:
            size = self.context_shape_[-1]
            check_constant(frame.rows.reshape(-1, size), range(size), "the context is ")
            side = Side.fit_alike(frame.rows, size, seed)
        else:
            check_constant(frame.rows, frame.names, "the context is ")
            side = Side.fit(frame.rows, resolve(frame.names, frame.rows, None), seed)
        self.context_ = (frame.names, side)

    def _context_rows(self, context):
        """Return the context as rows, flattened if it has more than two axes."""
        if self.embedding is None and len(self.context_shape_) < 2:
            return ContextRows(context)
        context = np.asarray(context)
        if context.ndim < 2 or context.shape[1:] != self.context_shape_:
            expected = ", ".join(map(str, ("n", *self.context_shape_)))
            raise ValueError(f"expected a context of shape ({expected}); got {context.shape}")
        return ContextRows(context.reshape(len(context), -1))

    def _check_pair(self, rows, given):
        if given is not None and len(given) != len(rows):
            raise ValueError(
                f"X and context must have as many rows; got {len(rows)} and {len(given)}"
            )

    def _inside(self, rows):
        """Return which rows are in the support of every column; warn of the others."""
        inside = np.ones(len(rows), bool)
        for name, support, x in zip(self.names_, self.columns_, rows.T, strict=True):
            contained = support.contains(x)
            inside &= contained
            if not contained.all():
                warnings.warn(
                    f"column {name} is outside its support ({support}) in "
                    f"{list_rows(np.flatnonzero(~contained), len(x))}, whose log-density is -inf. "
                    "If such values are possible, give FlowDensity the column's support by "
                    "columns={...}",
                    stacklevel=3,
                )
        return inside

    def _middle(self):
        """Return a row inside the support, in the place of those outside."""
        whiten, columns = self.outer_
        return apply(columns, np.asarray(whiten.loc)[None], "to_data")[0]

    def _noises(self):
        """Return the draws of the noise of rounded columns, or none at all."""
        steps = np.array([support.step for support in self.columns_])
        if not steps.any():
            return np.zeros((1, len(steps)))
        points = qmc.Sobol(len(steps), rng=np.random.default_rng(0)).random(NOISE_DRAWS)
        return (points - 0.5) * steps

    def _score(self, rows, given):
        whiten, columns = self.outer_
        y, logdet = apply(columns, rows, "to_base")
        z, more = apply(whiten, y, "to_base", given)
        with jax.enable_x64(False):
            found = self.mixture_.log_prob(single(z), None if given is None else single(given))
        return found + logdet + more

    def _carry(self, z, which, given, solve=evaluate.ACCURATE):
        """Return whitened samples: each row of z through the flow of its number in `which`.

        The rows are normal scores, which become samples of the flow's base.
        """
        out = np.empty_like(z)
        # Batches of one shape, a power of two, so that flows and calls share a compiled program.
        most = int(np.bincount(which).max())
        chunk = min(2 ** (most - 1).bit_length(), MAX_CHUNK)
        for i, flow in enumerate(self.mixture_.flows):
            rows = np.flatnonzero(which == i)
            if not len(rows):
                continue
            filled = np.pad(rows, (0, -len(rows) % chunk), mode="edge")
            with jax.enable_x64(False):
                flow, own = unembedded(flow, None if given is None else single(given[filled]))
                x = from_scores(flow.base, single(z[filled]))
                found = evaluate.transform(
                    flow, x, "to_data", context=own, chunk=chunk, solve=solve
                )
            out[rows] = found.x[-1][: len(rows)]
        return out

    def _in_columns(self, z, given):
        """Return whitened samples in the units of the columns, before whole numbers are rounded."""
        whiten, columns = self.outer_
        y, _ = apply(whiten, z, "to_data", given)
        return apply(columns, y, "to_data")[0]

    def _finished(self, rows):
        """Return rows (..., dim) rounded and inside their supports."""
        return np.stack([s.finish(rows[..., i]) for i, s in enumerate(self.columns_)], axis=-1)

    def _framed(self, rows):
        if self.dtypes_ is None:
            return rows
        import pandas

        frame = pandas.DataFrame(rows, columns=self.names_)
        for name, dtype, support in zip(self.names_, self.dtypes_, self.columns_, strict=True):
            if pandas.api.types.is_integer_dtype(dtype) and not support.step:
                continue  # the samples are not whole
            frame[name] = frame[name].astype(dtype)
            if frame[name].dtype in (np.float32, np.float16):  # it may round to a bound
                frame[name] = support.finish(frame[name].to_numpy())
        return frame

    def _drawn(self, context) -> tuple[Draws, Float[np.ndarray, "n draws dim"]]:
        """Return the draws, and what they become for each row of the context, not yet rounded."""
        check_is_fitted(self)
        given, dim = self.transformed_context(context), self.n_features_in_
        assert given is not None  # these methods exist only with a context
        draws = Draws.of(self.mixture_.weights, dim)
        number = len(draws.which)
        out, at_once = [], max(1, FLOW_DRAWS_AT_ONCE // number)
        for start in range(0, len(given), at_once):
            part = given[start : start + at_once]
            many = np.repeat(part, number, axis=0)
            scores = np.tile(draws.scores, (len(part), 1)).astype(np.float32)
            carried = self._carry(scores, np.tile(draws.which, len(part)), many, DRAW_SOLVE)
            out.append(self._in_columns(carried, many).reshape(len(part), number, dim))
        return draws, np.concatenate(out)


def _whiten(x, given, circular):
    """Return the map that whitens all columns but angles, which it leaves as they are."""
    dim, others = len(circular), np.flatnonzero(~np.array(circular))
    loc, scale = np.zeros(dim), np.eye(dim)
    weight = None if given is None else np.zeros((dim, given.shape[1]))
    if len(others):
        part = Affine.whiten(x[:, others], given)
        loc[others], scale[np.ix_(others, others)] = part.loc, part.scale
        if weight is not None:
            weight[others] = part.weight
    return Affine(loc, scale, weight)


def _numbers(estimator, X, reset) -> np.ndarray:
    least = MIN_ROWS if reset else 1
    refuse_text(X, "the table")
    rows: Any = validate_data(
        estimator,
        X,
        dtype=np.float64,
        reset=reset,
        ensure_min_samples=least,
        ensure_all_finite=False,
    )
    refuse_nan(rows, X.columns if hasattr(X, "columns") else range(rows.shape[1]), "the table")
    return rows


def _dtypes(X):
    return list(X.dtypes) if hasattr(X, "dtypes") and hasattr(X, "columns") else None


def _listed(names):
    noun = "column" if len(names) == 1 else "columns"
    return f"{len(names)} {noun} ({', '.join(map(str, names))})"


@contextmanager
def _bar(total, progress):
    """Yield a function that moves a progress bar by steps and sets its words."""
    from tqdm import tqdm

    with tqdm(total=total, unit="step", dynamic_ncols=True, disable=not progress) as bar:

        def tell(steps, words):
            bar.update(steps)
            bar.set_postfix_str(words)

        yield tell
