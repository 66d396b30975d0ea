"""Exact divergences: the field's own, in closed form if it has one, or forward mode."""

import equinox as eqx

from jcnf._checks import check_int
from jcnf.divergence.base import Divergence, FieldEvaluation
from jcnf.divergence.estimators import Hutchinson
from jcnf.fields.base import CHUNK, trace_and_frobenius


class ForwardMode(Divergence):
    """Trace of the Jacobian by `dim` forward-mode products, exact for every field.

    It costs about `dim` evaluations, and is the reference that closed forms are tested against.

    **Arguments:**

    - `chunk`: number of Jacobian columns computed at a time. In more dimensions than that, they are
      computed in chunks and recomputed in reverse mode, so that memory does not grow with `dim`.

    **Raises:** `ValueError` if `chunk` is not a whole number, at least 1.
    """

    chunk: int = eqx.field(static=True, default=CHUNK)

    def __check_init__(self):
        check_int(chunk=self.chunk)

    def __call__(self, field, t, x, context, noise):
        """Return the velocity, and the exact trace and squared Frobenius norm."""
        return FieldEvaluation(*trace_and_frobenius(field, t, x, context, chunk=self.chunk))


class Exact(Divergence):
    """The field's `velocity_and_divergence`: its closed form, or forward mode if it has none.

    **Arguments:**

    - `probes`: number of Rademacher probes whose products are computed in addition, for the
      regularizers that need them (`jcnf.regularizers.jacobian`); 0 for none.

    **Raises:** `ValueError` if `probes` is not a whole number, at least 0.
    """

    probes: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        check_int(0, probes=self.probes)

    def draw_noise(self, key, batch, dim, dtype):
        """Return the noise of the probes and consume `key`; without probes, return None."""
        return Hutchinson(self.probes).draw_noise(key, batch, dim, dtype) if self.probes else None

    def __call__(self, field, t, x, context, noise):
        """Return the velocity, the divergence and, if there are probes, |dv/dx|_F^2."""
        v, divergence = field.velocity_and_divergence(t, x, context)
        if not self.probes:
            return FieldEvaluation(v, divergence)
        probed = Hutchinson(self.probes)(field, t, x, context, noise)
        return FieldEvaluation(v, divergence, probed.frobenius)
