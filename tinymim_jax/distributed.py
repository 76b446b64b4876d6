"""Several processes as one run: who they are, that all are there and agree, before JAX connects them.

JAX ends a process with a stack trace if another does not come; the roll call says which one, and what differs.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from tinymim_jax.serial import InputError, differences

VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "simplejpeg")
MAX_MESSAGE = 2**20  # bytes
PATIENCE = 5.0  # seconds for a connection to say who it is: it may be a stranger's
RETRY = 0.2  # seconds between attempts to reach process 0

Facts = Mapping[str, Any]  # what must be equal in every process: name -> JSON types


@dataclasses.dataclass(frozen=True)
class Cluster:
    """One process's place among all of them."""

    coordinator: str  # HOST:PORT of process 0, reached by all
    num_processes: int
    process_id: int
    local_devices: tuple[int, ...] | None = None  # the accelerators of this process; None: all that it sees


def find(env: Mapping[str, str]) -> Cluster | None:
    """The cluster that the variables of JAX, Slurm, Open MPI or a TPU pod describe; None for a process on its own.

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
    hosts = [host for host in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if len(hosts) > 1:
        return given(address or f"{hosts[0]}:8476", str(len(hosts)), env.get("TPU_WORKER_ID"))
    return None


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
    if not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise InputError(f"coordinator {coordinator!r} is not HOST:PORT")
    return Cluster(coordinator, count, index, local_devices)


def _first_host(nodes: str) -> str:
    """node001 of Slurm's node[001-004,007],other."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    if not match:
        raise InputError("SLURM_STEP_NODELIST is empty; start the processes with srun")
    return match[1] + (match[2] or "")


def _own_device(env: Mapping[str, str], variable: str) -> tuple[int, ...] | None:
    """The GPU of a process that shares its host with others, unless the launcher has shown it only its own."""
    visible = env.get("CUDA_VISIBLE_DEVICES", "").split(",")
    shares = int(env.get("SLURM_NTASKS_PER_NODE") or env.get("OMPI_COMM_WORLD_LOCAL_SIZE") or 1) > 1
    return (int(env[variable]),) if shares and len(visible) > 1 and variable in env else None


def start(cluster: Cluster | None, timeout: float, **facts: Any) -> None:
    """Joins this process to the others; must come before anything that asks JAX for devices.

    After it, only process 0 prints. Without a cluster, on a TPU machine, JAX's own detection is used.

    Raises:
      InputError: processes did not come within `timeout` seconds (named), or differ in `own_facts`, `facts` among them.
    """
    if cluster is None and not _is_tpu_machine():
        return
    if cluster is not None and cluster.num_processes > 1:
        roll_call(cluster, own_facts(**facts), timeout)
    place = {}
    if cluster is not None:
        place = {
            "coordinator_address": cluster.coordinator,
            "num_processes": cluster.num_processes,
            "process_id": cluster.process_id,
            "local_device_ids": cluster.local_devices,
            "cluster_detection_method": "deactivate",
        }
    import jax

    # It would take SIGTERM for itself; ours is heard by `stop` and agreed on in the step.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(**place, initialization_timeout=int(timeout))
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _is_tpu_machine() -> bool:
    return any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0")) and "TPU_SKIP_MDS_QUERY" not in (
        os.environ
    )


def own_facts(**more: Any) -> dict[str, Any]:
    """What processes of one run must have in common: versions, code, and `more`, in JSON types."""
    versions = {name: metadata.version(name) for name in VERSIONED}
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(file.read_bytes())
    python = ".".join(map(str, sys.version_info[:2]))
    return {"Python": python, **versions, "code": code.hexdigest()[:12], **more}


def roll_call(cluster: Cluster, facts: Facts, timeout: float) -> None:
    """Returns in every process when all have come and agree; raises the same InputError in all of them otherwise."""
    host, port = cluster.coordinator.rsplit(":", 1)
    own = {"process": cluster.process_id, "host": socket.gethostname(), "facts": dict(facts)}
    if cluster.process_id:
        verdict = _answer_roll_call(host, int(port), own, timeout)
    else:
        verdict = _call_roll(int(port), own, cluster.num_processes, timeout)
    if verdict:
        raise InputError(verdict)


def _call_roll(port: int, own: dict[str, Any], count: int, timeout: float) -> str:
    """Process 0: hears all others, tells each the verdict, "" if all is well."""
    deadline = time.monotonic() + timeout
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise InputError(
            f"process 0 cannot listen on port {port} ({error.strerror}); choose another --coordinator"
        ) from None
    present = {0: own}
    with server, contextlib.ExitStack() as lines:
        waiting = []
        while len(present) < count and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection, _ = server.accept()
                connection.settimeout(min(left, PATIENCE))
                message = json.loads(lines.enter_context(connection.makefile("rwb")).readline(MAX_MESSAGE))
                present[int(message["process"])] = message
                waiting.append(lines.enter_context(connection))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # too late, or somebody else's connection
        verdict = _missing(present, count, timeout) or _disagreement(present)
        for connection in waiting:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(verdict).encode() + b"\n")
    return verdict


def _answer_roll_call(host: str, port: int, own: dict[str, Any], timeout: float) -> str:
    """Any other process: reports to process 0, and returns its verdict."""
    for left in _until(timeout):
        with contextlib.suppress(OSError, ValueError), socket.create_connection((host, port), left) as connection:
            connection.settimeout(left + 5)
            connection.sendall(json.dumps(own).encode() + b"\n")
            if answer := connection.makefile("rb").readline(MAX_MESSAGE):
                return json.loads(answer)
        time.sleep(RETRY)
    return (
        f"process {own['process']} did not reach process 0 at {host}:{port} within {timeout:g} s; is process 0 running,"
        " is the address right, and does no firewall stand between?"
    )


def _until(timeout: float) -> Iterator[float]:
    """The seconds that are left, as long as there are any."""
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        yield left


def _missing(present: Mapping[int, Any], count: int, timeout: float) -> str:
    absent = [str(i) for i in range(count) if i not in present]
    if not absent:
        return ""
    names = f"process{'es' if len(absent) > 1 else ''} {', '.join(absent[:8])}{' ...' if len(absent) > 8 else ''}"
    return (
        f"{names} of {count} did not come within {timeout:g} s; see their logs, or raise --start_timeout if they are"
        " slow to start"
    )


def _disagreement(present: Mapping[int, Any]) -> str:
    first = present[0]["facts"]
    for index in sorted(present):
        facts = present[index].get("facts", {})
        for name in {**first, **facts}:
            mine, theirs = first.get(name), facts.get(name)
            if mine != theirs:
                what = "; ".join(differences(mine, theirs, name)[:3]) or name
                return (
                    f"process {index} ({present[index].get('host')}) differs from process 0 in {what};"
                    " start all with the same code, packages and command line"
                )
    return ""
