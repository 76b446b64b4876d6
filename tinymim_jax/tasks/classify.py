"""Supervised training: fine-tuning, training from scratch, and (with a freeze rule) linear probing."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from tinymim_jax.data.device_augment import mix, normalize, partner, random_erasing, to_float
from tinymim_jax.experiment import config
from tinymim_jax.experiment.validate import check_attention
from tinymim_jax.models import flops, vit
from tinymim_jax.objectives import losses
from tinymim_jax.objectives.metrics import Mean
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import Aux, Batch, Frozen, Outputs, Params, Rngs, Variables, encode
from tinymim_jax.training.optim import matches


class Classify:
    """Parameters: `encoder`, a ViT with a head; frozen, if labels are distilled, a second one."""

    def __init__(self, stage: config.Stage, teacher: config.ViT | None = None):
        """`teacher` is the classifier of `stage.task.teacher`, as it was trained."""
        self.cfg, self.task, self.data = stage.model, stage.task, stage.data
        self.model = vit.build(stage.model)
        self.teacher_cfg = check_teacher(stage.model, teacher) if self.task.teacher else None
        self.untrained = ("encoder/pos_embed",) if stage.model.posembed == "fixed" else ()
        kernels = [f"encoder/block{i}/attn/qkv/kernel" for i in range(1, stage.model.depth + 1)]
        self.frozen_blocks = len(list(itertools.takewhile(lambda key: matches(stage.optim.freeze, key), kernels)))

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Variables, Frozen]:
        images = self._clean(batch)
        variables = self.model.init(rng, images)
        frozen = {"encoder": vit.build(self.teacher_cfg).init(rng, images)["params"]} if self.teacher_cfg else {}
        return {**variables, "params": {"encoder": variables["params"]}}, frozen

    def _clean(self, batch: Batch) -> jax.Array:
        return normalize(to_float(batch["image"]), self.data.mean, self.data.std)

    def _augmented(self, batch: Batch, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images erased, then mixed, with their soft labels [B, C]; one whose partner is unreadable keeps its label."""
        erase_rng, mix_rng = jax.random.split(rng)
        # Unreadable images reach others by mixing and by batch statistics.
        batch = {**batch, **{key: replace_by_partner(batch[key], batch["is_valid"]) for key in ("image", "label")}}
        targets = losses.smooth_one_hot(batch["label"], self.cfg.num_classes, self.task.label_smoothing)
        images = random_erasing(erase_rng, self._clean(batch), self.task.erasing)
        how = {name: getattr(self.task, name) for name in ("mixup", "cutmix", "mix_prob", "switch_prob")}
        return mix(mix_rng, images, targets, **how)

    def loss(
        self, params: Params, model_state: Any, frozen: Frozen, batch: Batch, rngs: Rngs, *, train: bool
    ) -> tuple[jax.Array, Aux]:
        if train:
            images, targets = self._augmented(batch, rngs["augment"])
        else:
            images, targets = self._clean(batch), jax.nn.one_hot(batch["label"], self.cfg.num_classes)
        variables, rngs = {"params": params["encoder"], **model_state}, {"drop_path": rngs["drop_path"]}
        out, new = self.model.apply(variables, images, train=train, rngs=rngs, mutable=list(model_state))
        values = losses.soft_cross_entropy(out.heads[0] if self.task.teacher else out.logits, targets)
        beyond = is_beyond(batch["label"], self.cfg.num_classes) & batch["is_valid"]
        metrics = {"labels_beyond_head": Mean.of(jnp.sum(beyond))}
        if self.task.teacher:
            distilled = self._distilled(frozen, images, out.heads[1])
            metrics["loss_labels"], metrics["loss_teacher"] = (
                Mean.of(v, batch["is_valid"]) for v in (values, distilled)
            )
            values = (1 - self.task.teacher.weight) * values + self.task.teacher.weight * distilled
        loss = Mean.of(values, batch["is_valid"])
        return loss.value(), Aux({"loss": loss, **metrics}, {**model_state, **new})

    def _distilled(self, frozen: Frozen, images: jax.Array, logits: jax.Array) -> jax.Array:
        """The distillation token's loss [B] against the teacher's labels."""
        teacher = vit.build(self.teacher_cfg).apply({"params": frozen["encoder"]}, images).logits
        if self.task.teacher.labels == "hard":
            best = jax.nn.one_hot(jnp.argmax(teacher, axis=-1), self.cfg.num_classes)
            return losses.soft_cross_entropy(logits, best)
        return losses.soft_distillation(logits, teacher, self.task.teacher.temperature)

    def predict(self, variables: Variables, frozen: Frozen, batch: Batch) -> Outputs:
        return encode(self.cfg, variables, self._clean(batch))

    def flops_per_image(self) -> float:
        teacher = flops.forward(self.teacher_cfg) if self.teacher_cfg else 0.0
        return flops.forward_backward(self.cfg, frozen_blocks=self.frozen_blocks) + teacher


def check_teacher(student: config.ViT, teacher: config.ViT) -> config.ViT:
    """`teacher`, computing as the student does; raises InputError if it cannot label the student's images."""
    if not student.dist_token:
        raise InputError("task.teacher labels a distillation token: set model.dist_token=True")
    if teacher.num_classes != student.num_classes:
        raise InputError(
            f"the teacher has {teacher.num_classes} classes and model.num_classes is {student.num_classes}; it must be"
            " a classifier of the same classes"
        )
    if teacher.head_norm:
        raise InputError("the teacher has a BatchNorm before its head (a linear probe): fine-tune it, or take another")
    if teacher.image_size != student.image_size:
        raise InputError(f"the teacher sees {teacher.image_size} px, the student {student.image_size}; make them equal")
    teacher = dataclasses.replace(teacher, dtype=student.dtype, attention=student.attention, remat=False)
    check_attention("the teacher", teacher)
    return teacher


def is_beyond(labels: jax.Array, num_classes: int) -> jax.Array:
    """Labels [B] -> whether there is no such class; bool [B]. tfds has -1 where it has no label."""
    return (labels < 0) | (labels >= num_classes)


def replace_by_partner(values: jax.Array, is_valid: jax.Array) -> jax.Array:
    """values [B, ...] where is_valid [B], elsewhere those of the row that `mix` pairs with it."""
    return jnp.where(is_valid.reshape(-1, *[1] * (values.ndim - 1)), values, partner(values))
