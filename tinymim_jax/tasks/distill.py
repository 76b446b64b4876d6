"""TinyMIM: the student's token relations match those of a frozen teacher (section 3.1.2, Eq. 5 and 9)."""

import dataclasses
from typing import Any

import jax

from tinymim_jax.data.device_augment import color_jitter, normalize, to_float
from tinymim_jax.experiment import config
from tinymim_jax.experiment.validate import check_attention
from tinymim_jax.models import flops, vit
from tinymim_jax.models.layers import BlockTrace
from tinymim_jax.objectives import relations
from tinymim_jax.objectives.metrics import Mean
from tinymim_jax.objectives.relation_kl import relation_kl
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import Aux, Batch, Frozen, Outputs, Params, Rngs, Variables, encode


class Distill:
    """Parameters and frozen arrays: `encoder`, a ViT each."""

    def __init__(self, stage: config.Stage, teacher: config.ViT):
        """`teacher` is the model as it was trained; it is cut off after its target block."""
        self.task, self.data = stage.task, stage.data
        self.student_cfg, self.teacher_cfg = stage.model, cut_teacher(stage, teacher)
        self.student, self.teacher = vit.build(self.student_cfg), vit.build(self.teacher_cfg)
        self.untrained = untrained(stage.model, stage.task.student_block)

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Variables, Frozen]:
        images = self._views(batch, None)[0]
        params = self.student.init(rng, images)["params"]
        return {"params": {"encoder": params}}, {"encoder": self.teacher.init(rng, images)["params"]}

    def _views(self, batch: Batch, jitter_rng: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """One crop, two views: the teacher's clean, the student's with colour jitter."""
        images, (mean, std) = to_float(batch["image"]), (self.data.mean, self.data.std)
        clean = normalize(images, mean, std)
        if jitter_rng is None or not self.task.color_jitter:
            return clean, clean
        return clean, normalize(color_jitter(jitter_rng, images, self.task.color_jitter), mean, std)

    def traces(
        self, params: Params, frozen: Frozen, batch: Batch, rngs: Rngs, *, train: bool
    ) -> tuple[BlockTrace, BlockTrace]:
        """The teacher's and the student's target block."""
        clean, jittered = self._views(batch, rngs["augment"] if train else None)
        t, s = self.task.teacher.block, self.task.student_block
        teacher = self.teacher.apply({"params": frozen["encoder"]}, clean, capture=(t,))
        student = self.student.apply(
            {"params": params["encoder"]},
            jittered,
            capture=(s,),
            train=train,
            rngs={"drop_path": rngs["drop_path"]},
        )
        return teacher.trace[t], student.trace[s]

    def loss(
        self, params: Params, model_state: Any, frozen: Frozen, batch: Batch, rngs: Rngs, *, train: bool
    ) -> tuple[jax.Array, Aux]:
        teacher, student = self.traces(params, frozen, batch, rngs, train=train)
        pairs = {r: [relations.pair(trace, r) for trace in (teacher, student)] for r in self.task.relations}
        kl = {r: relation_kl(*pair, kernel=self.task.relation_kernel) for r, pair in pairs.items()}
        loss = Mean.of(sum(kl.values()), batch["is_valid"])
        terms = {f"kl_{r}": Mean.of(values, batch["is_valid"]) for r, values in kl.items()}
        return loss.value(), Aux({"loss": loss, **terms}, model_state)

    def predict(self, variables: Variables, frozen: Frozen, batch: Batch) -> Outputs:
        """Features: those that enter the student's target block (of block 1: that leave it)."""
        block = max(self.task.student_block - 1, 1)
        return encode(self.student_cfg, variables, self._views(batch, None)[0], block)

    def flops_per_image(self) -> float:
        return (
            flops.forward(self.teacher_cfg, target_block=self.task.teacher.block)
            + flops.forward_backward(self.student_cfg, target_block=self.task.student_block)
            + flops.relations(self.teacher_cfg, self.student_cfg, len(self.task.relations))
        )


def cut_teacher(stage: config.Stage, teacher: config.ViT) -> config.ViT:
    """The teacher up to its target block, with that block's heads; raises InputError if it cannot teach `stage`."""
    spec, student = stage.task.teacher, stage.model
    if teacher.dist_token or student.dist_token:
        raise InputError("relations are between CLS and patches; a model with a distillation token has no part in them")
    if not 1 <= spec.block <= teacher.depth:
        raise InputError(f"task.teacher.block {spec.block} is beyond the teacher's {teacher.depth} blocks")
    trained = vit.heads_of(teacher, spec.block)
    heads = spec.heads or trained
    if heads != trained and (teacher.width % heads or not spec.init.regroup_heads):
        raise InputError(
            f"the teacher's block {spec.block} (width {teacher.width}) was trained with {trained} heads, not"
            f" task.teacher.heads={heads}; leave it None, or set task.teacher.init.regroup_heads=True and a divisor of"
            " the width"
        )
    own = vit.heads_of(student, stage.task.student_block)
    if own != heads:
        field = "last_block_heads" if stage.task.student_block == student.depth else "num_heads"
        raise InputError(
            f"the student's block {stage.task.student_block} has {own} heads, the teacher's block {spec.block} has"
            f" {heads}; set model.{field}={heads}, or task.teacher.heads={own} with"
            " task.teacher.init.regroup_heads=True"
        )
    if teacher.patch_size != student.patch_size:
        raise InputError(
            f"teacher and student must see the same patches: patch_size {teacher.patch_size} and {student.patch_size}"
        )
    cut = dataclasses.replace(
        teacher,
        depth=spec.block,
        last_block_heads=heads,
        image_size=student.image_size,
        dtype=student.dtype,
        attention=student.attention,
        pool="mean",  # without a head: nothing after the last block
        num_classes=0,
        neck=0,
        remat=False,
    )
    check_attention("the teacher", cut)
    return cut


def untrained(model: config.ViT, block: int) -> tuple[str, ...]:
    """Regexes of what lies behind q, k, v of `block`, and of positions that are fixed."""
    later = [f"encoder/block{i}/.*" for i in range(block + 1, model.depth + 1)]
    fixed = ["encoder/pos_embed"] if model.posembed == "fixed" else []
    head = ["encoder/(fc_norm|head)/.*"] if model.num_classes else []
    return (f"encoder/block{block}/(attn/proj|norm2|mlp)/.*", *later, "encoder/norm/.*", *head, *fixed)
