"""Where the steps of a solve are best put, learnt from a solve like it.

A mesh is the number of steps, of the size that the controller finds right, in each of `PARTS` equal
parts of the interval; zeros where nothing is known. Their sum, rounded up, is how many steps a
solve needs, and points between which they are equally many share its error equally (de Boor 1973,
"Good approximation by splines with variable knots"). A solver that looks back only finds out by
rejections where its steps must be short, and in training finds it out at every step anew.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

PARTS = 64
SHORT = 0.1  # of a step: less is added to the next
Mesh = Float[Array, " parts"]


def unknown(dtype) -> Mesh:
    """Of no solve."""
    return jnp.zeros(PARTS, dtype)


def is_known(mesh: Mesh) -> Bool[Array, ""]:
    """Whether it is of a solve that arrived."""
    return jnp.all(mesh > 0) & jnp.all(jnp.isfinite(mesh))


def with_step(
    mesh: Mesh, start: Float[Array, ""], end: Float[Array, ""], steps: Float[Array, ""]
) -> Mesh:
    """With the step from `start` to `end`, fractions of the interval, where `steps` to all of the
    interval are of the right size."""
    edges = jnp.arange(len(mesh) + 1, dtype=mesh.dtype) / len(mesh)
    within = jnp.clip(edges, start.astype(mesh.dtype), end.astype(mesh.dtype))
    return mesh + jnp.diff(within) * steps.astype(mesh.dtype)


def next_point(mesh: Mesh, start: Float[Array, ""]) -> Float[Array, ""]:
    """The point where a step from `start` should end, both fractions of the interval."""
    edges = jnp.arange(len(mesh) + 1, dtype=mesh.dtype) / len(mesh)
    steps = jnp.append(jnp.zeros_like(mesh[:1]), jnp.cumsum(mesh))
    number = jnp.ceil(steps[-1])
    done = jnp.interp(start.astype(mesh.dtype), edges, steps) / steps[-1] * number
    # A step that was cut short leaves a rest that is not worth one of its own.
    following = jnp.floor(done + SHORT) + 1
    point = jnp.interp(following / number * steps[-1], steps, edges)
    # Not by interpolation: the last parts may have less than a rounding of all steps.
    return jnp.where(following < number, point, 1).astype(start.dtype)
