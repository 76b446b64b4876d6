"""Devices as a (data, fsdp) grid, and where each array lives on it."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tinymim_jax.runtime.errors import InputError

FSDP_MIN_SIZE = 2**16  # smaller arrays are cheaper to keep whole than to gather


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh with axes data (-1: what is left) and fsdp over `devices` (default: all).

    Raises InputError if they do not fill it, or an fsdp group would span slices of TPUs.
    """
    devices = jax.devices() if devices is None else devices
    rows = len(devices) // fsdp if data == -1 else data
    if rows * fsdp != len(devices):
        raise InputError(
            f"mesh: data {data} x fsdp {fsdp} does not fill {len(devices)} devices;"
            " set mesh.data=-1 and an fsdp that divides their number"
        )
    axes, types = ("data", "fsdp"), (AxisType.Auto, AxisType.Auto)
    if len({_slice(device) for device in devices}) > 1:
        return jax.sharding.Mesh(slices_grid(rows, fsdp, devices), axes, types)
    return jax.make_mesh((rows, fsdp), axes, types, devices=devices)


def slices_grid(data: int, fsdp: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices of several slices (of GPUs: hosts) as [data, fsdp]: the slow network between slices carries data."""
    slices = len({_slice(device) for device in devices})
    if devices[0].platform != "tpu":
        return np.reshape(sorted(devices, key=lambda device: (_slice(device), device.id)), (data, fsdp))
    if data % slices:
        raise InputError(
            f"mesh: fsdp {fsdp} does not fit into a slice: {len(devices)} devices are {slices} slices;"
            f" set mesh.fsdp to a divisor of {len(devices) // slices}"
        )
    # As `jax.make_mesh` does in one slice.
    is_split = devices[0].device_kind in ("TPU v5 lite", "TPU v5e")
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, fsdp), (slices, 1), devices, allow_split_physical_axes=is_split
    )


def _slice(device: jax.Device) -> int:
    return getattr(device, "slice_index", 0)


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, int] | None:
    """For what is compiled for `mesh`: on a CPU, LLVM at level 1 makes programs as fast as at 3, and sooner."""
    return {"xla_backend_optimization_level": 1} if mesh.devices.flat[0].platform == "cpu" else None


def processes(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """This process's number among those whose devices `mesh` has, and how many these are."""
    found = sorted({device.process_index for device in mesh.devices.flat})
    return found.index(jax.process_index()), len(found)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh, axis: int = 0) -> NamedSharding:
    """`axis` is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, ("data", "fsdp")))


def state_sharding(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Per leaf: large arrays are split over fsdp along their longest divisible axis, the others are whole.

    The rule reads shapes only, so optimiser moments land beside their parameters.
    """
    fsdp = mesh.shape["fsdp"]

    def rule(leaf: Any) -> NamedSharding:
        axes = [i for i, n in enumerate(leaf.shape) if n % fsdp == 0]
        if fsdp == 1 or not axes or np.prod(leaf.shape) < FSDP_MIN_SIZE:
            return replicated(mesh)
        axis = max(axes, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree.map(rule, tree)


def put_tree(tree: Any, shardings: Any) -> Any:
    """Arrays that every process holds whole -> global arrays; each device gets its part."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(np.shape(leaf), sharding, lambda index: np.asarray(leaf)[index])

    return jax.tree.map(put, tree, shardings)


def get_tree(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Global arrays -> numpy, whole in every process."""
    return jax.device_get(jax.jit(lambda arrays: arrays, out_shardings=replicated(mesh))(tree))


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh, axis: int = 0) -> dict[str, jax.Array]:
    """This process's rows of a batch that `check_batch` passes, or of several in front of `axis` -> global arrays."""
    sharding = batch_sharding(mesh, axis)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def check_batch(batch_size: int, mesh: jax.sharding.Mesh, accum_steps: int = 1) -> None:
    """Raises InputError unless the devices of `mesh` share `batch_size` images equally, in each micro-batch."""
    shares = mesh.size * accum_steps
    if batch_size % shares:
        times = f" times accum_steps {accum_steps}" if accum_steps > 1 else ""
        raise InputError(
            f"batch_size {batch_size} is not a multiple of the {mesh.size} devices{times};"
            f" use {max(1, batch_size // shares) * shares}"
        )
