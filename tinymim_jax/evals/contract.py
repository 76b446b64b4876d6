"""The contract of evaluators, and the pass over data sets that they share."""

import abc
import collections
import contextlib
import dataclasses
import functools
import io
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
from etils.epath import Path

from tinymim_jax.data import pipeline, sources
from tinymim_jax.data.config import Data
from tinymim_jax.data.fields import IMAGE_LABEL, Fields
from tinymim_jax.models.contract import Encoder, Outputs
from tinymim_jax.runtime import sharding, storage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.metric_log import write_whole
from tinymim_jax.runtime.progress_bar import bar

BATCHES_AHEAD = 3  # dispatched before the oldest result is fetched

Variables = Mapping[str, Any]
Batch = Mapping[str, jax.Array]
Predict = Callable[[Variables, Any, Batch], Outputs]  # (variables, frozen, batch), as a task's


@dataclasses.dataclass
class Result:
    """What an evaluator has found: named scalars, and arrays, or what becomes some, that are stored beside them."""

    scalars: dict[str, float]
    arrays: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.arrays = {name: np.asarray(array) for name, array in self.arrays.items()}


class Evaluator(Protocol):
    """Measures a model: `update` on each batch of each of `passes`, then `finish`."""

    passes: Mapping[Hashable, "Batches"]
    """The data sets to go over, by name."""

    others: Mapping[str, Variables] = {}
    """The variables of the checkpoints that its config names by `Init`, by field."""

    def update(self, variables: Variables, frozen: Any, others: Mapping[str, Variables], batch: Batch) -> Any:
        """Runs inside jit: a tree of small arrays, reduced over the batch where that can be."""

    def finish(self, found: Mapping[Hashable, list[Any]]) -> Result:
        """Runs on the host alone, perhaps in a thread: for each pass, what `update` gave for its batches, as numpy."""


@dataclasses.dataclass(frozen=True)
class Other:
    """A checkpoint that is looked at beside what is measured, and how its pixels are normalised."""

    model: Encoder
    variables: Variables
    mean: Sequence[float]
    std: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Context:
    """What an evaluator is made for. `others` are the checkpoints that its config names by `Init`, by field."""

    mesh: jax.sharding.Mesh
    predict: Predict
    model: Encoder | None = None  # of what is measured, for evaluators that look into its blocks
    others: Mapping[str, Other] = dataclasses.field(default_factory=dict)
    classes: Sequence[str] | None = None  # what the outputs of its head are called, where that is known


class Eval(abc.ABC):
    """The config of an evaluator, a dataclass with a `kind` that `evals.EVALS` lists."""

    kind: str
    data: Data
    batch_size: int
    needs_pixels: ClassVar[bool] = False  # whether it reads logits of pixels

    @abc.abstractmethod
    def build(self, context: Context) -> Evaluator:
        """The evaluator, its data opened; raises InputError if that is missing."""

    def check(self, where: str, model: Encoder, training: Data) -> None:
        """Raises InputError on what would otherwise be found only after the training on `training`."""
        for name, data in self.sets().items():
            data.check(f"{where}.{name}")
            if data.subset_seed is None:
                raise InputError(f"{where}: {name}.subset_seed is none, which is the run's; give it a number")
            if data.transform != "eval":
                raise InputError(f"{where}: {name}.transform is 'train', which is random; set it to 'eval'")
            for field in ("image_size", "mean", "std", "val_fraction", "val_seed"):
                if getattr(data, field) != getattr(training, field):
                    raise InputError(f"{where}: {name}.{field} differs from the stage's, {getattr(training, field)}")

    def sets(self) -> dict[str, Data]:
        """The data sets that it reads, by field."""
        return {"data": self.data}

    def opened(self) -> list[Data]:
        """Those that can be opened as they stand."""
        return list(self.sets().values())

    def metrics(self) -> list[str] | None:
        """The names of what it measures; None if they are many."""
        return None

    def same_classes(self, training: Data | None) -> list[tuple[Data, Data]]:
        """Pairs of data sets whose labels are compared; `training` has those of the model's head, if it has one."""
        return []


