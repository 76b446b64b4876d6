"""Tasks: the code of a stage."""

from tinymim_jax.experiment import config
from tinymim_jax.tasks.classify import Classify
from tinymim_jax.tasks.contract import Task
from tinymim_jax.tasks.distill import Distill
from tinymim_jax.tasks.mae import Mae

TASKS = {"mae": Mae, "distill": Distill, "classify": Classify}


def make_task(stage: config.Stage, teacher: config.ViT | None = None) -> Task:
    """The task of `stage`; `teacher` is the teacher's model as it was trained, if the stage has one."""
    if stage.task.kind not in TASKS:
        raise ValueError(f"unknown task {stage.task.kind!r}; choose one of {', '.join(TASKS)}")
    return TASKS[stage.task.kind](stage, *([] if teacher is None else [teacher]))
