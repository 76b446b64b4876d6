"""Which records make which batch, and reading them: every draw is a function of (seed, epoch, index)."""

import dataclasses
import functools
import logging
import multiprocessing
import os
import signal
import threading
from typing import Any

import numpy as np

from tinymim_jax.data.config import Data
from tinymim_jax.data.decode import skipping
from tinymim_jax.data.fields import Example, Fields
from tinymim_jax.data.sources import Source
from tinymim_jax.runtime.errors import InputError

# What a generator is for. It comes first and the seed behind: zeros at the end of a seed sequence do not count.
ORDER_STREAM, IMAGE_STREAM = 1, 2

log = logging.getLogger(__name__)


@functools.lru_cache(maxsize=10_000)
def _say_once(what: str) -> None:
    # Without its remedy: a stage goes on with as many images as it was begun with.
    log.warning("skipped: %s", what.rpartition("; ")[0] or what)


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
    seed: int = 0  # in evaluation only corruptions draw

    replicas = 0  # in front of the rows; 0: no such axis

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        epoch, index, repeat = self.numbers(step)
        batch = self.empty()
        own = slice(self.process * len(batch["index"]), (self.process + 1) * len(batch["index"]))
        batch["index"][:] = index[own]
        for row in np.flatnonzero(batch["index"] >= 0):
            number = int(index[own][row])
            rng = image_rng(self.seed, epoch, number, int(repeat[own][row]))
            with skipping(self.data.on_bad_image, _say_once):
                example = self.fields.read(self.source[number], self.source.describe(number), self.data, rng)
                for name, value in example.items():
                    batch[name][row] = value
                batch["is_valid"][row] = True
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
    """As `EvalRows`, but each epoch has its own order, drawn with `seed`, and only whole batches."""

    def numbers(self, step: int) -> tuple[int, np.ndarray, np.ndarray]:
        epoch, position = divmod(step, len(self.source) // self.batch_size)
        order = epoch_order(len(self.source), self.seed, epoch)
        place = np.arange(position * self.batch_size, (position + 1) * self.batch_size)
        return epoch, order[place // self.data.repeats], place % self.data.repeats


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
        """How many."""
        return len(self.each)

    def __call__(self, step: int) -> Example:
        return stack_examples([rows(step) for rows in self.each])

    def empty(self) -> Example:
        """This process's rows without a record."""
        return stack_examples([rows.empty() for rows in self.each])


Rows = EvalRows | ReplicaRows


def stack_examples(examples: list[Example]) -> Example:
    """Examples (or batches) of the same fields, with an axis of them in front."""
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
