"""What several processes tell each other; each function must be called by all of them at the same point.

Of errors they tell each other those that are the input's or the storage's fault. A process with any other error ends at
once, and the others notice that it is gone.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError, Unavailable
from tinymim_jax.runtime.preemption import StopRequest


def agreed(flag: bool) -> bool:
    """Whether `flag` is set in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def check_stop(stop: StopRequest, where: str) -> None:
    """Raises Interrupted in every process if any was asked to stop."""
    if agreed(stop.asked):  # or else left alone: a signal may have come meanwhile
        stop.obey(where)


def run_on_primary(action: Callable[[], Any]) -> Any:
    """What `action` returns in process 0, where alone it runs, in JSON types; an InputError is raised in all."""
    if jax.process_count() == 1:
        return action()
    result, failure = _attempt(action) if jax.process_index() == 0 else (None, None)
    result, error = json.loads(gather(json.dumps([result, _told(failure)]))[0])
    if error:
        raise _heard(error)
    return result


def raise_everywhere(action: Callable[[], Any]) -> Any:
    """What `action` returns in this process; an InputError in any process is raised in all.

    `action` must not wait for other processes.
    """
    if jax.process_count() == 1:
        return action()
    result, failure = _attempt(action)
    errors = gather(json.dumps(_told(failure)))
    if failure is not None:
        raise failure
    for process, error in enumerate(map(json.loads, errors)):
        if error:
            raise _heard(error, f"process {process}: ")
    return result


def _attempt(action: Callable[[], Any]) -> tuple[Any, InputError | None]:
    """What `action` returns, or an error that is the input's or the storage's fault."""
    try:
        return action(), None
    except Exception as error:
        known = storage.blame(error)
        if known is None:
            raise
        return None, known


def _told(error: InputError | None) -> list[Any]:
    return [] if error is None else [isinstance(error, Unavailable), str(error)]


def _heard(told: list[Any], where: str = "") -> InputError:
    return (Unavailable if told[0] else InputError)(where + told[1])


def gather(text: str) -> list[str]:
    """The texts of all processes, in each."""
    if jax.process_count() == 1:
        return [text]
    data = text.encode()
    sizes = multihost_utils.process_allgather(np.array(len(data)))
    padded = np.frombuffer(data.ljust(int(sizes.max()), b"\0"), np.uint8)
    rows = multihost_utils.process_allgather(padded) if len(padded) else [b""] * len(sizes)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]
