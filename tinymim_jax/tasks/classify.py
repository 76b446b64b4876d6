"""Supervised training: fine-tuning, training from scratch, and (with a freeze rule) linear probing."""

import dataclasses
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from tinymim_jax.data.device_augment import mix, partner, random_erasing
from tinymim_jax.models.contract import Encoder
from tinymim_jax.objectives import losses
from tinymim_jax.objectives.metrics import Mean
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import Aux, Batch, Context, Frozen, Params, Rngs, Task, TaskConfig, Variables
from tinymim_jax.weights.handoff import Init
from tinymim_jax.weights.parameters import flatten, matches


@dataclasses.dataclass
class LabelTeacher:
    """A classifier whose labels a distillation token learns (DeiT); it sees the same mixed images."""

    init: Init
    labels: Literal["hard", "soft"] = "hard"  # its best class, or its probabilities
    weight: float = ranged(0.5, at_least=0, at_most=1)  # of the teacher's loss; 1 - weight of the labels'
    temperature: float = ranged(1.0, above=0)  # soft: of both


@dataclasses.dataclass
class Classify(TaskConfig):
    """Supervised training or fine-tuning."""

    kind: Literal["classify"] = "classify"
    teacher: LabelTeacher | None = None  # needs model.dist_token
    label_smoothing: float = ranged(0.1, at_least=0, at_most=1)
    mixup: float = ranged(0.8, at_least=0)  # alpha of Beta; 0: off
    cutmix: float = ranged(1.0, at_least=0)  # alpha of Beta; 0: off
    mix_prob: float = ranged(1.0, at_least=0, at_most=1)  # probability that a group is mixed
    mix_group: int | None = ranged(None, at_least=1)  # images that share one draw; None: all of a (micro-)batch
    switch_prob: float = ranged(0.5, at_least=0, at_most=1)  # probability of cutmix where both are on
    erasing: float = ranged(0.25, at_least=0, at_most=1)  # probability of random erasing, per image

    def build(self, context: Context) -> "ClassifyTask":
        return ClassifyTask(self, context)

    def summary(self) -> str:
        return "supervised training"

    def check(self, where: str, model: Encoder) -> None:
        if model.num_classes < 2:
            raise InputError(f"{where}: classify needs model.num_classes of at least 2, got {model.num_classes}")
        if self.teacher is not None and model.label_heads < 2:
            raise InputError(f"{where}.teacher labels a distillation token: set model.dist_token=True")

    def has_labels(self) -> bool:
        return True


