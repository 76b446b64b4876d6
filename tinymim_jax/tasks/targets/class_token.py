"""The class token, as a distribution over channels (TinyMIM section 3.1.1, Eq. 6, Table 5).

How a token becomes a distribution, and how widths meet, is not published: here the student's goes through a norm and a
linear layer to the teacher's width, and softmax is over channels on both sides.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinymim_jax.models.contract import Encoder
from tinymim_jax.models.layers import xavier
from tinymim_jax.objectives import relations
from tinymim_jax.objectives.losses import soft_distillation
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.targets.contract import Pass, Target, TargetLoss


@dataclasses.dataclass
class ClassToken(Target):
    """The student's class token matches the teacher's by KL over channels."""

    teacher_block: int = ranged(at_least=1)  # whose output's first token is the target, from 1
    student_block: int = ranged(12, at_least=1)  # from 1
    temperature: float = ranged(1.0, above=0)  # of both; the loss is scaled by its square
    weight: float = ranged(1.0, above=0)
    kind: Literal["class_token"] = "class_token"

    def build(self, where: str, teacher: Encoder, student: Encoder) -> "ClassTokenLoss":
        return ClassTokenLoss(self, where, teacher, student)

    def summary(self, teacher: Encoder) -> str:
        return f"class token of block {self.teacher_block} of {teacher.depth}"


class ClassTokenLoss(TargetLoss):
    """`ClassToken` between two encoders; its parameters are a norm's and a linear layer's."""

    of_query = False

    def __init__(self, cfg: ClassToken, where: str, teacher: Encoder, student: Encoder):
        super().__init__(cfg, teacher, student)
        for who, model in (("teacher", teacher), ("student", student)):
            if not model.num_prefix:
                raise InputError(f"{where}: the {who} ({model.kind}) has no class token; choose another target")
        self.norm = nn.LayerNorm(epsilon=student.layer_norm_eps, use_fast_variance=False)
        self.projection = nn.Dense(teacher.width_of(cfg.teacher_block), kernel_init=xavier)

    def init(self, rng: jax.Array) -> Any:
        like = jnp.zeros((1, self.student.width_of(self.cfg.student_block)))
        modules = {"norm": self.norm, "projection": self.projection}
        return {name: module.init(rng, like)["params"] for name, module in modules.items()}

    def projected(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Tokens of the student, [B, N, D], in the teacher's width, [B, N, C], float32."""
        own = self.norm.apply({"params": params["norm"]}, tokens.astype(jnp.float32))
        return self.projection.apply({"params": params["projection"]}, own)

    def loss(self, params: Any, teacher: Pass, student: Pass) -> dict[str, jax.Array]:
        target = teacher[self.cfg.teacher_block].out[:, 0]
        own = self.projected(params, student[self.cfg.student_block].out[:, :1])[:, 0]
        return {"kl_cls": own.shape[-1] * soft_distillation(own, target, self.cfg.temperature)}

    def maps(self, params: Any, teacher: Pass, student: Pass, query: int) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Cosine similarities of all tokens with the class token."""
        target = teacher[self.cfg.teacher_block].out.astype(jnp.float32)
        own = self.projected(params, student[self.cfg.student_block].out)
        return {"like CLS": (relations.cosine(target, 0), relations.cosine(own, 0))}

    def flops(self, patches: int) -> float:
        return 6.0 * self.student.width_of(self.cfg.student_block) * self.teacher.width_of(self.cfg.teacher_block)
