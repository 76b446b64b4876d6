# ruff: noqa: E402 (torch is looked for before what needs it)
"""Gradients, fifty steps of our train step, schedule and decay rules against the PyTorch reference."""

import copy
import dataclasses
import functools
import math
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinymim_jax.weights.parameters import flatten

torch = pytest.importorskip("torch", reason="parity is measured against PyTorch; install tinymim_jax[test]")

from tests import torch_optim
from tests.conftest import TRAIN
from tests.test_parity import (
    DECODER,
    ENCODER,
    IMAGE,
    assert_close,
    channels_first,
    difference,
    in_our_layout,
    params_of,
    reference_mae,
    reference_vit,
)
from tinymim_jax.bridge import formats
from tinymim_jax.bridge.torch_reference import distill
from tinymim_jax.data import pipeline, sources
from tinymim_jax.experiment import config, recipes
from tinymim_jax.experiment.config import Init, Run, ViT
from tinymim_jax.runtime.sharding import make_mesh
from tinymim_jax.tasks.contract import STREAMS
from tinymim_jax.training import optim
from tinymim_jax.training.setup import StageSetup, make_setup
from tinymim_jax.training.step import TrainState, make_train_step

KINDS = ("mae", "distill", "classify")
STEPS, BATCH, IMAGES = 50, 8, 80  # ten steps an epoch
RNG = jax.random.key(3)


# Both sides of one stage


@dataclasses.dataclass
class Pair:
    """A stage here and its model in PyTorch, with the same weights."""

    plan: StageSetup
    model: torch.nn.Module
    teacher: torch.nn.Module | None = None

    @property
    def params(self) -> Any:
        return params_of(self.model, self.plan.params)

    @property
    def frozen(self) -> Any:
        return {"teacher": params_of(self.teacher, self.plan.frozen["teacher"])} if self.teacher else {}

    def reference_loss(self, model: torch.nn.Module, batch: Any, step: int) -> torch.Tensor:
        """Of `model` on the batch of `step`."""
        stage = self.plan.stage
        mean, std = np.float32(stage.data.mean), np.float32(stage.data.std)
        images = channels_first((np.float32(batch["image"]) / 255 - mean) / std)
        if stage.task.kind == "mae":
            return model(images, torch.from_numpy(noise_at(step)))[0]
        if stage.task.kind == "distill":
            return distill.loss(self.teacher, stage.task.targets["relation"].teacher_block, model, images, images)
        labels = torch.from_numpy(np.array(batch["label"])).long()
        return torch.nn.functional.cross_entropy(model(images).logits, labels, label_smoothing=0.1)


def plan_of(stage: config.Stage, teacher: ViT | None = None, lr: float = 2e-3) -> StageSetup:
    """The recipe for fifty steps, without what draws random numbers, MAE's mask aside."""
    for name in {"mixup", "cutmix", "erasing", "color_jitter"} & set(vars(stage.task)):
        setattr(stage.task, name, 0.0)
    stage.data, stage.run = TRAIN, Run(batch_size=BATCH, steps=STEPS)
    stage.optim = dataclasses.replace(stage.optim, lr=lr, lr_batch=None, min_lr=1e-5, warmup_epochs=1.0)
    return setup_of(stage, teacher, IMAGES)


def setup_of(stage: config.Stage, teacher: ViT | None, num_examples: int) -> StageSetup:
    return make_setup(stage, "stage", {"teacher": teacher} if teacher else {}, num_examples)


@functools.cache
def pair(kind: str) -> Pair:
    """A tiny stage made by the recipe of `kind`."""
    if kind == "mae":
        stage = recipes.mae(ENCODER, TRAIN)
        stage.task.decoder = DECODER
        return Pair(plan_of(stage), reference_mae(stage.model, stage.task))
    if kind == "distill":  # from the middle of a teacher
        student, teacher = ViT(12, 2, 2, last_block_heads=4, **IMAGE), ViT(24, 3, 4, **IMAGE)
        stage = recipes.distill(student, Init("teacher"), TRAIN, block=2)
        return Pair(plan_of(stage, teacher), reference_vit(student), reference_vit(teacher, seed=1))
    model = dataclasses.replace(ENCODER, pool="mean", num_classes=10, posembed="trainable")
    stage = recipes.finetune(model, None, TRAIN, TRAIN, code=True)
    return Pair(plan_of(stage, lr=1e-2), reference_vit(model))


