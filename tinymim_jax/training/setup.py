"""A stage made concrete before any data is read or any array made: task, steps, schedule, optimiser, shapes."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax

from tinymim_jax.data import randaugment
from tinymim_jax.experiment import config
from tinymim_jax.experiment.config import Stage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks import make_task
from tinymim_jax.tasks.contract import Task
from tinymim_jax.training import optim
from tinymim_jax.weights import handoff


@dataclasses.dataclass(frozen=True)
class StageSetup:
    """What `train` runs, `run --dry_run` prints and `bench` measures."""

    stage: Stage
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
        return [name for name, label in handoff.flatten(self.labels).items() if label == "freeze"]

    def untrained_line(self) -> list[str]:
        """The same for people; [] if all are trained."""
        frozen = self.untrained()
        return [f"not trained, not decayed: {handoff.fold(frozen, handoff.flatten(self.labels))}"] if frozen else []


def make_setup(stage: Stage, teacher: config.ViT | None, num_examples: int) -> StageSetup:
    """Works `stage` out; `teacher` as it was trained. Raises InputError on what does not fit together."""
    run, cfg = stage.run, stage.optim
    if run.batch_size > num_examples:
        raise InputError(f"batch_size {run.batch_size} is more than the {num_examples} images; make it smaller")
    steps_per_epoch = num_examples // run.batch_size
    total_steps = run.steps if run.epochs is None else round(run.epochs * steps_per_epoch)
    task = make_task(stage, teacher)
    variables, frozen = jax.eval_shape(task.init, jax.random.key(0), example_batch(stage))
    params = variables["params"]
    labels = optim.rules(params, cfg, task.untrained)
    if stage.data.rand_augment:
        randaugment.parse(stage.data.rand_augment)
    schedule = optim.make_schedule(cfg, run.batch_size, steps_per_epoch, total_steps)
    tx = optim.make_optimizer(cfg, schedule, labels, optim.lr_scales(params, cfg.layer_decay, stage.model.depth))
    return StageSetup(stage, task, steps_per_epoch, total_steps, schedule, labels, tx, params, frozen)


def teacher_init(stage: Stage) -> config.Init | None:
    """Where the teacher of `stage` comes from, if it has one."""
    teacher = config.teacher_of(stage)
    return teacher.init if teacher else None


def example_batch(stage: Stage, batch_size: int = 1) -> dict[str, np.ndarray]:
    """A batch of zeros in the pipeline's shapes."""
    size = stage.data.image_size
    return {
        "image": np.zeros((batch_size, size, size, 3), np.uint8),
        "label": np.zeros(batch_size, np.int32),
        "is_valid": np.ones(batch_size, bool),
        "index": np.zeros(batch_size, np.int32),
        "stop": np.zeros(batch_size, np.uint8),
    }
