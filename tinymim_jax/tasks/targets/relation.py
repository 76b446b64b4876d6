"""Token relations of one block: softmaxed products of q, k, v, matched by KL (TinyMIM section 3.1.2, Eq. 5 and 9)."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from tinymim_jax.models.contract import BlockTrace, Encoder, Part
from tinymim_jax.objectives import relations
from tinymim_jax.objectives.relation_kl import relation_kl
from tinymim_jax.objectives.relation_mse import relation_mse
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.targets.contract import Pass, Target, TargetLoss


@dataclasses.dataclass
class Relation(Target):
    """Relations of the student's block match those of the teacher's, head by head."""

    teacher_block: int = ranged(at_least=1)  # target block, from 1
    student_block: int = ranged(12, at_least=1)  # the block whose q, k, v are matched, from 1
    relations: tuple[Literal["qk", "vv", "qq", "kk"], ...] = ("qk", "vv")
    heads: int | None = ranged(None, at_least=1)  # that the teacher's q, k, v are split into; None: as it was trained
    # That both are split into, whatever they were trained with (MiniLMv2); None: the student's as it was built.
    relation_heads: int | None = ranged(None, at_least=1)
    cls: bool = True  # whether the tokens in front of the patches take part
    temperature: float = ranged(1.0, above=0)  # that products are divided by
    softmax: bool = True  # KL of softmaxed products; False: the mean squared error of the products (Table 7 names none)
    weight: float = ranged(1.0, above=0)
    kernel: Literal["xla", "pallas"] = "xla"  # of the loss on TPU and GPU; pallas has not been measured yet
    kind: Literal["relation"] = "relation"

    def part(self) -> Part:
        return "qkv"

    def build(self, where: str, teacher: Encoder, student: Encoder) -> "RelationLoss":
        return RelationLoss(self, where, teacher, student)

    def summary(self, teacher: Encoder) -> str:
        heads = self.relation_heads or self.heads or teacher.heads_of(self.teacher_block)
        how = "" if self.softmax else " without softmax"
        where = f"block {self.teacher_block} of {teacher.depth}, {heads} heads"
        return f"{'+'.join(self.relations)} relations{how} of {where}"


class RelationLoss(TargetLoss):
    """`Relation` between two encoders; no parameters."""

    def __init__(self, cfg: Relation, where: str, teacher: Encoder, student: Encoder):
        super().__init__(cfg, teacher, student)
        if not cfg.relations or len(set(cfg.relations)) != len(cfg.relations):
            raise InputError(f"{where}.relations {cfg.relations} must name at least one relation, each once")
        if any(model.label_heads > 1 for model in (teacher, student)) or student.num_prefix > 1:
            raise InputError(
                "relations are between CLS and patches; a model with a distillation token has no part in them"
            )
        self.check_tokens(where, cfg.cls)
        self._check_heads(where)

    def _check_heads(self, where: str) -> None:
        if (count := self.cfg.relation_heads) is not None:
            if self.cfg.heads is not None:
                raise InputError(f"{where}: heads splits the teacher, relation_heads both; set one of them")
            sides = ("teacher", self.teacher, self.cfg.teacher_block), ("student", self.student, self.cfg.student_block)
            for who, model, block in sides:
                if (width := model.width_of(block)) % count:
                    raise InputError(f"{where}.relation_heads {count} does not divide {width}, the {who}'s width")
            return
        cfg, trained = self.cfg, self.teacher.heads_of(self.cfg.teacher_block)
        width, heads = self.teacher.width_of(cfg.teacher_block), cfg.heads or trained
        if width % heads:
            raise InputError(
                f"{where}.heads {heads} does not divide {width}, the width of the teacher's block {cfg.teacher_block},"
                f" which was trained with {trained} heads"
            )
        own = self.student.heads_of(cfg.student_block)
        if own != heads:
            raise InputError(
                f"the student's block {cfg.student_block} has {own} heads, the teacher's block {cfg.teacher_block} has"
                f" {heads}; give that block of the student {heads} (model.last_block_heads), or set {where}.heads={own}"
            )

    def read(self, teacher: Pass, student: Pass) -> tuple[BlockTrace, BlockTrace]:
        """The two blocks, the q, k and v of each split into as many heads."""
        cfg, both = self.cfg, self.cfg.relation_heads
        block = self._split(teacher[cfg.teacher_block], both or cfg.heads, self.teacher)
        return block, self._split(student[cfg.student_block], both, self.student)

    def _split(self, block: BlockTrace, heads: int | None, model: Encoder) -> BlockTrace:
        front = 0 if self.cfg.cls else model.num_prefix
        if not heads and not front:
            return block
        parts = {name: getattr(block, name)[:, front:] for name in ("q", "k", "v")}
        return block.replace(**{name: regrouped(x, heads) if heads else x for name, x in parts.items()})

    def pairs(self, teacher: Pass, student: Pass) -> dict[str, list[tuple[jax.Array, jax.Array]]]:
        """By relation, of the teacher and of the student, the two that are related."""
        traces = self.read(teacher, student)
        found = {name: [relations.pair(trace, name) for trace in traces] for name in self.cfg.relations}
        if self.cfg.temperature == 1:
            return found
        share = 1 / self.cfg.temperature  # in float32: bfloat16 would round it, and each product with it
        exact = {name: [[x.astype(jnp.float32) for x in pair] for pair in pairs] for name, pairs in found.items()}
        return {name: [(a * share, b) for a, b in pairs] for name, pairs in exact.items()}

    def loss(self, params: Any, teacher: Pass, student: Pass) -> dict[str, jax.Array]:
        pairs = self.pairs(teacher, student)
        if not self.cfg.softmax:
            return {f"mse_{name}": relation_mse(*pair) for name, pair in pairs.items()}
        return {f"kl_{name}": relation_kl(*pair, kernel=self.cfg.kernel) for name, pair in pairs.items()}

    def maps(self, params: Any, teacher: Pass, student: Pass, query: int) -> dict[str, tuple[jax.Array, jax.Array]]:
        """A row of each relation, mean over heads."""
        fronts = [0 if self.cfg.cls else model.num_prefix for model in (self.teacher, self.student)]

        def row(related: tuple[jax.Array, jax.Array], front: int) -> jax.Array:
            of_query = relations.relation(*related).mean(axis=1)[:, query - fronts[1]]
            return jnp.pad(of_query, ((0, 0), (front, 0)))

        pairs = self.pairs(teacher, student)
        how = "" if self.cfg.softmax else ", softmaxed here"
        return {f"{name.upper()}{how}": tuple(map(row, both, fronts)) for name, both in pairs.items()}

    def sides(self, teacher: Encoder) -> tuple[str, str]:
        cfg, trained = self.cfg, teacher.heads_of(self.cfg.teacher_block)
        read, mine = cfg.relation_heads or cfg.heads or trained, self.student.heads_of(cfg.student_block)
        heads = f"mean of {read} heads" + ("" if read == trained else f"\nsplit from {trained}")
        own = f"mean of {cfg.relation_heads or mine} heads"
        blocks = super().sides(teacher)
        return f"{blocks[0]}\n{heads}", f"{blocks[1]}\n{own}"

    def flops(self, patches: int) -> float:
        n = patches + (self.student.num_prefix if self.cfg.cls else 0)
        widths = self.teacher.width_of(self.cfg.teacher_block) + 3 * self.student.width_of(self.cfg.student_block)
        return len(self.cfg.relations) * 2.0 * n * n * widths


def regrouped(x: jax.Array, heads: int) -> jax.Array:
    """[B, N, H, E] -> the same channels as [B, N, heads, H E / heads]."""
    return x.reshape(*x.shape[:2], heads, -1)
