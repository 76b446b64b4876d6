"""How far a student's token relations are from a teacher's, head by head, and what both look like."""

import dataclasses
import re
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.evals.analysis import Analysis, need_images, variables_of, viewers
from tinymim_jax.evals.contract import Batch, Context, Evaluator, Result, Variables
from tinymim_jax.models.contract import BlockTrace
from tinymim_jax.objectives import relations
from tinymim_jax.objectives.relation_kl import relation_kl
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.weights.handoff import Init

LEVELS = 255  # of a relation map's grey values
HEAD = re.compile(r"(.*)_head(\d+)")  # the name of a metric of one head, from 1


@dataclasses.dataclass(kw_only=True)
class RelationAgreement(Analysis):
    """KL of the student's relations from the teacher's, of each head, on images as in evaluation."""

    teacher: Init
    teacher_block: int = ranged(at_least=1)
    student_block: int = ranged(at_least=1)
    relations: tuple[Literal["qk", "vv", "qq", "kk"], ...] = ("qk", "vv")
    heads: int | None = ranged(None, at_least=1)  # that both are split into; None: as they were trained
    drawn: int = ranged(2, at_least=0)  # images whose maps are kept, of every head
    kind: Literal["relation"] = "relation"

    def build(self, context: Context) -> "Agreement":
        return Agreement(self, context)

    def metrics(self) -> None:
        return None


class Agreement(Evaluator):
    """{"kl_<relation>", "kl_<relation>_head<h>"}; arrays: these, and maps of the first images, teacher and student."""

    def __init__(self, cfg: RelationAgreement, context: Context):
        self.cfg, self.passes = cfg, {"data": cfg.batches(context)}
        self.others = variables_of(context.others)
        self.viewers = viewers(cfg.data, context)
        self.blocks = {"teacher": cfg.teacher_block, "": cfg.student_block}
        heads, tokens = set(), set()
        for field, block in self.blocks.items():
            model = self.viewers[field].model
            who = field or "student"
            if block > model.depth:
                raise InputError(f"relation: {who}_block {block} is beyond the {model.depth} blocks of the {who}")
            if cfg.heads and model.width_of(block) % cfg.heads:
                raise InputError(
                    f"relation: heads {cfg.heads} does not divide {model.width_of(block)}, the {who}'s width"
                )
            heads.add(cfg.heads or model.heads_of(block))
            tokens.add((model.num_prefix, model.grid))
        if len(tokens) > 1:
            raise InputError("relation: teacher and student have other numbers of tokens, so no relations in common")
        if len(heads) > 1:
            counts = " and ".join(map(str, sorted(heads)))
            raise InputError(f"relation: the blocks have {counts} heads; split both into as many: heads=N")

    def update(self, variables: Variables, frozen: Any, others: Mapping[str, Variables], batch: Batch) -> Any:
        """KL summed over images [relations, heads], how many, and the first images with their maps."""
        each, traces = {"": variables, **others}, {}
        for field, block in self.blocks.items():
            traces[field] = self.viewers[field](each[field], batch["image"], (block,)).trace[block]
        pairs = [[self._pair(traces[field], name) for field in self.blocks] for name in self.cfg.relations]
        kl = jnp.stack([_kl_of_heads(*pair) for pair in pairs])
        drawn = [[relations.relation(*(x[: self.cfg.drawn] for x in side)) for side in pair] for pair in pairs]
        maps = jnp.stack([jnp.stack(pair) for pair in drawn], axis=2)  # [2, drawn, relations, H, N, N]
        top = maps.max(axis=(0, -2, -1), keepdims=True)
        shown = jnp.round(LEVELS * maps / top).astype(jnp.uint8)
        is_valid = batch["is_valid"]
        summed = jnp.where(is_valid, kl, 0).sum(axis=-1), is_valid.sum()
        seen = [x[: self.cfg.drawn] for x in (is_valid, batch["image"])]
        return *summed, shown, top[0, ..., 0, 0], *seen

    def _pair(self, trace: BlockTrace, name: str) -> list[jax.Array]:
        both = relations.pair(trace, name)
        return [x.reshape(*x.shape[:2], self.cfg.heads, -1) if self.cfg.heads else x for x in both]

    def finish(self, found: Mapping[Hashable, list[Any]]) -> Result:
        sums, counts, maps, tops, is_valid, images = zip(*found["data"], strict=True)
        need_images("relation", sum(counts))
        kl, shown = np.sum(sums, axis=0) / sum(counts), is_valid[0]
        arrays = {
            "kind": self.cfg.kind,
            "kl": kl[None],
            "relations": self.cfg.relations,
            "blocks": [list(self.blocks.values())],
            "teacher": maps[0][0, shown][:, None],
            "student": maps[0][1, shown][:, None],
            "top": tops[0][shown][:, None],
            "images": images[0][shown],
        }
        means = {f"kl_{name}": float(row.mean()) for name, row in zip(self.cfg.relations, kl, strict=True)}
        of_heads = {
            f"kl_{name}_head{head}": float(value)
            for name, row in zip(self.cfg.relations, kl, strict=True)
            for head, value in enumerate(row, 1)
        }
        return Result(means | of_heads, arrays)


def _kl_of_heads(teacher: list[jax.Array], student: list[jax.Array]) -> jax.Array:
    """[H, B], each head apart."""
    each = [[x[:, :, h : h + 1] for x in (*teacher, *student)] for h in range(student[0].shape[2])]
    return jnp.stack([relation_kl((tq, tk), (q, k)) for tq, tk, q, k in each])
