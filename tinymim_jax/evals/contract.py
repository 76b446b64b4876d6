"""The contract of evaluators, and the pass over a data set that they share."""

import collections
import contextlib
import functools
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, Protocol

import jax
import tqdm

from tinymim_jax.data import pipeline, sources
from tinymim_jax.experiment.config import Data
from tinymim_jax.runtime import sharding as mesh_lib
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import Batch, Frozen, Outputs, Task, Variables

BATCHES_AHEAD = 3  # dispatched before the oldest result is fetched

Predict = Callable[[Variables, Frozen, Batch], Outputs]
Finish = Callable[[], dict[str, float]]


class Evaluator(Protocol):
    """Measures a model; results are named scalars."""

    num_batches: int
    """How often it yields."""

    def __call__(self, predict: Predict, variables: Variables, frozen: Frozen) -> Generator[None, None, Finish]:
        """Gives the devices a batch at a time, yielding after each; returns what is left to do on the host alone."""


def make_predict(task: Task, mesh: jax.sharding.Mesh) -> Predict:
    """`task.predict`, jitted, with outputs that every process can read."""
    return jax.jit(task.predict, out_shardings=mesh_lib.replicated(mesh))


def together(
    evaluators: Mapping[str, Evaluator], predict: Predict, variables: Variables, frozen: Frozen
) -> Generator[None, None, Finish]:
    """The evaluators one after the other, as one; results are named "<eval>/<metric>"."""
    finish = {}
    for name, evaluator in evaluators.items():
        with _named(name):
            finish[name] = yield from evaluator(predict, variables, frozen)

    def finish_all() -> dict[str, float]:
        found = {}
        for name, one in finish.items():
            with _named(name):
                found |= {f"{name}/{metric}": value for metric, value in one().items()}
        return found

    return finish_all


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Says whose error it is: evals have data of their own."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"eval {name}: {error}") from error


def measure(
    evaluators: Mapping[str, Evaluator],
    predict: Predict,
    variables: Variables,
    frozen: Frozen,
    title: str,
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """All that the evaluators find, with a bar named `title`; `check` is called after each batch and may raise."""
    running = together(evaluators, predict, variables, frozen)
    total = sum(evaluator.num_batches for evaluator in evaluators.values())
    interval = 0.1 if sys.stderr.isatty() else 10
    with tqdm.tqdm(desc=title, total=total, unit="batch", leave=False, delay=1, mininterval=interval) as bar:
        while True:
            try:
                next(running)
            except StopIteration as end:
                return end.value()
            bar.update()
            check()


class Fetched:
    """Results of the devices, copied to the host in order, a few behind the newest so that nothing waits for it."""

    def __init__(self) -> None:
        self.ahead: collections.deque[Any] = collections.deque()
        self.host: list[Any] = []

    def add(self, result: Any) -> None:
        """Takes a tree of arrays that may not be computed yet."""
        self.ahead.append(result)
        if len(self.ahead) > BATCHES_AHEAD:
            self.host.append(jax.device_get(self.ahead.popleft()))

    def all(self) -> list[Any]:
        """Every result, as numpy arrays."""
        return [*self.host, *jax.device_get(list(self.ahead))]


class Batches:
    """Batches of a whole data set, each example once; iterable again and again."""

    def __init__(self, data: Data, batch_size: int, mesh: jax.sharding.Mesh):
        batch_size = -(-batch_size // mesh.size) * mesh.size  # padding is masked, so rounding up is free of effect
        self.args: dict[str, Any] = {"batch_size": batch_size, "mesh": mesh}
        self.data, self.source = data, sources.open_source(data)

    @functools.cached_property
    def whole(self) -> Callable[[Any], Any]:
        """Makes arrays that are split over processes readable by each."""
        return jax.jit(lambda arrays: arrays, out_shardings=mesh_lib.replicated(self.args["mesh"]))

    def __len__(self) -> int:
        return -(-len(self.source) // self.args["batch_size"])

    def __iter__(self) -> Iterator[Batch]:
        return pipeline.eval_batches(self.data, self.source, **self.args)
