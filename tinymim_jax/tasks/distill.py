"""Distillation: a frozen teacher's pass, a student's pass, and weighted targets between them (TinyMIM)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, Union

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.data.device_augment import color_jitter, normalize, to_float
from tinymim_jax.models.contract import Encoder, Outputs
from tinymim_jax.models.mae import draw_mask
from tinymim_jax.objectives.metrics import Mean
from tinymim_jax.runtime.codec import check_name, ranged
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import Aux, Batch, Context, Frozen, Panels, Params, Rngs, Task, TaskConfig, Variables
from tinymim_jax.tasks.pictures import NOT_PREDICTED
from tinymim_jax.tasks.targets import TARGETS
from tinymim_jax.tasks.targets.contract import Captures, Pass, Trace
from tinymim_jax.weights.handoff import Init
from tinymim_jax.weights.parameters import matches

TEACHER_PASS = "task.teacher"  # of a batch: the pass that students share
TEACHER = 1  # folded into the key of its drop path, which is not the student's
AnyTarget = Union[tuple(TARGETS.values())]  # noqa: UP007


@dataclasses.dataclass
class Distill(TaskConfig):
    """Distillation from a frozen teacher, whose sizes come from its own `stage.json`."""

    teacher: Init
    targets: dict[str, AnyTarget]
    color_jitter: float = ranged(0.4, at_least=0)  # brightness, contrast, saturation of the student's view
    mask_ratio: float = ranged(0.0, at_least=0, below=1)  # of the patches, which neither sees (Table 12); 0: raw images
    teacher_drop_path: float = ranged(0.0, at_least=0, below=1)  # in training (Table 13); the student's is its model's
    kind: Literal["distill"] = "distill"

    def build(self, context: Context) -> "DistillTask":
        return DistillTask(self, context)

    def can_share(self, other: TaskConfig) -> bool:
        """With one teacher, which sees whole images and drops no paths: its pass has no draws of a stage's own."""
        if not isinstance(other, Distill) or self.teacher != other.teacher:
            return False
        reads_norm = [any(t.captures()[0].normed for t in one.targets.values()) for one in (self, other)]
        return reads_norm[0] == reads_norm[1] and not any(
            one.mask_ratio or one.teacher_drop_path for one in (self, other)
        )

    def summary(self) -> str:
        blocks = dict.fromkeys(b for target in self.targets.values() for b in target.captures()[1].blocks)
        hidden = f", {self.mask_ratio:.0%} masked" if self.mask_ratio else ""
        return f"{', '.join(self.targets)} distillation, student block {', '.join(map(str, blocks))}{hidden}"

    def check(self, where: str, model: Encoder) -> None:
        if self.mask_ratio and not model.visible(self.mask_ratio):
            raise InputError(f"{where}.mask_ratio {self.mask_ratio} hides all {model.grid**2} patches; lower it")
        if not any(target.captures()[0].blocks for target in self.targets.values()):
            raise InputError(f"{where}.targets: none reads the teacher; name what of it the student is to match")
        for name, target in self.targets.items():
            check_name(f"{where}.targets", name)
            if target.needs_mask and not self.mask_ratio:
                raise InputError(f"{where}.targets.{name}: no patches are hidden; set {where}.mask_ratio, e.g. to 0.75")
            for block in target.captures()[1].blocks:
                if block > model.depth:
                    raise InputError(
                        f"{where}.targets.{name}: student_block {block} is beyond the student's {model.depth} blocks"
                    )


def check_masks(teacher: Encoder, student: Encoder) -> None:
    """Raises InputError unless one mask can hide the same patches from both."""
    for who, model in (("teacher", teacher), ("student", student)):
        if model.mask_unit is None:
            raise InputError(f"task.mask_ratio: the {who} cannot be masked ({model.summary()}); set it to 0")
    if (teacher.mask_unit, teacher.grid) != (student.mask_unit, student.grid):
        raise InputError(
            "task.mask_ratio: a mask must hide the same patches from teacher and student, and they have"
            f" {teacher.grid} and {student.grid} patches a side; give both one grid, or set it to 0"
        )


