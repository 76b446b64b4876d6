"""The contract of evaluators, and the pass over a data set that they share."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax

from tinymim_jax import mesh as mesh_lib
from tinymim_jax.config import Data
from tinymim_jax.data import pipeline, sources
from tinymim_jax.tasks.base import Batch, Frozen, Outputs, Task, Variables

Predict = Callable[[Variables, Frozen, Batch], Outputs]


class Evaluator(Protocol):
    """Measures a model; results are named scalars."""

    def __call__(self, predict: Predict, variables: Variables, frozen: Frozen) -> dict[str, float]:
        """Runs over the evaluator's data."""


def make_predict(task: Task, mesh: jax.sharding.Mesh) -> Predict:
    """`task.predict`, jitted, with outputs that every process can read."""
    return jax.jit(task.predict, out_shardings=mesh_lib.replicated(mesh))


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

    def __iter__(self) -> Iterator[Batch]:
        return pipeline.eval_batches(self.data, self.source, **self.args)
