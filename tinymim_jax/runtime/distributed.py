"""Several processes as one run: joined once all are there and agree."""

import hashlib
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from tinymim_jax.runtime.cluster import Cluster
from tinymim_jax.runtime.preemption import StopRequest
from tinymim_jax.runtime.rendezvous import meet

VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "simplejpeg")


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
        meet(cluster, own_facts(**facts), timeout, stop)
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


def own_facts(**more: Any) -> dict[str, Any]:
    """What processes of one run must have in common: versions, code, and `more`, in JSON types."""
    versions = {name: metadata.version(name) for name in VERSIONED}
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(file.read_bytes())
    python = ".".join(map(str, sys.version_info[:2]))
    return {"Python": python, **versions, "code": code.hexdigest()[:12], **more}
