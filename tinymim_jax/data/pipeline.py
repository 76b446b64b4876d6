"""Records -> batches on the devices. Every draw is a function of (seed, epoch, index): the state is the step."""

import collections
import gc
import itertools
import re
import signal
from collections.abc import Iterator

import grain
import jax
import numpy as np
from absl import flags

from tinymim_jax.data.config import Data
from tinymim_jax.data.fields import IMAGE_LABEL, Fields
from tinymim_jax.data.rows import EvalRows, ReplicaRows, Rows, TrainRows, stack_examples
from tinymim_jax.data.sources import Source
from tinymim_jax.runtime import multihost, sharding
from tinymim_jax.runtime.errors import InputError, Unavailable
from tinymim_jax.runtime.preemption import StopRequest

DEVICE_BATCHES = 2  # the one in use and the one under way
KILLED = re.compile(r"terminated unexpectedly with exit code -(\d+)")  # by a signal, as grain says it


def train_batches(
    rows: "TrainRows | ReplicaRows",
    start: int,
    stop: int,
    mesh: jax.sharding.Mesh,
    request: StopRequest | None = None,
    per_call: int = 1,
) -> Iterator[dict[str, jax.Array]]:
    """The batches of steps start to stop - 1, each epoch in its own order, its last incomplete batch dropped.

    A batch has the task's fields (e.g. image uint8 [B, S, S, 3], label int32 [B]), is_valid bool [B] (False: could not
    be read), index int32 [B] (the record's number in the source) and stop uint8 [B] (the wish of the process that read
    the row, so that all learn of it at the same step). Raises InputError, also while iterating; of several processes,
    one that cannot read notes that in its `request` and goes on with empty rows. With `per_call` above 1, those of each
    of `calls` come stacked, [K, B, ...]; those of `ReplicaRows` have an axis of replicas, [R, B, ...].
    """
    _check(rows, mesh)
    return _to_devices(rows, start, stop, mesh, request or StopRequest(), per_call)


def calls(start: int, stop: int, per_call: int) -> Iterator[range]:
    """Steps start to stop - 1 as they are dispatched: up to `per_call` together, the last before a multiple of it."""
    while start < stop:
        end = min(stop, start - start % per_call + per_call)
        yield range(start, end)
        start = end


def stacked(batches: list[dict[str, np.ndarray]], per_call: int) -> dict[str, np.ndarray]:
    """What one dispatch of up to `per_call` steps is given."""
    return batches[0] if per_call == 1 else stack_examples(batches)


def train_rows(data: Data, source: Source, batch_size: int, seed: int, fields: Fields = IMAGE_LABEL) -> "TrainRows":
    """This process's part of the batches; raises InputError."""
    if batch_size > len(source):
        raise InputError(f"batch_size {batch_size} is more than the {len(source)} images; use at most that")
    return TrainRows(data, source, batch_size, jax.process_index(), jax.process_count(), fields, seed)


def eval_batches(
    data: Data, source: Source, *, batch_size: int, mesh: jax.sharding.Mesh, fields: Fields = IMAGE_LABEL
) -> Iterator[dict[str, jax.Array]]:
    """Every record once, in order, as `train_batches`; the last batch is filled up with is_valid False, index -1.

    What one of several processes cannot read is raised in all of them, behind the last batch. A mesh of one process's
    devices is read by that process alone.
    """
    if data.transform != "eval":
        raise InputError(f"data.transform is {data.transform!r}, which is random; set it to 'eval' to evaluate")
    rows = EvalRows(data, source, batch_size, *sharding.processes(mesh), fields)
    _check(rows, mesh)
    return _to_devices(rows, 0, -(-len(source) // batch_size), mesh)


def _check(rows: Rows, mesh: jax.sharding.Mesh) -> None:
    sharding.check_batch(rows.batch_size, mesh)
    if rows.batch_size % rows.num_processes:
        raise InputError(f"batch_size {rows.batch_size} is not a multiple of the {rows.num_processes} processes")


def _to_devices(
    rows: Rows, start: int, stop: int, mesh: jax.sharding.Mesh, request: StopRequest | None = None, per_call: int = 1
) -> Iterator[dict[str, jax.Array]]:
    if start >= stop:
        return
    own = StopRequest()
    host = _in_step(rows, start, stop, request or own)
    ready: collections.deque[dict[str, jax.Array]] = collections.deque()
    try:
        for steps in calls(start, stop, per_call):
            batch = stacked(list(itertools.islice(host, len(steps))), per_call)
            if request is not None:
                batch = {**batch, "stop": np.full(batch["index"].shape, request.wish(), np.uint8)}
            ready.append(sharding.put_batch(batch, mesh, axis=int(per_call > 1) + bool(rows.replicas)))
            if len(ready) == DEVICE_BATCHES:
                yield ready.popleft()
        yield from ready
    finally:
        batch = None
        host.close()
    if request is None and rows.num_processes > 1:
        multihost.raise_everywhere(own.raise_failure)


def _in_step(
    rows: EvalRows | ReplicaRows, start: int, stop: int, request: StopRequest
) -> Iterator[dict[str, np.ndarray]]:
    """`host_batches`; but one of several processes that cannot read must not leave the others waiting for its rows."""
    try:
        yield from host_batches(rows, start, stop)
    except InputError as error:
        if rows.num_processes == 1:
            raise
        request.fail(error)
        while True:
            yield rows.empty()


def host_batches(rows: Rows, start: int, stop: int) -> Iterator[dict[str, np.ndarray]]:
    """`rows` of steps start to stop - 1 in order, made by `data.threads` and `data.workers`; raises InputError."""
    host = iter(_host_dataset(rows, start, stop))
    try:
        yield from host
    except InputError as error:
        raise type(error)(*error.args) from None  # without the note that grain adds to it
    except RuntimeError as error:
        if not (code := KILLED.search(str(error))):
            raise
        raise Unavailable(
            f"a worker process was killed ({signal.strsignal(int(code[1]))}), as a rule for want of memory or room in"
            " /dev/shm; give this machine or container more, or lower data.workers or data.prefetch, and run the same"
            " command again"
        ) from None
    finally:
        host.close()  # stops its threads and worker processes, also when the caller leaves early
        if rows.data.workers:
            host = None
            gc.collect()  # grain's iterators are cycles that keep the last batches in shared memory


def _host_dataset(rows: Rows, start: int, stop: int) -> grain.IterDataset:
    data = rows.data
    workers = min(data.workers, stop - start)
    kept = -(-data.prefetch // max(1, workers))  # by each worker
    options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=kept)
    dataset = grain.MapDataset.range(start, stop).map(rows).to_iter_dataset(options)
    if not workers:
        return dataset
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads a flag of its own; outside absl's app nobody has parsed any
    return dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
