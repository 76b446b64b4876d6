"""The contract of targets: what each reads of teacher and student, its own parameters, and its loss."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.struct
import jax
import numpy as np

from tinymim_jax.data.config import Data
from tinymim_jax.models.contract import PARTS, BlockTrace, Encoder, Part
from tinymim_jax.runtime.errors import InputError

Trace = Mapping[int, BlockTrace]  # of the captured blocks


@dataclasses.dataclass(frozen=True)
class Captures:
    """What is read of one encoder: its blocks, from 1, up to which part of the last of them, which of them normed."""

    blocks: tuple[int, ...] = ()
    part: Part = "all"
    normed: tuple[int, ...] = ()  # blocks whose output is read through the norm that stands behind the last one

    @classmethod
    def merged(cls, captures: list["Captures"]) -> "Captures":
        """All that several read."""
        blocks = tuple(sorted({block for one in captures for block in one.blocks}))
        parts = [one.part for one in captures if one.blocks and one.blocks[-1] == blocks[-1]]
        normed = tuple(sorted({block for one in captures for block in one.normed}))
        return cls(blocks, max(parts, key=PARTS.index, default="all"), normed)


@flax.struct.dataclass
class Pass:
    """What one encoder computed of a batch; indexed by a block, from 1, its trace."""

    trace: Trace
    images: jax.Array | None = None  # [B, S, S, 3], normalised; all of what it saw a part of
    restore: jax.Array | None = None  # [B, L], of `models.mae.mask_by_noise`; None: nothing was masked
    is_masked: jax.Array | None = None  # [B, L]

    def __getitem__(self, block: int) -> BlockTrace:
        return self.trace[block]


class TargetLoss(abc.ABC):
    """A target between two given encoders; `teacher` goes up to the last block that is read."""

    fixed: tuple[str, ...] = ()  # regexes of own parameters that are never trained
    of_query = True  # whether its maps are of one patch; else of the class token

    def __init__(self, cfg: Any, teacher: Encoder, student: Encoder):
        self.cfg, self.teacher, self.student = cfg, teacher, student

    def check_tokens(self, where: str, front: bool = True) -> None:
        """Raises InputError if a token of one has no counterpart in the other; without `front`, a patch's."""
        theirs, own = ((front * model.num_prefix, model.grid) for model in (self.teacher, self.student))
        if theirs != own:
            raise InputError(
                f"{where}: teacher and student differ in their tokens, so no token has a counterpart: the teacher has"
                f" {theirs[0]} in front of a grid of side {theirs[1]}, the student {own[0]} and {own[1]}"
            )
        sides = (self.teacher, self.cfg.teacher_block), (self.student, self.cfg.student_block)
        for who, (model, block) in zip(("teacher", "student"), sides, strict=True):
            if model.grid_of(block) != model.grid:
                raise InputError(
                    f"{where}: block {block} of the {who} attends within windows, or to finer tokens than it puts out;"
                    " choose a later one"
                )

    def init(self, rng: jax.Array) -> Any:
        """Its own parameters, which lie under pretext/<its name>; {} if it has none."""
        return {}

    @abc.abstractmethod
    def loss(self, params: Any, teacher: Pass, student: Pass) -> dict[str, jax.Array]:
        """Terms [B] by name, whose sum is the loss of each image."""

    def maps(self, params: Any, teacher: Pass, student: Pass, query: int) -> dict[str, tuple[jax.Array, jax.Array]]:
        """For a picture: by name, how token `query` relates to each, [B, N], in the teacher and in the student."""
        return {}

    def pictures(self, params: Any, student: Pass, images: np.ndarray, data: Data) -> dict[str, np.ndarray]:
        """By name, pictures [B, S, S, 3] of what it makes of `images`, in [0, 1], of which the student saw a part."""
        return {}

    def sides(self, teacher: Encoder) -> tuple[str, str]:
        """For a picture: which block is read of `teacher`, whole, and of the student, and its heads if they matter."""
        blocks = (self.cfg.teacher_block, teacher), (self.cfg.student_block, self.student)
        return tuple(f"block {block} of {model.depth}" for block, model in blocks)

    @abc.abstractmethod
    def flops(self, patches: int) -> float:
        """Matmul FLOPs of one image of which `patches` are seen, forward and backward."""


class Target(abc.ABC):
    """The config of a target, a dataclass with a `kind` that `targets.TARGETS` lists."""

    kind: str
    weight: float  # of its loss in the sum
    needs_mask: ClassVar[bool] = False  # whether patches have to be hidden

    def part(self) -> Part:
        """Up to where it reads the two blocks."""
        return "all"

    def captures(self) -> tuple[Captures, Captures]:
        """What it reads of the teacher and of the student: of one that has no such fields, to be written by itself."""
        return Captures((self.teacher_block,), self.part()), Captures((self.student_block,), self.part())

    @abc.abstractmethod
    def build(self, where: str, teacher: Encoder, student: Encoder) -> TargetLoss:
        """The loss; raises InputError, naming fields by `where`, if the two do not fit together."""

    @abc.abstractmethod
    def summary(self, teacher: Encoder) -> str:
        """What is matched, in a few words."""
