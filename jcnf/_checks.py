"""Checks of arguments, and the exception for bad input."""

import importlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


class InputError(ValueError):
    """Bad input from a person: a file, a setting, a run directory.

    Its message is one line that says what was found, where, and what to do. The experiments print
    the message and exit with code 2; in Python it is an ordinary `ValueError`.
    """


MAX_LISTED_ROWS = 3

_IN_WORDS = {
    "(0, inf)": "positive and finite",
    "[0, inf)": "at least 0 and finite",
    "(-inf, inf)": "finite",
}


def check_int(lowest: int = 1, highest: int | None = None, **given: Any) -> None:
    """Check for whole numbers from `lowest` to `highest`; a bool is not one."""
    upto = "" if highest is None else f" and at most {highest}"
    for name, value in given.items():
        if not _is_whole(value) or value < lowest or (highest is not None and value > highest):
            raise ValueError(
                f"{name} must be a whole number, at least {lowest}{upto}; got {name}={value!r}"
            )


def check_ints(lowest: int = 1, **given: Any) -> None:
    """Check for sequences of whole numbers, each at least `lowest`; they may be empty."""
    for name, values in given.items():
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise ValueError(f"{name} must be a tuple of whole numbers; got {name}={values!r}")
        if not all(_is_whole(value) and value >= lowest for value in values):
            raise ValueError(
                f"{name} must be whole numbers, each at least {lowest}; got {name}={tuple(values)}"
            )


def check_number(interval: str, **given: Any) -> None:
    """Check for real scalars in an interval such as "[0, 1)"; a bool is not one. Skips tracers."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    for name, value in given.items():
        if isinstance(value, Tracer):
            continue
        if isinstance(value, jax.Array):
            value = np.asarray(value)  # a comparison would be traced inside a jit
        inside = _is_real(value) and (
            (low <= value if interval[0] == "[" else low < value)
            and (value <= high if interval[-1] == "]" else value < high)
        )
        if not inside:
            words = _IN_WORDS.get(interval, f"in {interval}")
            raise ValueError(f"{name} must be {words}; got {value!r}")


def check_key(key: Any) -> None:
    """Check for a single typed key."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        got = repr(key) if dtype is None else f"{dtype} of shape {shape}"
        raise ValueError(f"expected a typed key; got {got}: make one with jax.random.key(seed)")
    if shape != ():
        raise ValueError(f"expected one key; got keys of shape {shape}: pass one of them")


def check_instance(kind: type | tuple[type, ...], hint: str, **given: Any) -> None:
    """Check for instances of `kind`, which `hint` describes."""
    for name, value in given.items():
        if not isinstance(value, kind):
            raise ValueError(f"{name} must be {hint}; got {_shown(value)}")


def check_callable(hint: str, **given: Any) -> None:
    """Check for functions or callable instances, not classes or names; `hint` describes them."""
    for name, value in given.items():
        if not callable(value) or isinstance(value, type):
            raise ValueError(f"{name} must be {hint}; got {_shown(value)}")


def check_finite(**given: Any) -> None:
    """Check for arrays without NaN or inf, and name the first bad rows. Skips None and tracers."""
    for name, values in given.items():
        if values is None or isinstance(values, Tracer):
            continue
        values = np.atleast_1d(np.asarray(values))
        good: Any = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
        if not good.all():
            unit, advice = ("rows", "remove those rows")
            if values.ndim == 1:
                unit, advice = ("entries", "all must be finite")
            bad = list_rows(np.flatnonzero(~good), len(good), unit)
            raise ValueError(f"{name} has NaN or inf in {bad}: {advice}")


def list_rows(some: np.ndarray, number: int, unit: str = "rows") -> str:
    """Describe some of `number` indices, as "3 of 500 rows (first: 12, 77, 140)"."""
    first = ", ".join(str(index) for index in some[:MAX_LISTED_ROWS])
    more = ", ..." if len(some) > MAX_LISTED_ROWS else ""
    return f"{len(some)} of {number} {unit} (first: {first}{more})"


def import_named(module_name: str, name: str) -> Any:
    """Import a module by its name and return what has another name there.

    **Raises:** `InputError` for a module that is not found or fails, and for an unknown name.
    """
    try:
        module: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        hint = "" if error.name == module_name else f" (it imports {error.name}, which is missing)"
        raise InputError(
            f"no module {module_name!r} to import{hint}: use module:function, with the module's "
            "file in the working directory or on PYTHONPATH"
        ) from None
    except (Exception, SystemExit) as error:
        raise InputError(f"importing {module_name} failed: {in_a_line(error)}") from error
    if not hasattr(module, name):
        raise InputError(f"module {module_name} has no {name!r}")
    return getattr(module, name)


def in_a_line(error: BaseException) -> str:
    """Return the error's type and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def check_floats(length: int, **given: Any) -> None:
    """Check for vectors of `length` floating-point numbers of any value; they may be traced."""
    for name, values in given.items():
        is_array = isinstance(values, jax.Array | np.ndarray)
        if is_array and jnp.issubdtype(values.dtype, jnp.floating) and values.shape == (length,):
            continue
        got = f"{values.dtype} of shape {values.shape}" if is_array else _shown(values)
        raise ValueError(f"{name} must be an array of {length} floats; got {got}")


def check_shape(what: str, given: Any) -> None:
    """Check for the height, width and channels of an image."""
    if not isinstance(given, Sequence) or len(given) != 3:
        raise ValueError(f"{what} must be (height, width, channels); got {given!r}")
    check_ints(1, **{what: given})


def _is_whole(value):
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_real(value):
    if isinstance(value, bool | str | bytes) or value is None:
        return False
    scalar = jnp.shape(value) == () if hasattr(value, "dtype") else isinstance(value, int | float)
    return scalar and not jnp.issubdtype(jnp.result_type(value), jnp.bool_)


def _shown(value):
    if isinstance(value, type):
        return f"the class {value.__name__}: make an instance of it"
    text = repr(value)
    return text if len(text) < 80 else f"a {type(value).__name__}"
