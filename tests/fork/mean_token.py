"""A fork's target, whole: the mean patch token of a block. It becomes tinymim_jax/tasks/targets/mean_token.py."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinymim_jax.models.contract import Encoder
from tinymim_jax.objectives.losses import smooth_l1
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.tasks.targets.contract import Pass, Target, TargetLoss


@dataclasses.dataclass
class MeanToken(Target):
    """The student's mean patch token, through a linear projection, matches the teacher's by smooth L1."""

    teacher_block: int = ranged(at_least=1)
    student_block: int = ranged(12, at_least=1)
    weight: float = ranged(1.0, above=0)
    kind: Literal["mean_token"] = "mean_token"

    def build(self, where: str, teacher: Encoder, student: Encoder) -> "MeanTokenLoss":
        return MeanTokenLoss(self, teacher, student)

    def summary(self, teacher: Encoder) -> str:
        return f"mean patch token of block {self.teacher_block} of {teacher.depth}"


class MeanTokenLoss(TargetLoss):
    """`MeanToken` between two encoders; its parameters are the projection's."""

    def __init__(self, cfg: MeanToken, teacher: Encoder, student: Encoder):
        super().__init__(cfg, teacher, student)
        self.widths = student.width_of(cfg.student_block), teacher.width_of(cfg.teacher_block)
        self.projection = nn.Dense(self.widths[1])

    def init(self, rng: jax.Array) -> Any:
        return self.projection.init(rng, jnp.zeros((1, self.widths[0])))["params"]

    def tokens(self, teacher: Pass, student: Pass) -> tuple[jax.Array, jax.Array]:
        """[B, L, D] of patches, in float32."""
        pairs = (self.teacher, teacher[self.cfg.teacher_block]), (self.student, student[self.cfg.student_block])
        return tuple(trace.out[:, encoder.num_prefix :].astype(jnp.float32) for encoder, trace in pairs)

    def loss(self, params: Any, teacher: Pass, student: Pass) -> dict[str, jax.Array]:
        target, own = (tokens.mean(axis=1, keepdims=True) for tokens in self.tokens(teacher, student))
        return {"smooth_l1": smooth_l1(self.projection.apply({"params": params}, own), target, 1.0)}

    def maps(self, params: Any, teacher: Pass, student: Pass, query: int) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Each token's share in the mean's length."""
        rows = []
        for encoder, tokens in zip((self.teacher, self.student), self.tokens(teacher, student), strict=True):
            share = jnp.einsum("bld,bd->bl", tokens, tokens.mean(axis=1))
            rows.append(jnp.pad(share, ((0, 0), (encoder.num_prefix, 0))))
        return {"share": tuple(rows)}

    def flops(self, patches: int) -> float:
        return 6.0 * self.widths[0] * self.widths[1]
