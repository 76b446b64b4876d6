"""Features of one block, matched by smooth L1 (TinyMIM section 3.1.1, Eq. 7 and 8, Table 6)."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinymim_jax.models.contract import Encoder
from tinymim_jax.models.layers import xavier
from tinymim_jax.objectives.losses import smooth_l1
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.targets.contract import Captures, Target, Trace


@dataclasses.dataclass
class Feature(Target):
    """The student's block output, through a linear projection, matches the teacher's, through a norm without affine."""

    teacher_block: int = ranged(at_least=1)  # target block, from 1
    student_block: int = ranged(12, at_least=1)  # from 1
    beta: float = ranged(2.0, above=0)  # of smooth L1
    weight: float = ranged(1.0, above=0)
    kind: Literal["feature"] = "feature"

    def captures(self) -> tuple[Captures, Captures]:
        return Captures((self.teacher_block,)), Captures((self.student_block,))

    def build(self, where: str, teacher: Encoder, student: Encoder) -> "FeatureLoss":
        return FeatureLoss(self, where, teacher, student)

    def summary(self, teacher: Encoder) -> str:
        return f"output of block {self.teacher_block} of {teacher.depth}"


class FeatureLoss:
    """`Feature` between two encoders; its parameters are the projection's."""

    def __init__(self, cfg: Feature, where: str, teacher: Encoder, student: Encoder):
        self.cfg, self.teacher, self.student = cfg, teacher, student
        if (teacher.num_prefix, teacher.grid) != (student.num_prefix, student.grid):
            raise InputError(f"{where}: teacher and student differ in their tokens, so no token has a counterpart")
        width = teacher.width_of(cfg.teacher_block)
        self.projection = nn.Dense(width, kernel_init=xavier, dtype=jnp.dtype(student.dtype))

    def init(self, rng: jax.Array) -> Any:
        return self.projection.init(rng, jnp.zeros((1, self.student.width_of(self.cfg.student_block))))["params"]

    def matched(self, params: Any, teacher: Trace, student: Trace) -> tuple[jax.Array, jax.Array]:
        """What the student's tokens become, and what they shall, [B, N, C] each."""
        target = teacher[self.cfg.teacher_block].out.astype(jnp.float32)
        target = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, use_fast_variance=False).apply({}, target)
        return self.projection.apply({"params": params}, student[self.cfg.student_block].out), target

    def loss(self, params: Any, teacher: Trace, student: Trace) -> dict[str, jax.Array]:
        return {"smooth_l1": smooth_l1(*self.matched(params, teacher, student), self.cfg.beta)}

    def maps(self, params: Any, teacher: Trace, student: Trace, query: int) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Cosine similarities."""

        def similarity(x: jax.Array) -> jax.Array:
            x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
            return jnp.einsum("bc,bnc->bn", x[:, query], x)

        projected, target = self.matched(params, teacher, student)
        return {"cosine": (similarity(target), similarity(projected))}

    def sides(self, teacher: Encoder) -> tuple[str, str]:
        blocks = (self.cfg.teacher_block, teacher), (self.cfg.student_block, self.student)
        return tuple(f"block {block} of {model.depth}" for block, model in blocks)

    def flops(self) -> float:
        n = self.student.grid**2 + self.student.num_prefix
        return 6.0 * n * self.student.width_of(self.cfg.student_block) * self.teacher.width_of(self.cfg.teacher_block)
