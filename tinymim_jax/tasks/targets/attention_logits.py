"""Attention before its softmax, all pairs of tokens (D-MAE: MAE-Lite's mae_lite_distill_exp.py)."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from tinymim_jax.models.contract import Encoder, Part
from tinymim_jax.models.layers import torch_uniform
from tinymim_jax.objectives.losses import mse
from tinymim_jax.objectives.relations import relation_logits
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.targets.contract import Pass, Target, TargetLoss


@dataclasses.dataclass
class AttentionLogits(Target):
    """The student's attention logits, its heads mixed by an adapter, match the teacher's by mean squared error."""

    teacher_block: int = ranged(at_least=1)  # target block, from 1
    student_block: int = ranged(12, at_least=1)  # from 1
    adapter: bool = True  # a learnt matrix over heads, without bias; False: heads are matched one by one
    weight: float = ranged(1.0, above=0)
    kind: Literal["attention_logits"] = "attention_logits"

    def part(self) -> Part:
        return "qkv"

    def build(self, where: str, teacher: Encoder, student: Encoder) -> "AttentionLogitsLoss":
        return AttentionLogitsLoss(self, where, teacher, student)

    def summary(self, teacher: Encoder) -> str:
        return f"attention logits of block {self.teacher_block} of {teacher.depth}"


class AttentionLogitsLoss(TargetLoss):
    """`AttentionLogits` between two encoders; its parameter is the adapter's kernel [student's H, teacher's H]."""

    def __init__(self, cfg: AttentionLogits, where: str, teacher: Encoder, student: Encoder):
        super().__init__(cfg, teacher, student)
        self.check_tokens(where)
        self.heads = student.heads_of(cfg.student_block), teacher.heads_of(cfg.teacher_block)
        if not cfg.adapter and self.heads[0] != self.heads[1]:
            raise InputError(
                f"{where}: the student's block {cfg.student_block} has {self.heads[0]} heads, the teacher's block"
                f" {cfg.teacher_block} has {self.heads[1]}; set {where}.adapter=True, or give both as many"
            )

    def init(self, rng: jax.Array) -> Any:
        return {"kernel": torch_uniform(self.heads[0])(rng, self.heads, jnp.float32)} if self.cfg.adapter else {}

    def logits(self, params: Any, teacher: Pass, student: Pass) -> tuple[jax.Array, jax.Array]:
        """The student's, adapted, and the teacher's, [B, H, N, N], float32."""
        target, own = teacher[self.cfg.teacher_block], student[self.cfg.student_block]
        target, own = (relation_logits(block.q, block.k) for block in (target, own))
        if self.cfg.adapter:
            own = jnp.einsum("bhnm,ht->btnm", own, params["kernel"], precision="highest")
        return own, target

    def loss(self, params: Any, teacher: Pass, student: Pass) -> dict[str, jax.Array]:
        return {"mse_attention": mse(*self.logits(params, teacher, student))}

    def maps(self, params: Any, teacher: Pass, student: Pass, query: int) -> dict[str, tuple[jax.Array, jax.Array]]:
        """A row, mean over heads."""
        own, target = (logits.mean(axis=1)[:, query] for logits in self.logits(params, teacher, student))
        return {"attention": (target, own)}

    def flops(self, patches: int) -> float:
        n = patches + self.student.num_prefix
        widths = self.teacher.width_of(self.cfg.teacher_block) + 3 * self.student.width_of(self.cfg.student_block)
        return 2.0 * n * n * (widths + 3 * self.cfg.adapter * self.heads[0] * self.heads[1])
