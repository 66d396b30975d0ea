"""Classifier-free guidance: one field that knows the context, and what it does without."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jcnf import require
from jcnf.fields.jacobian import velocity_and_divergence
from jcnf.fields.wrappers import Wrapper


class Guided(Wrapper):
    """v(t, x, c) = f(t, x, 0) + scale (f(t, x, c) - f(t, x, 0)) (Ho & Salimans 2022).

    In their terms the scale is 1 + w; Zheng et al. 2023 have it for flows.

    0 is the null context, which `objectives.flow_matching(..., drop_context=rate)` trains along:
    contexts must not be 0 themselves, so encode classes as one-hot vectors, and give numbers a
    column of ones beside them. With `scale` 1 it is f, with 0 f without a context; above 1 samples
    keep closer to what tells a context from others, and are no longer those of p(x | c).
    Log-densities are those of the guided flow.

    **Arguments:**

    - `field`: f, a field that takes a context.
    - `scale`: any finite number; an array, where many are tried with one program.

    **Raises:** `ValueError` for a scale that is not finite, and for a call without a context.
    """

    field: Any
    scale: float | Float[Array, ""]

    def __check_init__(self):
        require.number("(-inf, inf)", scale=self.scale)

    def __call__(
        self, t: Float[Array, ""], x: Float[Array, " dim"], context=None
    ) -> Float[Array, " dim"]:
        """The velocity dx/dt at time `t`, (dim,)."""
        without = self.field(t, x, _null(context))
        return without + self.scale * (self.field(t, x, context) - without)

    def velocity_and_divergence(
        self, t: Float[Array, ""], x: Float[Array, " dim"], context=None
    ) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
        """v (dim,) and its divergence: the same combination of f's."""
        v, div = velocity_and_divergence(self.field, t, x, context)
        v0, div0 = velocity_and_divergence(self.field, t, x, _null(context))
        return v0 + self.scale * (v - v0), div0 + self.scale * (div - div0)


def _null(context):
    if context is None:
        raise ValueError("a guided field needs a context: pass context of shape (batch, context)")
    return jnp.zeros_like(context)
