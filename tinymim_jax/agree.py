"""What several processes tell each other; each function must be called by all of them at the same point."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tinymim_jax.serial import InputError
from tinymim_jax.stop import StopRequest


def agreed(flag: bool) -> bool:
    """Whether `flag` is set in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def check_stop(stop: StopRequest, where: str) -> None:
    """Raises Interrupted in every process if any was asked to stop."""
    if agreed(stop.asked):  # or else left alone: a signal may have come meanwhile
        stop.asked = True
        stop.check(where)


def on_first(action: Callable[[], Any]) -> Any:
    """What `action` returns in process 0, where alone it runs, in JSON types; an InputError is raised in all."""
    if jax.process_count() == 1:
        return action()
    said = {}
    if jax.process_index() == 0:
        try:
            said = {"result": action()}
        except InputError as error:
            said = {"error": str(error)}
    said = json.loads(gather(json.dumps(said))[0])
    if "error" in said:
        raise InputError(said["error"])
    return said["result"]


def together(action: Callable[[], Any]) -> Any:
    """What `action` returns in this process; an InputError in any process is raised in all.

    `action` must not wait for other processes.
    """
    result, failure = None, None
    try:
        result = action()
    except InputError as error:
        failure = error
    errors = gather("" if failure is None else str(failure) or "error")
    if failure is not None:
        raise failure
    for process, text in enumerate(errors):
        if text:
            raise InputError(f"process {process}: {text}")
    return result


def gather(text: str) -> list[str]:
    """The texts of all processes, in each."""
    if jax.process_count() == 1:
        return [text]
    data = text.encode()
    sizes = multihost_utils.process_allgather(np.array(len(data)))
    padded = np.frombuffer(data.ljust(int(sizes.max()), b"\0"), np.uint8)
    rows = multihost_utils.process_allgather(padded) if len(padded) else [b""] * len(sizes)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
