"""Which of several processes this is: what flags, launchers and the machines of a TPU say."""

import dataclasses
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from tinymim_jax.runtime.errors import InputError

TPU_PORT = "8482"  # JAX's own choice; libtpu takes 8476
TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")
METADATA = "metadata.google.internal"
ATTEMPTS = 3
PATIENCE = 3.0  # seconds for an answer of the metadata server, which is on the same host
MAX_PORT = 65535


@dataclasses.dataclass(frozen=True)
class Cluster:
    """One process's place among all of them."""

    coordinator: str  # HOST:PORT of process 0, reached by all
    num_processes: int
    process_id: int
    local_devices: tuple[int, ...] | None = None  # the accelerators of this process; None: all that it sees


def find(env: Mapping[str, str]) -> Cluster | None:
    """The cluster that the variables of JAX, Slurm or Open MPI or a TPU describe; None for a process on its own.

    Raises InputError if they describe one in part.
    """
    address = env.get("JAX_COORDINATOR_ADDRESS", "")
    index = env.get("JAX_PROCESS_ID") or env.get("JOB_COMPLETION_INDEX")  # the latter: of a Kubernetes indexed job
    if env.get("JAX_NUM_PROCESSES"):
        return given(address, env["JAX_NUM_PROCESSES"], index)
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        host = _first_host(env.get("SLURM_STEP_NODELIST", ""))
        address = address or f"{host}:{61440 + int(env.get('SLURM_JOB_ID', 0)) % 4096}"  # jobs on one host differ
        devices = _own_device(env, "SLURM_LOCALID")
        return given(address, env["SLURM_NTASKS"], env["SLURM_PROCID"], devices)
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        devices = _own_device(env, "OMPI_COMM_WORLD_LOCAL_RANK")
        return given(address, env["OMPI_COMM_WORLD_SIZE"], env["OMPI_COMM_WORLD_RANK"], devices)
    if env.get("JAX_PROCESS_ID"):
        return given(address, None, index)
    return _find_tpu(env, address)


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
    if not re.fullmatch(r".+:[0-9]{1,5}", coordinator):
        raise InputError(f"coordinator {coordinator!r} is not HOST:PORT")
    if not 0 < int(coordinator.rsplit(":", 1)[1]) <= MAX_PORT:
        raise InputError(f"coordinator {coordinator!r}: a port is a number from 1 to {MAX_PORT}")
    return Cluster(coordinator, count, index, local_devices)


def _first_host(nodes: str) -> str:
    """node001 of Slurm's node[001-004,007],other."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    if not match:
        raise InputError("SLURM_STEP_NODELIST is empty; start the processes with srun")
    return match[1] + (match[2] or "")


def _own_device(env: Mapping[str, str], variable: str) -> tuple[int, ...] | None:
    """The GPU of a process that shares its host with others, unless the launcher has shown it only its own."""
    shows_one = len(env.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
    shares = int(env.get("SLURM_NTASKS_PER_NODE") or env.get("OMPI_COMM_WORLD_LOCAL_SIZE") or 1) > 1
    return (int(env[variable]),) if shares and not shows_one and variable in env else None


def _find_tpu(env: Mapping[str, str], address: str) -> Cluster | None:
    """The workers of all slices, numbered as JAX does: from variables under Kubernetes, from metadata on TPU VMs."""
    settings, names = env, env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    index = env.get("TPU_WORKER_ID")
    if not names and _is_tpu_machine(env):
        names, index = _metadata(env, "worker-network-endpoints"), _metadata(env, "agent-worker-number")
        settings = {**_settings(_metadata(env, "tpu-env")), **env}
    hosts = [_worker_host(worker) for worker in (names or "").split(",") if worker]
    slices = int(settings.get("MEGASCALE_NUM_SLICES") or 1)
    if len(hosts) * slices <= 1:
        return None
    if index and index.isdigit():
        index = int(index) + int(settings.get("MEGASCALE_SLICE_ID") or 0) * len(hosts)
    first = settings.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0] or hosts[0]
    address = address or f"{first}:{env.get('JAX_COORDINATOR_PORT', TPU_PORT)}"
    return given(address, len(hosts) * slices, index)


def _is_tpu_machine(env: Mapping[str, str]) -> bool:
    is_wanted = "tpu" in (env.get("JAX_PLATFORMS") or "tpu") and "TPU_SKIP_MDS_QUERY" not in env
    return is_wanted and any(Path(device).exists() for device in TPU_DEVICES)


def _worker_host(worker: str) -> str:
    """Of HOST, of HOST:PORT and of the NAME:ID:HOST that older TPU VMs say."""
    parts = worker.strip().split(":")
    return parts[2] if len(parts) == 3 else parts[0]


def _settings(text: str) -> dict[str, str]:
    """Of lines like MEGASCALE_NUM_SLICES: '2'."""
    pairs = [line.split(":", 1) for line in text.splitlines() if ":" in line]
    return {name.strip(): value.strip().strip("'") for name, value in pairs}


def _metadata(env: Mapping[str, str], key: str) -> str:
    """What Google's cloud says of this machine; "" if nothing. Raises InputError if it does not answer."""
    server = env.get("GCE_METADATA_IP", METADATA)
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy knows this machine
    for attempt in range(ATTEMPTS):
        time.sleep(attempt)
        try:
            with opener.open(request, timeout=PATIENCE) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return ""
            why = f"status {error.code}"
        except OSError as error:
            why = str(getattr(error, "reason", error))
    raise InputError(
        f"this machine has TPUs, and its metadata server {server} does not say which workers belong together ({why});"
        " give --coordinator, --num_processes and --process_id, or set TPU_SKIP_MDS_QUERY=1 if it is on its own"
    )
