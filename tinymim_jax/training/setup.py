"""A stage made concrete before any data is read or any array made: task, steps, schedule, optimiser, shapes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from tinymim_jax.data import randaugment
from tinymim_jax.data.config import Data
from tinymim_jax.data.fields import IMAGE_LABEL
from tinymim_jax.experiment.config import Stage
from tinymim_jax.models.contract import Encoder
from tinymim_jax.runtime import keys
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import Context, Task
from tinymim_jax.training import optim
from tinymim_jax.weights.parameters import flatten, fold


@dataclasses.dataclass(frozen=True)
class StageSetup:
    """What a stage runs, `run --dry_run` prints and `bench` measures; shapes are those of one replica."""

    stage: Stage
    name: str
    task: Task
    steps_per_epoch: int
    total_steps: int
    schedule: optim.Schedule
    labels: Any  # per parameter: "freeze" | "decay" | "no_decay"
    tx: optax.GradientTransformation
    params: Any  # jax.ShapeDtypeStruct per parameter
    frozen: Any  # and per frozen array

    def untrained(self) -> list[str]:
        """The parameters that keep their values."""
        return [name for name, label in flatten(self.labels).items() if label == "freeze"]

    def untrained_line(self) -> list[str]:
        """The same for people; [] if all are trained."""
        frozen = self.untrained()
        return [f"not trained, not decayed: {fold(frozen, flatten(self.labels))}"] if frozen else []

    def seeds(self) -> list[int]:
        """The seed of each replica, told apart from other stages of this seed by the stage's name."""
        run = self.stage.run
        return [keys.stage_seed(run.seed + replica, self.name) for replica in range(run.replicas)]

    def data(self, replica: int = 0) -> tuple[Data, int]:
        """What a replica reads, and the seed of its order and crops."""
        run = self.stage.run
        seed = run.seed + replica if run.data_seed is None else run.data_seed
        data = self.stage.data
        subset = seed if data.subset_seed is None else data.subset_seed
        return dataclasses.replace(data, subset_seed=subset), keys.stage_seed(seed, run.data_name or self.name)

    def flops(self) -> float:
        """Matmul FLOPs that one step needs, of all replicas; a teacher whose pass they share counts for each."""
        return self.task.flops_per_image() * self.stage.run.batch_size * self.stage.run.replicas

    @property
    def shares_batches(self) -> bool:
        """Whether all replicas see the same batches."""
        return self.stage.run.replicas == 1 or self.stage.run.data_seed is not None

    def as_single(self, replica: int, is_paired: bool = False) -> Stage:
        """The stage that a replica is; `is_paired` if it began with that of its number of another stage."""
        run, init = self.stage.run, self.stage.init
        run = dataclasses.replace(run, replicas=1, seed=run.seed + replica)
        if init is not None and is_paired:
            init = dataclasses.replace(init, replica=replica)
        return dataclasses.replace(self.stage, run=run, data=self.data(replica)[0], init=init)


def make_setup(stage: Stage, name: str, sources: Mapping[str, Encoder], num_examples: int) -> StageSetup:
    """Works stage `name` out; `sources` are the models that its task reads, as they were trained, by field.

    Raises InputError on what does not fit together.
    """
    run, cfg = stage.run, stage.optim
    if run.batch_size > num_examples:
        raise InputError(f"batch_size {run.batch_size} is more than the {num_examples} images; make it smaller")
    steps_per_epoch = num_examples // run.batch_size
    total_steps = run.steps if run.epochs is None else round(run.epochs * steps_per_epoch)
    task = stage.task.build(Context(stage.model, stage.data, stage.optim.freeze, total_steps, sources))
    if stage.data.resident and task.fields is not IMAGE_LABEL:
        raise InputError("data.resident holds images and labels, and this task reads more; set data.resident=False")
    variables, frozen = jax.eval_shape(task.init, jax.random.key(0), example_batch(task, stage))
    params = variables["params"]
    labels = optim.rules(params, cfg, task.is_untrained)
    if stage.data.rand_augment:
        randaugment.parse(stage.data.rand_augment)
    schedule = optim.make_schedule(cfg, run.batch_size, steps_per_epoch, total_steps)
    tx = optim.make_optimizer(cfg, schedule, labels, optim.lr_scales(params, cfg, stage.model))
    return StageSetup(stage, name, task, steps_per_epoch, total_steps, schedule, labels, tx, params, frozen)


def step_batch(setup: StageSetup) -> dict[str, np.ndarray]:
    """A batch of zeros as one step takes it; of replicas that do not share it, stacked [R, B, ...]."""
    batch = example_batch(setup.task, setup.stage, setup.stage.run.batch_size)
    if setup.shares_batches:
        return batch
    return {name: np.stack([rows] * setup.stage.run.replicas) for name, rows in batch.items()}


def example_batch(task: Task, stage: Stage, batch_size: int = 1) -> dict[str, np.ndarray]:
    """A batch of zeros in the pipeline's shapes."""
    return {**task.fields.batch(stage.data, batch_size), "is_valid": np.ones(batch_size, bool),
            "stop": np.zeros(batch_size, np.uint8)}  # fmt: skip
