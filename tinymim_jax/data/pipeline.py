"""Records -> batches on the devices. Every draw is a function of (seed, epoch, index): the state is the step."""

import collections
import dataclasses
import functools
import gc
import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import chex
import grain
import jax
import numpy as np
from absl import flags

from tinymim_jax.data.config import Data
from tinymim_jax.data.fields import IMAGE_LABEL, Example, Fields
from tinymim_jax.data.sources import Source
from tinymim_jax.runtime import multihost
from tinymim_jax.runtime import sharding as mesh_lib
from tinymim_jax.runtime.errors import InputError, Unavailable
from tinymim_jax.runtime.preemption import StopRequest

# What a generator is for. It comes first and the seed behind: zeros at the end of a seed sequence do not count.
ORDER_STREAM, IMAGE_STREAM = 1, 2
DEVICE_BATCHES = 2  # the one in use and the one under way

log = logging.getLogger(__name__)


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
    return _batches(rows, start, stop, mesh, request or StopRequest(), per_call)


def calls(start: int, stop: int, per_call: int) -> Iterator[range]:
    """Steps start to stop - 1 as they are dispatched: up to `per_call` together, the last before a multiple of it."""
    while start < stop:
        end = min(stop, start - start % per_call + per_call)
        yield range(start, end)
        start = end


def stacked(batches: list[dict[str, np.ndarray]], per_call: int) -> dict[str, np.ndarray]:
    """What one dispatch of up to `per_call` steps is given."""
    return batches[0] if per_call == 1 else _stack_examples(batches)


def train_rows(data: Data, source: Source, batch_size: int, seed: int, fields: Fields = IMAGE_LABEL) -> "TrainRows":
    """This process's part of the batches; raises InputError."""
    if batch_size > len(source):
        raise InputError(f"batch_size {batch_size} is more than the {len(source)} images; use at most that")
    return TrainRows(data, source, batch_size, jax.process_index(), jax.process_count(), fields, seed)


