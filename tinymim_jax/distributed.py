"""Several processes as one run: joined once all are there and agree, and of one mind while they run."""

import hashlib
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from tinymim_jax.cluster import Cluster
from tinymim_jax.roll_call import roll_call
from tinymim_jax.serial import InputError
from tinymim_jax.stop import StopRequest

VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "simplejpeg")
MAX_ERROR = 2000  # bytes
MAX_TEXT = 16384  # bytes


def start(cluster: Cluster | None, timeout: float, stop: StopRequest | None = None, **facts: Any) -> None:
    """Joins this process to the others; must come before anything that asks JAX for devices.

    After it, only process 0 prints.

    Raises:
      InputError: processes did not come within `timeout` seconds (named), or differ in `own_facts`, `facts` among them.
      Interrupted: `stop`, or that of another process, was asked for meanwhile.
    """
    if cluster is None:
        return
    if cluster.num_processes > 1:
        roll_call(cluster, own_facts(**facts), timeout, stop)
    import jax

    # It would take SIGTERM for itself; ours is heard by `stop` and agreed on in the step.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator_address=cluster.coordinator,
        num_processes=cluster.num_processes,
        process_id=cluster.process_id,
        local_device_ids=cluster.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(timeout),
    )
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def gather(text: str) -> list[str]:
    """The `text` of each process, of at most MAX_TEXT bytes, in their order; all must call it at the same point."""
    import jax

    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    padded = np.frombuffer(text.encode()[:MAX_TEXT].ljust(MAX_TEXT, b"\0"), np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


def own_facts(**more: Any) -> dict[str, Any]:
    """What processes of one run must have in common: versions, code, and `more`, in JSON types."""
    versions = {name: metadata.version(name) for name in VERSIONED}
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(file.read_bytes())
    python = ".".join(map(str, sys.version_info[:2]))
    return {"Python": python, **versions, "code": code.hexdigest()[:12], **more}


def agreed(flag: bool) -> bool:
    """Whether `flag` is set in any process; all must call it at the same point."""
    import jax

    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def check_stop(stop: StopRequest, where: str) -> None:
    """Raises Interrupted in every process if any was asked to stop; all must call it at the same point."""
    if agreed(stop.asked):  # or else left alone: a signal may have come meanwhile
        stop.asked = True
        stop.check(where)


def on_first(action: Callable[[], Any]) -> None:
    """Runs `action` in process 0; an InputError that it raises is raised in all. All must call it at the same point."""
    import jax

    message = ""
    if jax.process_index() == 0:
        try:
            action()
        except InputError as error:
            message = str(error) or "error"
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        padded = np.frombuffer(message.encode()[:MAX_ERROR].ljust(MAX_ERROR, b"\0"), np.uint8)
        message = bytes(multihost_utils.broadcast_one_to_all(padded)).rstrip(b"\0").decode(errors="replace")
    if message:
        raise InputError(message)


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
