"""Tiny stages and batches for the tests of tasks."""

import functools

import jax
import numpy as np

from tests.models import reference
from tinymim_jax.experiment import config
from tinymim_jax.tasks.contract import STREAMS, Context
from tinymim_jax.weights.parameters import flatten

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DATA = config.Data("digits", image_size=16, mean=MEAN, std=STD)
TEACHER = config.ViT(24, 4, 3, image_size=16, patch_size=4)
LABEL_TEACHER = config.ViT(24, 2, 3, image_size=16, patch_size=4, pool="mean", num_classes=5)


def vit(**changes):
    return config.ViT(**{"width": 16, "depth": 2, "num_heads": 2, "image_size": 16, "patch_size": 4, **changes})


def mae(task=None, **model):
    task = config.Mae(**{"decoder": config.Decoder(12, 1, 3), **(task or {})})
    return task.build(Context(vit(**model), DATA))


def distill(targets=None, teacher=TEACHER, color_jitter=0.4, mask_ratio=0.0, teacher_drop_path=0.0, **model):
    """The teacher's block 3 of 4 has 3 heads, and so has the student's last."""
    targets = {"relation": config.Relation(3, 3)} if targets is None else targets
    task = config.Distill(config.Init(stage="t"), targets, color_jitter, mask_ratio, teacher_drop_path)
    model = vit(**{"width": 12, "depth": 3, "last_block_heads": 3, **model})
    return task.build(Context(model, DATA, sources={"teacher": teacher}))


def classify(task=None, teacher=LABEL_TEACHER, freeze=(), **model):
    model = vit(**{"num_classes": 5, **model})
    return config.Classify(**(task or {})).build(Context(model, DATA, freeze, sources={"teacher": teacher}))


def batch(size=4, seed=0, is_valid=None):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (size, 16, 16, 3), dtype=np.uint8),
        "second": rng.integers(0, 256, (size, 16, 16, 3), dtype=np.uint8),
        "mask": rng.integers(0, 5, (size, 16, 16), dtype=np.uint8),
        "extent": np.full((size, 2), 16, np.int32),
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


def fresh(task, seed=0):
    """(variables, frozen) as `init` draws them."""
    return jax.jit(task.init)(jax.random.key(seed), batch())


class Compiled:
    """A task's functions, each compiled once for a value of `train`."""

    def __init__(self, task):
        self.task = task
        self.params, self.frozen = weights(task)
        drawn = dict(fresh(task)[0])
        del drawn["params"]
        ones = {"batch_stats": jax.tree.map(np.ones_like, drawn["batch_stats"])} if "batch_stats" in drawn else {}
        self.state = drawn | ones
        self._loss = {
            train: jax.jit(lambda *args, train=train: task.loss(*args, train=train)) for train in (False, True)
        }
        self._gradients = jax.jit(jax.grad(functools.partial(task.loss, train=True), has_aux=True))
        self._predict = jax.jit(task.predict)

    def loss(self, data, seed=0, *, train=True):
        """(loss, aux)."""
        with jax.default_matmul_precision("highest"):
            return self._loss[train](self.params, self.state, self.frozen, data, rngs(seed))

    def gradients(self, data):
        """In training, of the parameters."""
        return self._gradients(self.params, self.state, self.frozen, data, rngs())[0]

    def predict(self, data):
        with jax.default_matmul_precision("highest"):
            return self._predict({"params": self.params, **self.state}, self.frozen, data)


def moco(total_steps=10, **model):
    return config.Moco(dim=6, hidden=10).build(Context(vit(**model), DATA, total_steps=total_steps))


def segment(**model):
    data = config.Data("scenes", image_size=16, mean=MEAN, std=STD, masks=config.Masks(5))
    task = config.Segment(5, config.UPer(8, bins=(1, 2)), taps=(1, 2, 3, 4), aux=config.Fcn(4))
    return task.build(Context(vit(**{"depth": 4, **model}), data))


MAKE = {
    "mae": functools.partial(mae, drop_path=0.3),
    "distill": functools.partial(distill, drop_path=0.3),
    "classify": functools.partial(classify, {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0}, drop_path=0.3),
    "moco": functools.partial(moco, drop_path=0.3),
    "segment": functools.partial(segment, drop_path=0.3),
}


@functools.cache
def standard(kind):
    """A task of each kind, with drop path in training."""
    return Compiled(MAKE[kind]())


def check_untrained(task):
    """Raises AssertionError unless `is_untrained` holds of the fixed positions and of what has no gradient, alone.

    Returns (names that it holds of, all names).
    """
    gradients = flatten(Compiled(task).gradients(batch()))
    zero = {name for name, value in gradients.items() if not np.any(value)}
    fixed = {name for name in gradients if name in ("encoder/pos_embed", "pretext/decoder/pos_embed")}
    if task.cfg.posembed == "trainable":
        fixed -= {"encoder/pos_embed"}
    assert not fixed & zero  # they are read, and must be named to stay as they are
    untrained = {name for name in gradients if task.is_untrained(name)}
    assert untrained == zero | fixed
    return untrained, set(gradients)