class ClassifyTask(Task):
    """Parameters: `encoder`, which has a head; frozen, if labels are distilled, a second one."""

    def __init__(self, cfg: Classify, context: Context):
        super().__init__(context)
        self.task = cfg
        self.teacher_cfg = check_teacher(self.cfg, context.sources["teacher"]) if cfg.teacher else None
        self.frozen_blocks = frozen_blocks(self.cfg, context.freeze) if context.freeze else 0

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Variables, Frozen]:
        images = self.images(batch)
        rng, teacher_rng = jax.random.split(rng)
        variables, frozen = self.model.init(rng, images), {}
        if self.teacher_cfg:
            frozen = {"teacher": {"encoder": self.teacher_cfg.build().init(teacher_rng, images)["params"]}}
        return {**variables, "params": {"encoder": variables["params"]}}, frozen

    def _augmented(self, batch: Batch, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images erased, then mixed, with their soft labels [B, C]; one whose partner is unreadable keeps its label."""
        erase_rng, mix_rng = jax.random.split(rng)
        # Unreadable images reach others by mixing and by batch statistics.
        batch = {**batch, **{key: replace_by_partner(batch[key], batch["is_valid"]) for key in ("image", "label")}}
        targets = optax.smooth_labels(jax.nn.one_hot(batch["label"], self.cfg.num_classes), self.task.label_smoothing)
        images = random_erasing(erase_rng, self.images(batch), self.task.erasing)
        cfg = self.task
        how = {"mix_prob": cfg.mix_prob, "switch_prob": cfg.switch_prob, "mix_group": cfg.mix_group}
        return mix(mix_rng, images, targets, mixup=cfg.mixup, cutmix=cfg.cutmix, **how)

    def loss(
        self, params: Params, model_state: Any, frozen: Frozen, batch: Batch, rngs: Rngs, *, train: bool
    ) -> tuple[jax.Array, Aux]:
        if train:
            images, targets = self._augmented(batch, rngs["augment"])
        else:
            images, targets = self.images(batch), jax.nn.one_hot(batch["label"], self.cfg.num_classes)
        variables, rngs = {"params": params["encoder"], **model_state}, {"drop_path": rngs["drop_path"]}
        out, new = self.model.apply(variables, images, train=train, rngs=rngs, mutable=list(model_state))
        values = optax.softmax_cross_entropy(out.heads[0] if self.task.teacher else out.logits, targets)
        beyond = losses.is_beyond(batch["label"], self.cfg.num_classes) & batch["is_valid"]
        metrics = {"labels_beyond_head": Mean.of(jnp.sum(beyond))}
        if self.task.teacher:
            distilled, weight = self._distilled(frozen, images, out.heads[1]), self.task.teacher.weight
            parts = {"loss_labels": values, "loss_teacher": distilled}
            metrics |= {name: Mean.of(part, batch["is_valid"]) for name, part in parts.items()}
            values = (1 - weight) * values + weight * distilled
        loss = Mean.of(values, batch["is_valid"])
        return loss.value(), Aux({"loss": loss, **metrics}, {**model_state, **new})

    def _distilled(self, frozen: Frozen, images: jax.Array, logits: jax.Array) -> jax.Array:
        """The distillation token's loss [B] against the teacher's labels."""
        teacher = self.teacher_cfg.build().apply({"params": frozen["teacher"]["encoder"]}, images).logits
        if self.task.teacher.labels == "hard":
            best = jax.nn.one_hot(jnp.argmax(teacher, axis=-1), self.cfg.num_classes)
            return optax.softmax_cross_entropy(logits, best)
        return losses.soft_distillation(logits, teacher, self.task.teacher.temperature)

    def flops_per_image(self) -> float:
        teacher = self.teacher_cfg.forward_flops() if self.teacher_cfg else 0.0
        return self.cfg.train_flops(frozen_blocks=self.frozen_blocks) + teacher

    def describe_source(self, source: str) -> str:
        return f"{self.task.teacher.labels} labels, weight {self.task.teacher.weight:g}"


def frozen_blocks(model: Encoder, freeze: tuple[str, ...]) -> int:
    """How many blocks from the first on `freeze` leaves untrained."""
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    params = jax.eval_shape(model.build().init, jax.random.key(0), images)["params"]
    names = [f"encoder/{key}" for key in flatten(params)]
    trained = {model.block_of(name) for name in names if not matches(freeze, name)}
    return len(list(itertools.takewhile(lambda block: block not in trained, range(1, model.depth + 1))))


def check_teacher(student: Encoder, teacher: Encoder) -> Encoder:
    """`teacher`, computing as the student does; raises InputError if it cannot label the student's images."""
    if teacher.num_classes != student.num_classes:
        raise InputError(
            f"the teacher has {teacher.num_classes} classes and model.num_classes is {student.num_classes}; it must be"
            " a classifier of the same classes"
        )
    if teacher.has_state:
        raise InputError("the teacher has a BatchNorm before its head (a linear probe): fine-tune it, or take another")
    if teacher.image_size != student.image_size:
        raise InputError(f"the teacher sees {teacher.image_size} px, the student {student.image_size}; make them equal")
    return teacher.computing_like(student)


def replace_by_partner(values: jax.Array, is_valid: jax.Array) -> jax.Array:
    """values [B, ...] where is_valid [B], elsewhere those of the row that `mix` pairs with it."""
    return jnp.where(is_valid.reshape(-1, *[1] * (values.ndim - 1)), values, partner(values))
