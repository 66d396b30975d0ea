"""Several devices, in one process or many: an ambient mesh with one axis, the batch.

Under `with jax.set_mesh(jcnf.sharding.make_mesh()):` batches are split among the devices, and every
other array is on every device. XLA partitions the programs, and the ODE of a batch remains one ODE:
its error norm becomes a sum over the devices. Results therefore do not depend on the number of
devices, up to rounding. Outside a mesh, the functions here do nothing.
"""

import os
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, PartitionSpec, get_abstract_mesh
from jaxtyping import PyTree

from jcnf._checks import InputError

AXIS = "batch"


def initialize() -> None:
    """Join this process to the others that the environment names.

    Call it before anything touches a device. It does nothing unless `JAX_COORDINATOR_ADDRESS`, the
    host:port of the first process, is set. On a cluster whose scheduler is known to
    `jax.distributed`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` (from 0) may be left unset.

    **Raises:** `InputError` if a variable is missing or invalid.
    """
    if "JAX_COORDINATOR_ADDRESS" not in os.environ:
        return
    address = os.environ["JAX_COORDINATOR_ADDRESS"]
    if not address.rpartition(":")[2].isdecimal():
        raise InputError(f"JAX_COORDINATOR_ADDRESS must be HOST:PORT; got {address!r}")
    names = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
    try:
        number, place = (int(os.environ[n]) if n in os.environ else None for n in names)
        jax.distributed.initialize(num_processes=number, process_id=place)
    except ValueError as error:
        raise InputError(
            f"JAX_COORDINATOR_ADDRESS asks for several processes: set {' and '.join(names)} "
            f"in each of them ({error})"
        ) from None


def make_mesh(devices: int = 0) -> Mesh:
    """Return a mesh of `devices` devices, or of all with 0, for `jax.set_mesh`.

    Every process contributes the same number.

    **Raises:** `ValueError` if there are fewer devices, or the processes cannot share them evenly.
    """
    of_process: dict[int, list] = {}
    for device in jax.devices():
        of_process.setdefault(device.process_index, []).append(device)
    processes, there = len(of_process), min(map(len, of_process.values()))
    each, rest = divmod(devices or processes * there, processes)
    if rest or not 0 < each <= there:
        among = f" in {processes} processes, the same number in each" if processes > 1 else ""
        raise ValueError(f"expected 1 to {processes * there} devices{among}; got {devices}")
    chosen = [device for own in of_process.values() for device in own[:each]]
    return Mesh(np.array(chosen), (AXIS,), axis_types=(AxisType.Auto,))


def num_devices() -> int:
    """Return the number of devices that share a batch, 1 outside a mesh.

    **Raises:** `ValueError` in a mesh whose batch axis is not of type Auto, in which XLA chooses
    how arrays are split.
    """
    mesh = get_abstract_mesh()
    if AXIS in mesh.explicit_axes:
        raise ValueError(
            "expected the mesh's axis 'batch' to be of type Auto; got Explicit: make the mesh by "
            "jcnf.sharding.make_mesh"
        )
    return mesh.shape[AXIS] if AXIS in mesh.auto_axes else 1


def shard(batch: PyTree) -> PyTree:
    """Split the arrays of `batch` among the devices along `batch.batch_axis`, by default axis 0.

    **Raises:** `InputError` if the batch size is not a multiple of the number of devices.
    """
    number, axis = num_devices(), getattr(batch, "batch_axis", 0)
    if number == 1:
        return batch
    sizes = {leaf.shape[axis] for leaf in jax.tree.leaves(batch)}
    if any(size % number for size in sizes):
        raise InputError(
            f"expected a batch size that is a multiple of the {number} devices; got {max(sizes)}"
        )
    return _placed(batch, PartitionSpec(*[None] * axis, AXIS))


def shard_if_even(batch: PyTree) -> PyTree:
    """Split `batch` along axis 0 if the devices can share it evenly; otherwise return it as is."""
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    return batch if any(size % num_devices() for size in sizes) else shard(batch)


def replicate(tree: PyTree) -> PyTree:
    """Copy all arrays, including random keys, to every device."""
    return tree if num_devices() == 1 else _placed(tree, PartitionSpec())


# Jitted so that it also accepts arrays that were made outside the mesh.
@partial(jax.jit, static_argnums=1, inline=True)
def _placed(tree, spec):
    return jax.lax.with_sharding_constraint(tree, spec)


def to_host(tree: PyTree) -> PyTree:
    """Return the whole arrays as numpy arrays, in every process."""
    return jax.device_get(replicate(tree))


def on_process_zero(function: Callable[[], Any]) -> Any:
    """Call `function` in the first process only, and return its result in all processes.

    The result is sent to the others pickled.

    **Raises:** in all processes, an `InputError` or `OSError` that `function` raises; any other
    error in the first process, and a `RuntimeError` in the others.
    """
    if jax.process_count() == 1:
        return function()
    value, error = None, None
    if jax.process_index() == 0:
        try:
            value = function()
        except Exception as raised:
            error = raised
    foreseen = error is None or isinstance(error, InputError | OSError)
    told = error if foreseen else RuntimeError(f"the first process failed: {error!r}")
    value, told = pickle.loads(_from_first(pickle.dumps((value, told))))
    if error is not None or told is not None:
        raise error or told
    return value


def any_process(flag: bool) -> bool:
    """Return whether `flag` is true in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def _from_first(content):
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        padded[:] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()