@functools.cache
def batches(count: int) -> list[dict[str, jax.Array]]:
    """Of the embedded digits."""
    mesh, source = make_mesh(), sources.open_source(TRAIN)
    return list(pipeline.train_batches(pipeline.train_rows(TRAIN, source, BATCH, 0), 0, count, mesh))


def rngs_at(step: int) -> dict[str, jax.Array]:
    """The keys that the train step derives from `RNG`."""
    rng = jax.random.fold_in(RNG, step)
    return {name: jax.random.fold_in(rng, i) for i, name in enumerate(STREAMS)}


def noise_at(step: int) -> np.ndarray:
    """What our MAE draws at `step`: the one thing that the reference has to be told."""
    return np.array(jax.random.uniform(rngs_at(step)["mask"], (BATCH, 16)))


# Gradients


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_every_parameter(kind):
    both, batch = pair(kind), batches(1)[0]

    def loss(params: Any) -> jax.Array:
        params = optim.stop_frozen(params, both.plan.labels)
        return both.plan.task.loss(params, {}, both.frozen, batch, rngs_at(0), train=True)[0]

    ours = flatten(jax.jit(jax.grad(loss))(both.params))
    both.model.zero_grad()
    both.reference_loss(both.model, batch, 0).backward()
    grads = {name: p.grad for name, p in both.model.named_parameters()}
    trained = {key: g for key, g in ours.items() if grads[formats.mae_name(key)] is not None}
    assert set(ours) - set(trained) == set(both.plan.untrained())
    assert not any(np.any(g) for key, g in ours.items() if key not in trained)
    assert_close(trained, in_our_layout(grads, flax.traverse_util.unflatten_dict(trained, sep="/")), 1e-4)


# Fifty steps


@dataclasses.dataclass
class Training:
    """Losses of every step and the parameters after the last, by our names."""

    losses: list[float]
    params: dict[str, Any]


def train_ours(both: Pair) -> Training:
    params, frozen, losses = both.params, both.frozen, []
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, both.plan.tx.init(params), {})
    step = jax.jit(make_train_step(both.plan))
    for batch in batches(STEPS):
        state, metrics = step(state, frozen, batch, RNG)
        losses.append(float(metrics["loss"].value()))
    return Training(losses, flatten(state.params))


def train_reference(both: Pair) -> Training:
    model, cfg, losses = copy.deepcopy(both.model), both.plan.stage.optim, []
    if both.plan.stage.task.kind == "classify":
        groups = torch_optim.layer_decay_groups(model, cfg.weight_decay, cfg.layer_decay)
    else:
        groups = torch_optim.param_groups(model, cfg.weight_decay)
    optimizer = torch_optim.make_adamw(groups, 0.0, (cfg.b1, cfg.b2))
    for step, batch in enumerate(batches(STEPS)):
        epochs = (cfg.warmup_epochs, STEPS * BATCH / IMAGES)
        torch_optim.set_lr(optimizer, torch_optim.lr_at(step * BATCH / IMAGES, cfg.lr, cfg.min_lr, *epochs))
        optimizer.zero_grad()
        loss = both.reference_loss(model, batch, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Training(losses, in_our_layout(model.state_dict(), both.plan.params))


@functools.cache
def runs(kind: str) -> tuple[Training, Training]:
    """Ours and the reference's, from the same weights on the same batches."""
    return train_ours(pair(kind)), train_reference(pair(kind))


def trajectory_difference(kind: str) -> float:
    """The largest relative difference of the loss at any of fifty steps of "mae", "distill" or "classify"."""
    ours, theirs = runs(kind)
    return max(abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True))