class DistillTask(Task):
    """Parameters: `encoder`, and under `pretext` those of the targets; frozen: the teacher's encoder."""

    def __init__(self, cfg: Distill, context: Context):
        super().__init__(context)
        self.task, teacher = cfg, context.sources["teacher"]
        self.of_teacher, self.of_student = (
            Captures.merged([target.captures()[side] for target in cfg.targets.values()]) for side in (0, 1)
        )
        for name, target in cfg.targets.items():
            if beyond := [block for block in target.captures()[0].blocks if block > teacher.depth]:
                raise InputError(
                    f"task.targets.{name}: teacher_block {beyond[0]} is beyond the teacher's {teacher.depth} blocks"
                )
        sides = ("teacher", teacher, self.of_teacher), ("student", context.model, self.of_student)
        for who, model, captures in sides:
            if captures.normed:
                model.check_norm(f"task.targets, the {who}")
        trunk = teacher.trunk(self.of_teacher.blocks[-1], bool(self.of_teacher.normed))
        self.teacher_cfg = trunk.computing_like(context.model)
        if cfg.teacher_drop_path:
            self.teacher_cfg = self.teacher_cfg.dropping(cfg.teacher_drop_path, "task.teacher_drop_path")
        self.teacher = self.teacher_cfg.build()
        if cfg.mask_ratio:
            check_masks(self.teacher_cfg, context.model)
        self.targets = {
            name: target.build(f"task.targets.{name}", self.teacher_cfg, context.model)
            for name, target in cfg.targets.items()
        }

    def is_untrained(self, name: str) -> bool:
        if not name.startswith("encoder/"):
            _, target, own = name.split("/", 2)
            return matches(self.targets[target].fixed, own)
        is_read = self.cfg.reads(name, self.of_student.blocks[-1], self.of_student.part, bool(self.of_student.normed))
        return not is_read or matches(self.cfg.fixed, name)

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Variables, Frozen]:
        images = self.images(batch)
        encoder_rng, teacher_rng, *keys = jax.random.split(rng, 2 + len(self.targets))
        own = {name: target.init(key) for (name, target), key in zip(self.targets.items(), keys, strict=True)}
        pretext = {name: params for name, params in own.items() if params}
        params = {"encoder": self.model.init(encoder_rng, images)["params"]} | ({"pretext": pretext} if pretext else {})
        return {"params": params}, {"teacher": {"encoder": self.teacher.init(teacher_rng, images)["params"]}}

    def _views(self, batch: Batch, jitter_rng: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """One crop, two views: the teacher's clean, the student's with colour jitter."""
        clean = self.images(batch)
        if jitter_rng is None or not self.task.color_jitter:
            return clean, clean
        jittered = color_jitter(jitter_rng, to_float(batch["image"]), self.task.color_jitter)
        return clean, normalize(jittered, self.data.mean, self.data.std)

    def passes(
        self, params: Params, frozen: Frozen, batch: Batch, rngs: Rngs, *, train: bool, masked: bool
    ) -> tuple[Pass, Pass]:
        """What the teacher and the student compute, of the same patches where the task masks and it is wanted."""
        clean, jittered = self._views(batch, rngs["augment"] if train else None)
        seen, mask = {}, (None, None)  # encoders that cannot be masked take no `keep`
        if self.task.mask_ratio and masked:
            seen["keep"], *mask = draw_mask(rngs["mask"], len(clean), self.cfg, self.task.mask_ratio)
        teacher = batch.get(TEACHER_PASS)
        if teacher is None:
            drop_rng = jax.random.fold_in(rngs["drop_path"], TEACHER)
            drop = {"train": train and self.task.teacher_drop_path > 0, "rngs": {"drop_path": drop_rng}}
            teacher = self._teach(frozen, clean, self.of_teacher.blocks, **seen, **drop)
        how = {"capture": self.of_student.blocks, "train": train, "rngs": {"drop_path": rngs["drop_path"]}, **seen}
        student = self.model.apply({"params": params["encoder"]}, jittered, **how)
        return Pass(teacher, clean, *mask), Pass(student.trace, jittered, *mask)

    def _teach(self, frozen: Frozen, images: jax.Array, blocks: tuple[int, ...], **options: Any) -> Trace:
        params = frozen["teacher"]["encoder"]
        return self.teacher.apply({"params": params}, images, capture=blocks, **options).trace

    def shared(self, frozen: Frozen, batch: Batch, tasks: Sequence[Task]) -> dict[str, Any]:
        """The teacher's pass, as far as the deepest of `tasks`, whose `frozen` it is, reads it."""
        deepest = max(tasks, key=lambda task: task.of_teacher.blocks[-1])
        blocks = Captures.merged([task.of_teacher for task in tasks]).blocks
        return {TEACHER_PASS: deepest._teach(frozen, self.images(batch), blocks)}

    def loss(
        self, params: Params, model_state: Any, frozen: Frozen, batch: Batch, rngs: Rngs, *, train: bool
    ) -> tuple[jax.Array, Aux]:
        passes = self.passes(params, frozen, batch, rngs, train=train, masked=True)
        total, terms = jnp.zeros(()), {}
        for name, target in self.targets.items():
            own = target.loss(params.get("pretext", {}).get(name, {}), *passes)
            total = total + self.task.targets[name].weight * sum(own.values())
            prefix = f"{name}_" if len(self.targets) > 1 else ""
            terms |= {f"{prefix}{term}": Mean.of(values, batch["is_valid"]) for term, values in own.items()}
        loss = Mean.of(total, batch["is_valid"])
        return loss.value(), Aux({"loss": loss, **terms}, model_state)

    def predict(self, variables: Variables, frozen: Frozen, batch: Batch) -> Outputs:
        """Features: of the last block that is trained whole (of block 1, if none is), normed if that was trained."""
        block = self.of_student.blocks[-1]
        is_normed = self.cfg.depth in self.of_student.normed and self.of_student.part == "all"
        last = None if is_normed else max(block - (self.of_student.part != "all"), 1)
        return self.cfg.outputs(variables, self.images(batch), last)

    def flops_per_image(self) -> float:
        teacher, student = (
            {"block": captures.blocks[-1], "part": captures.part} for captures in (self.of_teacher, self.of_student)
        )
        seen = self.cfg.visible(self.task.mask_ratio)
        passes = self.teacher_cfg.forward_flops(seen, **teacher) + self.cfg.train_flops(seen, **student)
        return passes + sum(target.flops(seen) for target in self.targets.values())

    def describe_source(self, source: str) -> str:
        teacher, task = self.context.sources[source], self.task
        parts = [target.summary(teacher) for target in task.targets.values()]
        parts += [f"{task.mask_ratio:.0%} of the patches hidden from both"] if task.mask_ratio else []
        parts += [f"drop path {task.teacher_drop_path:g} in the teacher"] if task.teacher_drop_path else []
        return "; ".join(parts)

    def panels(self, variables: Variables, frozen: Frozen, batch: Batch, rngs: Rngs) -> Panels:
        """What one patch (boxed) relates to in each target, in teacher and student; and what is made of hidden ones."""
        side, patch, fronts = self.cfg.grid, self.cfg.patch_size, (self.teacher_cfg.num_prefix, self.cfg.num_prefix)
        query = fronts[1] + (side // 2) * side + side // 2
        params, is_masked = variables["params"], self.task.mask_ratio > 0
        images, columns, pictures = np.asarray(to_float(batch["image"])), {}, {}
        passes = {
            masked: jax.jit(functools.partial(self.passes, train=False, masked=masked))(params, frozen, batch, rngs)
            for masked in {False, is_masked}
        }
        for name, target in self.targets.items():
            prefix, own = f"{name} " if len(self.targets) > 1 else "", params.get("pretext", {}).get(name, {})
            pictures |= target.pictures(own, passes[is_masked][1], images, self.data)
            for title, maps in target.maps(own, *passes[False], query).items():
                sides = target.sides(self.context.sources["teacher"])
                for who, of, rows, front in zip(("teacher", "student"), sides, maps, fronts, strict=True):
                    columns[f"{prefix}{title} {who}\n{of}"] = np.asarray(rows[:, front:]).reshape(-1, side, side)
        columns |= pictures
        rows = [[image, *others] for image, *others in zip(images, *columns.values(), strict=True)]
        corner, is_boxed = (side // 2) * patch, any(target.of_query for target in self.targets.values())
        title = f"how {'the boxed patch' if is_boxed else 'CLS'} relates to each patch"
        title += f"\n{NOT_PREDICTED}" if pictures else ""
        return Panels(title, rows, [], ["", *columns], (corner, corner, patch) if is_boxed else None)
