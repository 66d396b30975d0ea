"""Exact divergences: the field's closed form, or forward mode."""

import equinox as eqx

from jcnf._checks import check_int
from jcnf.divergence.base import Divergence, FieldEvaluation
from jcnf.divergence.estimators import Hutchinson
from jcnf.fields import base


class ForwardMode(Divergence):
    """Trace of the Jacobian by `dim` forward-mode products, exact for every field.

    It costs about `dim` evaluations, and is the reference that closed forms are tested against.

    **Arguments:**

    - `chunk`: number of Jacobian columns computed at a time. In more dimensions than that, they are
      computed in chunks and recomputed in reverse mode, so that memory does not grow with `dim`.

    **Raises:** `ValueError` if `chunk` is not a whole number, at least 1.
    """

    chunk: int = eqx.field(static=True, default=base.CHUNK)

    def __check_init__(self):
        check_int(chunk=self.chunk)

    def __call__(self, field, t, x, context, noise):
        """Return the velocity, and the exact trace and squared Frobenius norm."""
        return FieldEvaluation(*base.trace_and_frobenius(field, t, x, context, self.chunk))


class Exact(Divergence):
    """The field's closed form if it has one, forward mode otherwise.

    **Arguments:**

    - `probes`: number of Rademacher probes whose products are computed in addition to the closed
      form, for the regularizers that need them (`jcnf.regularizers.jacobian`); 0 for none.

    **Raises:** `ValueError` if `probes` is not a whole number, at least 0.
    """

    probes: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        check_int(0, probes=self.probes)

    def draw(self, key, batch, dim, dtype):
        """Return the noise of the probes and consume `key`; without probes, return None."""
        return Hutchinson(self.probes).draw(key, batch, dim, dtype) if self.probes else None

    def __call__(self, field, t, x, context, noise):
        """Return the velocity, the divergence and, if products were computed, |dv/dx|_F^2."""
        if not hasattr(field, "velocity_and_divergence"):
            return ForwardMode()(field, t, x, context, None)
        v, divergence = field.velocity_and_divergence(t, x, context)
        if noise is None:
            return FieldEvaluation(v, divergence)
        return FieldEvaluation(
            v, divergence, Hutchinson(self.probes)(field, t, x, context, noise).frobenius
        )