def that_count(params: dict[str, Any], kind: str) -> dict[str, np.ndarray]:
    """The trained parameters, as far as the loss depends on them.

    Softmax over keys cancels the bias of k: its gradient is rounding, which Adam blows up to whole steps.
    """
    trained = {key: np.asarray(p) for key, p in params.items() if key not in pair(kind).plan.untrained()}
    return {key: p[[0, 2]] if key.endswith("/qkv/bias") else p for key, p in trained.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_fifty_steps(kind):
    first, last = (np.mean(runs(kind)[0].losses[part]) for part in (slice(10), slice(-10, None)))
    found = trajectory_difference(kind)
    print(f"{kind}: loss {first:.3f} -> {last:.3f}, largest relative difference {found:.2g}")
    assert last < 0.97 * first
    assert found < 1e-4, f"relative difference of the loss: {found:.2g}"


@pytest.mark.parametrize("kind", KINDS)
def test_movement_of_every_parameter_in_fifty_steps(kind):
    start = that_count(flatten(pair(kind).params), kind)
    moved = [{key: p - start[key] for key, p in that_count(run.params, kind).items()} for run in runs(kind)]
    assert_close(*moved, 2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_parameters_stay_in_both(kind):
    start, untrained = flatten(pair(kind).params), pair(kind).plan.untrained()
    for run in runs(kind):
        assert {key for key, p in run.params.items() if np.array_equal(p, start[key])} == set(untrained)


# Schedule and decay rules


def recipe(kind: str) -> tuple[config.Stage, ViT | None]:
    """The recipe as published, for twelve narrow blocks, and its teacher."""
    model = dataclasses.replace(ENCODER, depth=12)
    if kind == "mae":
        return recipes.mae(model, TRAIN), None
    if kind == "distill":
        return recipes.distill(model, Init("teacher"), TRAIN, block=12), model
    fixed = {"pool": "mean", "num_classes": 10, "posembed": "trainable"}
    extra = {"dist_token": True, "neck": 20} if kind == "finetune TinyMIM*" else {}
    return recipes.finetune(dataclasses.replace(model, **fixed, **extra), None, TRAIN, TRAIN), None


RECIPES = ("mae", "distill", "finetune", "finetune TinyMIM*")


@pytest.mark.parametrize(("kind", "steps_per_epoch"), [("mae", 312), ("distill", 312), ("finetune", 625), ("mae", 7)])
def test_learning_rate_of_every_step(kind, steps_per_epoch):
    stage = recipe(kind)[0]
    cfg, run = stage.optim, stage.run
    plan = setup_of(*recipe(kind), steps_per_epoch * run.batch_size)
    steps = np.arange(plan.total_steps)
    peak = cfg.lr * run.batch_size / 256
    theirs = [
        torch_optim.lr_at(step / steps_per_epoch, peak, cfg.min_lr, cfg.warmup_epochs, run.epochs) for step in steps
    ]
    ours = np.asarray(plan.schedule(jnp.asarray(steps)))
    assert len(ours) == run.epochs * steps_per_epoch
    assert theirs[0] == ours[0] == 0
    assert math.isclose(max(theirs), peak)
    assert difference(ours, theirs) < 1e-6
    # The cosine ends where 1 + cos cancels, to which float32 gives 1e-7 of the peak.
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7 * peak)


@functools.cache
def treatments(kind: str) -> tuple[StageSetup, dict[str, tuple[float, float]]]:
    """Our plan; {our name: (weight decay, factor on the learning rate)} of PyTorch's groups."""
    stage, teacher = recipe(kind)
    plan = setup_of(stage, teacher, 10**6)
    model = reference_mae(stage.model, stage.task) if kind == "mae" else reference_vit(stage.model)
    if kind.startswith("finetune"):
        groups = torch_optim.layer_decay_groups(model, 0.05, 0.65)
    else:
        groups = torch_optim.param_groups(model, 0.05)
    found = {id(p): (g["weight_decay"], g.get("lr_scale", 1.0)) for g in groups for p in g["params"]}
    tensors = {name: found.get(id(p)) for name, p in model.named_parameters()}
    assert len(tensors) == len(flatten(plan.params))
    return plan, {key: tensors[formats.mae_name(key)] for key in flatten(plan.params)}


@pytest.mark.parametrize("kind", RECIPES)
def test_weight_decay_of_every_parameter(kind):
    plan, theirs = treatments(kind)
    assert plan.stage.optim.weight_decay == 0.05
    for key, label in flatten(plan.labels).items():
        if label == "freeze":  # PyTorch's groups hold too what gets no gradient: the fifty steps tell which
            assert theirs[key] is None or kind == "distill"
        else:
            assert theirs[key][0] == {"decay": 0.05, "no_decay": 0.0}[label], key


@pytest.mark.parametrize("kind", RECIPES)
def test_learning_rate_factor_of_every_parameter(kind):
    plan, theirs = treatments(kind)
    scales = flatten(optim.lr_scales(plan.params, plan.stage.optim, plan.stage.model))
    ours = {key: scale for key, scale in scales.items() if theirs[key]}
    assert ours == pytest.approx({key: theirs[key][1] for key in ours}, rel=1e-12)
    assert len(set(ours.values())) == (14 if kind.startswith("finetune") else 1)
