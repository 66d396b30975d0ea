"""Several devices, of one process or of many: an ambient mesh with one axis, the batch.

Under `with jax.set_mesh(parallel.make_mesh()):` every array is on every device but for batches,
which are split among them. XLA partitions the programs (one ODE for the whole batch stays one: its
error norm becomes a sum over the devices), so that numbers of devices agree but for rounding.
Outside a mesh the functions here do nothing, and programs are what they would be without them.
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


def join() -> None:
    """Join the processes that the environment names, before anything touches a device.

    `JAX_COORDINATOR_ADDRESS` (host:port of the first process) asks for it; `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID` (from 0) are found out by `jax.distributed` where a cluster's scheduler tells.

    **Raises:** `InputError` where they are missing, or make no sense.
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
    """A mesh for `jax.set_mesh`: so many devices, as many of every process; 0 for all there are.

    **Raises:** `ValueError` for more than there are, or a number that the processes cannot share.
    """
    of_process: dict[int, list] = {}
    for device in jax.devices():
        of_process.setdefault(device.process_index, []).append(device)
    processes, there = len(of_process), min(map(len, of_process.values()))
    each, rest = divmod(devices or processes * there, processes)
    if rest or not 0 < each <= there:
        among = f" in {processes} processes, which need as many each" if processes > 1 else ""
        raise ValueError(f"expected 1 to {processes * there} devices{among}; got {devices}")
    chosen = [device for own in of_process.values() for device in own[:each]]
    return Mesh(np.array(chosen), (AXIS,), axis_types=(AxisType.Auto,))


def devices() -> int:
    """How many share a batch: 1 outside a mesh.

    **Raises:** `ValueError` in a mesh where XLA may not choose how arrays are split.
    """
    mesh = get_abstract_mesh()
    if AXIS in mesh.explicit_axes:
        raise ValueError("the mesh's axis 'batch' must be of type Auto: see parallel.make_mesh")
    return mesh.shape[AXIS] if AXIS in mesh.auto_axes else 1


def split(batch: PyTree) -> PyTree:
    """Arrays with the batch as their first axis, or as `batch.batch_axis`, split among the devices.

    **Raises:** `InputError` for a batch that the devices do not divide.
    """
    number, axis = devices(), getattr(batch, "batch_axis", 0)
    if number == 1:
        return batch
    sizes = {leaf.shape[axis] for leaf in jax.tree.leaves(batch)}
    if any(size % number for size in sizes):
        raise InputError(
            f"{number} devices cannot share a batch of {max(sizes)} evenly: make it a multiple"
        )
    return _placed(batch, PartitionSpec(*[None] * axis, AXIS))


def split_where_even(batch: PyTree) -> PyTree:
    """The same of a batch that they divide; any other is on every device."""
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    return batch if any(size % devices() for size in sizes) else split(batch)


def everywhere(tree: PyTree) -> PyTree:
    """Arrays, random keys too, whole on every device."""
    return tree if devices() == 1 else _placed(tree, PartitionSpec())


@partial(jax.jit, static_argnums=1, inline=True)
def _placed(tree, spec):  # jitted, for arrays that were made outside the mesh
    return jax.lax.with_sharding_constraint(tree, spec)


def on_host(tree: PyTree) -> PyTree:
    """Whole numpy arrays, in every process."""
    return jax.device_get(everywhere(tree))


def first(function: Callable[[], Any]) -> Any:
    """What `function` gives in the first process, where alone it is called, in all processes.

    It goes from one to the others pickled.

    **Raises:** in all of them the `InputError` or `OSError` that it raises; where it raises another
    error, that one in the first and `RuntimeError` in the others.
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


def anywhere(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def _from_first(content):
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        padded[:] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()
