import dataclasses
import types
import typing

import pytest

from tests.tasks import stages
from tinymim_jax import tasks
from tinymim_jax.experiment import config


def test_every_kind_of_the_config_has_a_task():
    kinds = {dataclasses.fields(kind)[_index(kind)].default for kind in typing.get_args(config.Task)}
    assert kinds == tasks.TASKS.keys()


def _index(kind):
    return [f.name for f in dataclasses.fields(kind)].index("kind")


def test_make_task():
    assert isinstance(tasks.make_task(stages.stage(config.Mae(), stages.vit())), tasks.Mae)
    assert isinstance(tasks.make_task(stages.stage(config.Classify(), stages.vit(num_classes=2))), tasks.Classify)
    assert isinstance(tasks.make_task(stages.distill_stage(), stages.TEACHER), tasks.Distill)


def test_the_teacher_is_the_model_that_was_given():
    task = tasks.make_task(stages.distill_stage(), stages.TEACHER)
    assert (task.teacher_cfg.width, task.student_cfg.width) == (24, 12)


def test_unknown_task():
    stage = types.SimpleNamespace(task=types.SimpleNamespace(kind="segment"))
    with pytest.raises(ValueError, match=r"unknown task 'segment'; choose one of mae, distill, classify"):
        tasks.make_task(stage)