def eval_batches(
    data: Data, source: Source, *, batch_size: int, mesh: jax.sharding.Mesh, fields: Fields = IMAGE_LABEL
) -> Iterator[dict[str, jax.Array]]:
    """Every record once, in order, as `train_batches`; the last batch is filled up with is_valid False, index -1.

    What one of several processes cannot read is raised in all of them, behind the last batch.
    """
    if data.transform != "eval":
        raise InputError(f"data.transform is {data.transform!r}, which is random; set it to 'eval' to evaluate")
    rows = EvalRows(data, source, batch_size, jax.process_index(), jax.process_count(), fields)
    return _batches(rows, 0, -(-len(source) // batch_size), mesh)


@dataclasses.dataclass(frozen=True)
class EvalRows:
    """Step -> this process's rows of the batch, as numpy; the batch is the same for any number of processes.

    Sent to worker processes by pickle: it must not touch a device.
    """

    data: Data
    source: Source
    batch_size: int  # over all processes
    process: int
    num_processes: int
    fields: Fields

    replicas = 0  # in front of the rows; 0: no such axis

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        epoch, index, repeat = self.numbers(step)
        batch = self.empty()
        own = slice(self.process * len(batch["index"]), (self.process + 1) * len(batch["index"]))
        batch["index"][:] = index[own]
        for row in np.flatnonzero(batch["index"] >= 0):
            try:
                for name, value in self._read(epoch, int(index[own][row]), int(repeat[own][row])).items():
                    batch[name][row] = value
                batch["is_valid"][row] = True
            except Unavailable:
                raise  # no fault of this image
            except InputError as error:
                if self.data.on_bad_image == "stop":
                    raise InputError(f"{error}, or set data.on_bad_image=skip") from error
                log.warning("skipped: %s", error)
        return batch

    def empty(self) -> Example:
        """This process's rows without a record."""
        return self.fields.batch(self.data, self.batch_size // self.num_processes)

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        in_worker = multiprocessing.parent_process() is not None
        if in_worker and threading.current_thread() is threading.main_thread():
            follow_parent()

    def numbers(self, step: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(epoch, record numbers, which repetition), int64 [batch_size] each, of the whole batch; -1: no record."""
        index = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        return 0, np.where(index < len(self.source), index, -1), np.zeros_like(index)

    def rng(self, epoch: int, index: int, repeat: int) -> np.random.Generator:
        """The generator of one image; in evaluation only corruptions draw from it."""
        return image_rng(0, epoch, index, repeat)

    def _read(self, epoch: int, index: int, repeat: int) -> Example:
        rng = self.rng(epoch, index, repeat)
        return self.fields.read(self.source[index], self.source.describe(index), self.data, rng)


@functools.cache
def follow_parent() -> None:
    """Lets a worker process, in its main thread, end with the process that started it and not before."""
    # Terminals and batch systems signal all processes of a run; the parent ends its workers, once its state is saved.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """One that is killed says nothing, and a worker would wait for room in its queue forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


@dataclasses.dataclass(frozen=True)
class TrainRows(EvalRows):
    """As `EvalRows`, but each epoch has its own order and only whole batches."""

    seed: int

    def numbers(self, step: int) -> tuple[int, np.ndarray, np.ndarray]:
        epoch, position = divmod(step, len(self.source) // self.batch_size)
        order = epoch_order(len(self.source), self.seed, epoch)
        place = np.arange(position * self.batch_size, (position + 1) * self.batch_size)
        return epoch, order[place // self.data.repeats], place % self.data.repeats

    def rng(self, epoch: int, index: int, repeat: int) -> np.random.Generator:
        return image_rng(self.seed, epoch, index, repeat)


@dataclasses.dataclass(frozen=True)
class ReplicaRows:
    """Rows of several replicas, each with its own order and perhaps its own records: batches [R, B, ...]."""

    each: tuple[TrainRows, ...]

    def __post_init__(self) -> None:
        sizes = {len(rows.source) for rows in self.each}
        if len(sizes) > 1:
            raise InputError(f"replicas read {sorted(sizes)} images, which must be as many; set data.subset_seed")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "each":
            raise AttributeError(name)
        return getattr(self.each[0], name)  # what all share

    @property
    def replicas(self) -> int:
        return len(self.each)

    def __call__(self, step: int) -> Example:
        return _stack_examples([rows(step) for rows in self.each])

    def empty(self) -> Example:
        return _stack_examples([rows.empty() for rows in self.each])


Rows = EvalRows | ReplicaRows


def _stack_examples(examples: list[Example]) -> Example:
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


@functools.lru_cache(maxsize=16)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0..n-1, int64 [n], read-only."""
    order = np.random.default_rng((ORDER_STREAM, epoch, seed)).permutation(n)
    order.setflags(write=False)
    return order


def image_rng(seed: int, epoch: int, index: int, repeat: int = 0) -> np.random.Generator:
    """The generator of image `index` in `epoch`, for the `repeat`-th time."""
    return np.random.default_rng((IMAGE_STREAM, epoch, index, seed, repeat))


def _batches(
    rows: Rows,
    start: int,
    stop: int,
    mesh: jax.sharding.Mesh,
    request: StopRequest | None = None,
    per_call: int = 1,
) -> Iterator[dict[str, jax.Array]]:
    """Checks here, at the call; reads in the generator, at the first batch."""
    mesh_lib.check_batch(rows.batch_size, mesh)
    if rows.batch_size % rows.num_processes:
        raise InputError(f"batch_size {rows.batch_size} is not a multiple of the {rows.num_processes} processes")
    return _to_devices(rows, start, stop, mesh, request, per_call)


def _to_devices(
    rows: Rows,
    start: int,
    stop: int,
    mesh: jax.sharding.Mesh,
    request: StopRequest | None,
    per_call: int,
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
            ready.append(_checked(mesh_lib.put_batch(batch, mesh, axis=int(per_call > 1) + bool(rows.replicas)), rows))
            if len(ready) == DEVICE_BATCHES:
                yield ready.popleft()
        yield from ready
    finally:
        batch = None
        host.close()
    if request is None:
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


def _checked(batch: dict[str, jax.Array], rows: Rows) -> dict[str, jax.Array]:
    """Raises AssertionError if a field is not what it is said to be."""
    for name, value in rows.fields.batch(rows.data, 1).items():
        chex.assert_type(batch[name], value.dtype)
        chex.assert_shape(batch[name], (..., rows.batch_size, *value.shape[1:]))
    return batch
