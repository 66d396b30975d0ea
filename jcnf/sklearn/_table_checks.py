"""What tables are refused for, by column and row, and what is told about them."""

import warnings

import numpy as np

from jcnf._checks import InputError, list_rows

OUTLIER = 30.0  # robust standard deviations


def refuse_text(table, what):
    """Raise `InputError` that names the columns of a DataFrame that hold no numbers."""
    if hasattr(table, "select_dtypes") and len(table):
        others = table.select_dtypes(exclude=["number", "bool"])
        text = [str(name) for name in others if not _is_number(others[name].iloc[0])]
        if text:
            raise InputError(
                f"{what} has columns that are not numbers: {', '.join(text)}. Leave them out, or "
                "make a column of 0 and 1 for each value (pandas.get_dummies) and pass these as "
                "context"
            )


def refuse_nan(rows, names, what):
    """Raise `InputError` that names a column, and its rows, whose values are not all finite."""
    for name, bad in zip(names, ~np.isfinite(rows).T, strict=True):
        if bad.any():
            raise InputError(
                f"{what} has NaN or inf in column {name}, in "
                f"{list_rows(np.flatnonzero(bad), len(bad))}: drop or fill in these rows first"
            )


def _is_number(value):
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def check_constant(rows, names, subject=""):
    """Raise `InputError` that names the columns whose values are all the same."""
    constant = [str(n) for n, x in zip(names, rows.T, strict=True) if (x == x[0]).all()]
    if constant:
        raise InputError(
            f"{subject}constant in all {len(rows)} rows: {', '.join(constant)}: leave these "
            "columns out"
        )


def check_rows(rows, names):
    """Refuse constant columns; warn of few rows, and of columns that only count them."""
    check_constant(rows, names)
    if len(rows) < 2 * len(names):
        warnings.warn(
            f"{len(rows)} rows are few for {len(names)} columns: the density follows chance "
            "dependences of these rows, and held_out_nll_ is too low. Leave columns out, or use "
            "their principal components",
            stacklevel=3,
        )
    counts = (np.diff(rows, axis=0) == 1).all(axis=0)
    for name in np.array(names, dtype=object)[counts]:
        warnings.warn(f"column {name} counts the rows: leave it out", stacklevel=3)


def warn_of_outliers(rows, names, supports):
    """Warn of values far from the others, on a logarithmic scale if the column has one bound."""
    for name, x, support in zip(names, rows.T, supports, strict=True):
        low, high = np.isfinite(support.bounds)
        if low != high:
            x = np.log(x - support.cells.lower if low else support.cells.upper - x)
        center = np.median(x)
        spread = 1.4826 * np.median(np.abs(x - center))
        far = np.abs(x - center) > (OUTLIER * spread if spread > 0 else np.inf)
        if 0 < far.sum() <= max(1, 0.005 * len(x)):
            scale = "logarithm" if low != high else "value"
            warnings.warn(
                f"column {name}: the {scale} is more than {OUTLIER:g} robust standard deviations "
                f"from its median in {list_rows(np.flatnonzero(far), len(x))}. The tail of the "
                "density covers them; remove these rows if they are errors",
                stacklevel=3,
            )
