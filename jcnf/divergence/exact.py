"""Divergences without noise: the field's closed form, or forward mode."""

import equinox as eqx

from jcnf._checks import check_int
from jcnf.divergence.base import Divergence, Local
from jcnf.divergence.estimators import Hutchinson
from jcnf.fields import base


class ForwardMode(Divergence):
    """The trace of the Jacobian by `dim` forward-mode products: exact for every field.

    The reference that closed forms are tested against; costs about `dim` evaluations.

    **Arguments:**

    - `chunk`: columns of the Jacobian at a time. Beyond so many dimensions they are taken piece by
      piece and recomputed in reverse mode, so that memory does not grow with `dim`.
    """

    chunk: int = eqx.field(static=True, default=base.CHUNK)

    def __check_init__(self):
        check_int(chunk=self.chunk)

    def __call__(self, field, t, x, context, noise):
        """Velocity, trace and squared Frobenius norm, exactly."""
        return Local(*base.trace_and_square(field, t, x, context, self.chunk))


class Exact(Divergence):
    """The field's closed form where it has one, forward mode otherwise.

    **Arguments:**

    - `probes`: products with so many Rademacher probes are taken beside the closed form, for the
      penalties that need them (`jcnf.regularizers.jacobian`); 0 for none.
    """

    probes: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        check_int(0, probes=self.probes)

    def draw(self, key, batch, dim, dtype):
        """The probes' noise; consumes `key` where there are probes, and needs none otherwise."""
        return Hutchinson(self.probes).draw(key, batch, dim, dtype) if self.probes else None

    def __call__(self, field, t, x, context, noise):
        """Velocity and exact divergence; the squared Frobenius norm where products were taken."""
        if not hasattr(field, "velocity_and_divergence"):
            return ForwardMode()(field, t, x, context, None)
        v, divergence = field.velocity_and_divergence(t, x, context)
        if noise is None:
            return Local(v, divergence)
        return Local(v, divergence, Hutchinson(self.probes)(field, t, x, context, noise).frobenius)
