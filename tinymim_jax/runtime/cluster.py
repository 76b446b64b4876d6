"""Which of several processes this is: what flags and variables say, and what JAX finds out of launchers and TPUs."""

import dataclasses
import os
import re
from collections.abc import Mapping

from tinymim_jax.runtime.errors import InputError

MAX_PORT = 65535


@dataclasses.dataclass(frozen=True)
class Cluster:
    """One process's place among all of them."""

    coordinator: str  # HOST:PORT of process 0, reached by all
    num_processes: int
    process_id: int
    local_devices: tuple[int, ...] | None = None  # the accelerators of this process; None: all that it sees


def given(
    coordinator: str | None, num_processes: str | int | None, process_id: str | int | None,
    local_devices: tuple[int, ...] | None = None,
) -> Cluster:  # fmt: skip
    """A checked cluster; raises InputError that says which part is missing or wrong."""
    parts = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    for name, value in parts.items():
        if value in (None, ""):
            raise InputError(
                f"several processes: {name} is missing; give --coordinator=HOST:PORT (of process 0), --num_processes"
                " and --process_id, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            )
    try:
        count, index = int(num_processes), int(process_id)
    except ValueError:
        raise InputError(f"num_processes {num_processes!r} and process_id {process_id!r} must be numbers") from None
    if not 0 <= index < count:
        raise InputError(f"process_id {index} is not among {count} processes, which are numbered from 0")
    port = re.fullmatch(r".+:([0-9]{1,5})", coordinator)
    if not port or not 0 < int(port[1]) <= MAX_PORT:
        raise InputError(f"coordinator {coordinator!r} is not HOST:PORT, with a port from 1 to {MAX_PORT}")
    return Cluster(coordinator, count, index, local_devices)


def find() -> Cluster | None:
    """The cluster that JAX's variables, Slurm, Open MPI or a TPU pod describe; None for a process on its own.

    Raises InputError if they describe one in part.
    """
    from jax._src.clusters import OmpiCluster, SlurmCluster  # here, as jax takes a second to import

    env = {name: value for name, value in os.environ.items() if value}
    address, port = env.get("JAX_COORDINATOR_ADDRESS"), env.get("JAX_COORDINATOR_PORT")
    index = env.get("JAX_PROCESS_ID") or env.get("JOB_COMPLETION_INDEX")  # the latter: of a Kubernetes indexed job
    if "JAX_NUM_PROCESSES" in env or "JAX_PROCESS_ID" in env:
        return given(address, env.get("JAX_NUM_PROCESSES"), index)
    if number(env, "SLURM_NTASKS") > 1 and env.keys() >= {"SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST"}:
        is_shared = number(env, "SLURM_NTASKS") > number(env, "SLURM_STEP_NUM_NODES")
        address = address or SlurmCluster.get_coordinator_address(None, port)
        devices = _own_device("SLURM_LOCALID") if is_shared else None
        return given(address, env["SLURM_NTASKS"], env["SLURM_PROCID"], devices)
    if number(env, "OMPI_COMM_WORLD_SIZE") > 1:
        if OmpiCluster.is_env_present():  # which version 5 does not tell JAX
            address = address or OmpiCluster.get_coordinator_address(None, port)
        is_shared = number(env, "OMPI_COMM_WORLD_LOCAL_SIZE") > 1
        devices = _own_device("OMPI_COMM_WORLD_LOCAL_RANK") if is_shared else None
        return given(address, env["OMPI_COMM_WORLD_SIZE"], env["OMPI_COMM_WORLD_RANK"], devices)
    return _find_tpu(address, port) if "tpu" in env.get("JAX_PLATFORMS", "tpu") else None


def number(env: Mapping[str, str], name: str) -> int:
    """What a launcher has counted; 1 where it says nothing. Raises InputError."""
    try:
        return int(env.get(name) or 1)
    except ValueError:
        raise InputError(f"{name}={env[name]} is no number; unset it, or start with its launcher") from None


def _own_device(variable: str) -> tuple[int, ...] | None:
    """The GPU of a process that shares its host with others, unless the launcher has shown it only its own."""
    shows_one = len(os.environ.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
    return None if shows_one or not os.environ.get(variable) else (number(os.environ, variable),)


def _find_tpu(address: str | None, port: str | None) -> Cluster | None:
    """The workers of all slices: JAX asks variables under Kubernetes, and the metadata server on TPU VMs."""
    from jax._src.clusters import GceTpuCluster, GkeTpuCluster, cloud_tpu_cluster

    try:
        pod = next((pod for pod in (GkeTpuCluster, GceTpuCluster) if pod.is_env_present()), None)
        if pod is None or (count := pod.get_process_count()) == 1:
            return None
        # JAX's `get_coordinator_address` would wait until this name is known, and hear no Ctrl-C.
        first = cloud_tpu_cluster.get_tpu_env_value("MEGASCALE_COORDINATOR_ADDRESS")
        first = (first or pod._get_worker_list_in_slice()[0]).split(":")[0]
        index = pod.get_process_id()
    except (OSError, RuntimeError, ValueError) as error:  # of `requests`, and what JAX makes of the answer
        raise InputError(
            f"this machine has TPUs, and nothing says which workers belong together ({error}); give --coordinator,"
            " --num_processes and --process_id, or set TPU_SKIP_MDS_QUERY=1 if it is on its own"
        ) from None
    return given(address or f"{first}:{port or cloud_tpu_cluster.coordinator_port}", count, index)
