"""The contract of targets: what each reads of teacher and student, its own parameters, and its loss."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax

from tinymim_jax.models.contract import BlockTrace, Encoder

Trace = Mapping[int, BlockTrace]  # of the captured blocks


@dataclasses.dataclass(frozen=True)
class Captures:
    """What is read of one encoder: its blocks, from 1; `qkv_only` if nothing but q, k and v of them is."""

    blocks: tuple[int, ...]
    qkv_only: bool = False


class TargetLoss(Protocol):
    """A target between two given encoders."""

    def init(self, rng: jax.Array) -> Any:
        """Its own parameters, which lie under pretext/<its name>; {} if it has none."""

    def loss(self, params: Any, teacher: Trace, student: Trace) -> dict[str, jax.Array]:
        """Terms [B] by name, whose sum is the loss of each image."""

    def maps(self, params: Any, teacher: Trace, student: Trace, query: int) -> dict[str, tuple[jax.Array, jax.Array]]:
        """For a picture: by name, how token `query` relates to each, [B, N], in the teacher and in the student."""

    def sides(self, teacher: Encoder) -> tuple[str, str]:
        """For a picture: which block is read of `teacher`, whole, and of the student, and its heads if they matter."""

    def flops(self) -> float:
        """Matmul FLOPs of one image, forward and backward."""


class Target(abc.ABC):
    """The config of a target, a dataclass with a `kind` that `targets.TARGETS` lists."""

    kind: str
    weight: float  # of its loss in the sum

    @abc.abstractmethod
    def captures(self) -> tuple[Captures, Captures]:
        """What it reads of the teacher and of the student."""

    @abc.abstractmethod
    def build(self, where: str, teacher: Encoder, student: Encoder) -> TargetLoss:
        """The loss; raises InputError, naming fields by `where`, if the two do not fit together."""

    @abc.abstractmethod
    def summary(self, teacher: Encoder) -> str:
        """What is matched, in a few words."""
