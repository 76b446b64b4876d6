"""Tiny stages and batches for the tests of tasks."""

import functools
import re

import flax.traverse_util
import jax
import numpy as np

from tests.models import reference
from tinymim_jax.experiment import config
from tinymim_jax.tasks import make_task
from tinymim_jax.tasks.contract import STREAMS

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DATA = config.Data("digits", image_size=16, mean=MEAN, std=STD)
TEACHER = config.ViT(24, 4, 3, image_size=16, patch_size=4)


def vit(**changes):
    return config.ViT(**{"width": 16, "depth": 2, "num_heads": 2, "image_size": 16, "patch_size": 4, **changes})


def stage(task, model):
    return config.Stage(task, model, DATA, config.Optim(lr=1e-3), config.Run(batch_size=4, steps=1))


def mae(task=None, **model):
    task = config.Mae(**{"decoder": config.Decoder(12, 1, 3), **(task or {})})
    return make_task(stage(task, vit(**model)))


def distill_stage(task=None, teacher=None, init=None, **model):
    """The teacher's block 3 of 4 has 3 heads, and so has the student's last."""
    teacher = config.Teacher(**{"init": config.Init(stage="t", **(init or {})), "block": 3, **(teacher or {})})
    task = config.Distill(**{"teacher": teacher, "student_block": 3, **(task or {})})
    return stage(task, vit(**{"width": 12, "depth": 3, "last_block_heads": 3, **model}))


def distill(*args, **kwargs):
    return make_task(distill_stage(*args, **kwargs), TEACHER)


def classify(task=None, **model):
    return make_task(stage(config.Classify(**(task or {})), vit(**{"num_classes": 5, **model})))


def batch(size=4, seed=0, is_valid=None):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (size, 16, 16, 3), dtype=np.uint8),
        "label": rng.integers(0, 5, size).astype(np.int32),
        "is_valid": np.ones(size, bool) if is_valid is None else np.array(is_valid, bool),
        "index": np.arange(size, dtype=np.int32),
    }


def normalised(images):
    """float64, from the definition."""
    return (images / 255 - np.array(MEAN)) / np.array(STD)


def rngs(seed=0):
    return {name: jax.random.fold_in(jax.random.key(seed), i) for i, name in enumerate(STREAMS)}


def weights(task, seed=0):
    """(params, frozen), far from their initial values."""
    params = reference.random_params(lambda key, b: task.init(key, b)[0], batch(), seed=seed)
    frozen = reference.random_params(lambda key, b: {"params": task.init(key, b)[1]}, batch(), seed=seed + 1)
    return params, frozen


class Compiled:
    """A task's functions, each compiled once for a value of `train`."""

    def __init__(self, task):
        self.task = task
        self.params, self.frozen = weights(task)
        self._loss = {
            train: jax.jit(lambda *args, train=train: task.loss(*args, train=train)) for train in (False, True)
        }
        self._gradients = jax.jit(jax.grad(functools.partial(task.loss, train=True), has_aux=True))
        self._predict = jax.jit(task.predict)

    def loss(self, data, seed=0, *, train=True):
        """(loss, aux)."""
        with jax.default_matmul_precision("highest"):
            return self._loss[train](self.params, {}, self.frozen, data, rngs(seed))

    def gradients(self, data):
        """In training, of the parameters."""
        return self._gradients(self.params, {}, self.frozen, data, rngs())[0]

    def predict(self, data):
        with jax.default_matmul_precision("highest"):
            return self._predict({"params": self.params}, self.frozen, data)


MAKE = {
    "mae": functools.partial(mae, drop_path=0.3),
    "distill": functools.partial(distill, drop_path=0.3),
    "classify": functools.partial(classify, {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0}, drop_path=0.3),
}


@functools.cache
def standard(kind):
    """A task of each kind, with drop path in training."""
    return Compiled(MAKE[kind]())


def zero_gradients(run):
    """({parameter whose gradient is 0 everywhere}, {all parameters}), names joined by "/"."""
    flat = flax.traverse_util.flatten_dict(run.gradients(batch()), sep="/")
    return {name for name, value in flat.items() if not np.any(value)}, set(flat)


def declared(task, names):
    """Those of `names` that `task.untrained` matches."""
    return {name for name in names if any(re.fullmatch(pattern, name) for pattern in task.untrained)}
