"""Features of one block, projected and matched (TinyMIM section 3.1.1, Eq. 7 and 8, Table 6)."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinymim_jax.models.contract import PARTS, BlockTrace, Encoder, Part
from tinymim_jax.models.layers import xavier
from tinymim_jax.objectives import losses, relations
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.targets.contract import Captures, Pass, Target, TargetLoss

NAMES = {
    "out": "output",
    "mlp_out": "FFN without shortcut",
    "mid": "attention with shortcut",
    "attn_out": "attention without shortcut",
    "q": "Q",
    "k": "K",
    "v": "V",
    "norm1": "input behind the first norm",
    "normed": "output behind the encoder's norm",
}


@dataclasses.dataclass
class Feature(Target):
    """The student's tensors, each through a linear projection, match the teacher's, each through a norm.

    MAE-Lite's hidden states (mae_lite_distill_exp.py): norm1 of the next block, or of the last one normed; loss="mse",
    bias=False and norm=False.
    """

    teacher_block: int = ranged(at_least=1)  # target block, from 1
    student_block: int = ranged(12, at_least=1)  # from 1
    # Of the block: its output, FFN and attention before the shortcut, attention behind it, all heads of q, k, v, what
    # these are made of; its output behind the norm at the encoder's end. Losses of several are summed.
    tensors: tuple[Literal["out", "mlp_out", "mid", "attn_out", "q", "k", "v", "norm1", "normed"], ...] = ("out",)
    loss: Literal["smooth_l1", "mse"] = "smooth_l1"
    beta: float = ranged(2.0, above=0)  # of smooth L1
    norm: bool = True  # whether the teacher's go through a LayerNorm without parameters
    bias: bool = True  # of the projections
    weight: float = ranged(1.0, above=0)
    kind: Literal["feature"] = "feature"

    def part(self) -> Part:
        parts = {"norm1": "norm1", "q": "qkv", "k": "qkv", "v": "qkv", "attn_out": "attention", "mid": "attention"}
        return max((parts.get(name, "all") for name in self.tensors), key=PARTS.index, default="all")

    def captures(self) -> tuple[Captures, Captures]:
        sides = super().captures()
        return tuple(dataclasses.replace(side, normed=side.blocks * ("normed" in self.tensors)) for side in sides)

    def build(self, where: str, teacher: Encoder, student: Encoder) -> "FeatureLoss":
        return FeatureLoss(self, where, teacher, student)

    def summary(self, teacher: Encoder) -> str:
        return f"{', '.join(NAMES[name] for name in self.tensors)} of block {self.teacher_block} of {teacher.depth}"


class FeatureLoss(TargetLoss):
    """`Feature` between two encoders; its parameters are the projections', by tensor."""

    def __init__(self, cfg: Feature, where: str, teacher: Encoder, student: Encoder):
        super().__init__(cfg, teacher, student)
        if not cfg.tensors or len(set(cfg.tensors)) != len(cfg.tensors):
            raise InputError(f"{where}.tensors {cfg.tensors} must name at least one of {', '.join(NAMES)}, each once")
        self.check_tokens(where)
        width = teacher.width_of(cfg.teacher_block)
        self.projection = nn.Dense(width, cfg.bias, kernel_init=xavier, dtype=jnp.dtype(student.dtype))

    def init(self, rng: jax.Array) -> Any:
        like = jnp.zeros((1, self.student.width_of(self.cfg.student_block)))
        pairs = zip(self.cfg.tensors, jax.random.split(rng, len(self.cfg.tensors)), strict=True)
        return {name: self.projection.init(key, like)["params"] for name, key in pairs}

    def matched(self, params: Any, teacher: Pass, student: Pass, name: str) -> tuple[jax.Array, jax.Array]:
        """What the student's tokens become, and what they shall, [B, N, C] each."""
        target = tensor(teacher[self.cfg.teacher_block], name).astype(jnp.float32)
        if self.cfg.norm:
            norm = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, use_fast_variance=False)
            target = norm.apply({}, target)
        own = tensor(student[self.cfg.student_block], name)
        return self.projection.apply({"params": params[name]}, own), target

    def loss(self, params: Any, teacher: Pass, student: Pass) -> dict[str, jax.Array]:
        options = {"beta": self.cfg.beta} if self.cfg.loss == "smooth_l1" else {}
        error = {"smooth_l1": losses.smooth_l1, "mse": losses.mse}[self.cfg.loss]
        prefix = {name: f"{name}_" if len(self.cfg.tensors) > 1 else "" for name in self.cfg.tensors}
        return {
            f"{prefix[name]}{self.cfg.loss}": error(*self.matched(params, teacher, student, name), **options)
            for name in self.cfg.tensors
        }

    def maps(self, params: Any, teacher: Pass, student: Pass, query: int) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Cosine similarities."""
        pairs = {name: self.matched(params, teacher, student, name) for name in self.cfg.tensors}
        of = {name: f" of {name}" if len(pairs) > 1 else "" for name in pairs}
        return {
            f"cosine{of[name]}": (relations.cosine(target, query), relations.cosine(own, query))
            for name, (own, target) in pairs.items()
        }

    def flops(self, patches: int) -> float:
        widths = self.student.width_of(self.cfg.student_block) * self.teacher.width_of(self.cfg.teacher_block)
        return len(self.cfg.tensors) * 6.0 * (patches + self.student.num_prefix) * widths


def tensor(block: BlockTrace, name: str) -> jax.Array:
    """[B, N, D]: one of a block's tensors, q, k and v with all their heads."""
    found = getattr(block, name)
    return found.reshape(*found.shape[:2], -1)