def needs_head(where: str, kind: str, model: Encoder) -> None:
    """Raises InputError if `model` has no logits."""
    if not model.num_classes:
        raise InputError(f"{where}: {kind} needs a model with a head; set model.num_classes, or use knn")


class Batches:
    """Batches of a whole data set, each example once; iterable again and again."""

    def __init__(
        self, data: Data, batch_size: int, mesh: jax.sharding.Mesh, fields: Fields = IMAGE_LABEL,
        is_labelled: bool = True, source: sources.Source | None = None,
    ):  # fmt: skip
        batch_size = -(-batch_size // mesh.size) * mesh.size  # padding is masked, so rounding up is free of effect
        self.args: dict[str, Any] = {"batch_size": batch_size, "mesh": mesh, "fields": fields}
        self.data, self.source, self.mesh = data, source or sources.open_source(data), mesh
        if is_labelled:
            sources.need_labels(self.source)

    def __len__(self) -> int:
        return -(-len(self.source) // self.args["batch_size"])

    def image(self, index: int) -> np.ndarray:
        """The pixels of one example, uint8 [S, S, 3]."""
        record, name = self.source[int(index)], self.source.describe(int(index))
        return self.args["fields"].read(record, name, self.data, np.random.default_rng(0))["image"]

    def __iter__(self) -> Iterator[Batch]:
        return pipeline.eval_batches(self.data, self.source, **self.args)


class Measurement:
    """Several evaluators as one: first what needs the devices, then what the host does with it."""

    def __init__(self, evaluators: Mapping[str, Evaluator]):
        self.evaluators = evaluators
        self.updates = {}
        for name, evaluator in evaluators.items():
            mesh = next(iter(evaluator.passes.values())).mesh
            self.updates[name] = jax.jit(evaluator.update, out_shardings=sharding.replicated(mesh))

    def __bool__(self) -> bool:
        return bool(self.evaluators)

    def run(
        self, variables: Variables, frozen: Any, title: str, check: Callable[[], None] = lambda: None
    ) -> Callable[[], dict[str, Result]]:
        """Goes over all data, with a bar named `title`; `check` is called after each batch and may raise.

        What it returns finishes on the host alone: {eval: its result}.
        """
        total = sum(len(batches) for e in self.evaluators.values() for batches in e.passes.values())
        found: dict[str, dict[Hashable, list[Any]]] = {}
        with bar(title, total, "batch", first="compiling", leave=False) as shown:
            for name, evaluator in self.evaluators.items():
                update = functools.partial(self.updates[name], variables, frozen, evaluator.others)
                passes = evaluator.passes.items()
                with _named(name):
                    found[name] = {key: fetched(update, one, lambda: (shown.update(), check())) for key, one in passes}

        def finish() -> dict[str, Result]:
            results = {}
            for name, one in found.items():
                with _named(name):
                    results[name] = self.evaluators[name].finish(one)
            return results

        return finish


def save_arrays(result: Result, file: Path) -> None:
    """Writes the arrays of a result, if it has any, as npz; in process 0 alone."""
    if result.arrays and jax.process_index() == 0:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **result.arrays)
        storage.make(file.parent)
        write_whole(file, buffer.getvalue())


def scalars(results: Mapping[str, Result]) -> dict[str, float]:
    """{"<eval>/<metric>": value} of all that was found."""
    return {f"{name}/{key}": value for name, result in results.items() for key, value in result.scalars.items()}


def fetched(update: Callable, batches: Batches, after_each: Callable[[], Any]) -> list[Any]:
    """What `update` gives for each batch, on the host, which stays a few behind the devices so that nothing waits."""
    ahead, host = collections.deque(), []
    for batch in batches:
        ahead.append(update(batch))
        if len(ahead) > BATCHES_AHEAD:
            host.append(jax.device_get(ahead.popleft()))
        after_each()
    return [*host, *jax.device_get(list(ahead))]


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Says whose error it is: evals have data of their own."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"eval {name}: {error}") from error
