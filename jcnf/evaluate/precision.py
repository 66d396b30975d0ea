"""Computation in float64, whatever the precision of the process."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


def in_float64(function: Callable, *arguments: Any) -> Any:
    """Return `function(*arguments)` computed in float64, with the arguments' arrays converted."""

    def double(leaf):
        if not eqx.is_inexact_array(leaf):
            return leaf
        return jnp.asarray(np.asarray(leaf, np.float64))

    with jax.enable_x64(True):
        return function(*jax.tree.map(double, arguments))
