"""A fork's encoder, whole: no CLS, and twice the width from the middle on. It becomes tinymim_jax/models/two_widths.py."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinymim_jax.models import layers, posembed
from tinymim_jax.models.contract import Encoder, EncoderOutput, Part
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError


@dataclasses.dataclass(unsafe_hash=True)
class TwoWidths(Encoder):
    """Blocks of width `width`, a linear layer, and as many of twice that; the heads stay as wide as they are."""

    width: int = ranged(at_least=4)
    depth: int = ranged(4, at_least=2)
    num_heads: int = ranged(2, at_least=1)
    image_size: int = ranged(16, at_least=1)
    patch_size: int = ranged(4, at_least=1)
    num_classes: int = ranged(0, at_least=0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    kind: Literal["two_widths"] = "two_widths"

    num_prefix = 0
    fixed = ("encoder/pos_embed",)

    def build(self) -> "TwoWidthsModule":
        return TwoWidthsModule(self)

    def check(self, where: str) -> None:
        if self.depth % 2 or self.width % (4 * self.num_heads) or self.image_size % self.patch_size:
            raise InputError(f"{where}: depth must be even, and width a multiple of 4 times num_heads")

    def summary(self) -> str:
        return f"TwoWidths, {self.depth} blocks of width {self.width} and {2 * self.width}"

    def is_wide(self, block: int) -> bool:
        return block > self.depth // 2

    def width_of(self, block: int) -> int:
        return self.width * (1 + self.is_wide(block))

    def heads_of(self, block: int) -> int:
        return self.num_heads * (1 + self.is_wide(block))

    def layer_id(self, name: str) -> int:
        if re.fullmatch(r"encoder/(pos_embed|patch_embed/.*)", name):
            return 0
        if block := re.match(r"encoder/block(\d+)/", name):
            return int(block[1])
        if name.startswith("encoder/widen/"):
            return self.depth // 2 + 1
        if re.fullmatch(r"encoder/(fc_norm|head)/.*", name):
            return self.depth + 1
        raise InputError(f"there is no parameter {name}")

    def is_behind(self, name: str, part: Part) -> bool:
        behind = {"norm1": "attn|norm2|mlp", "qkv": "attn/proj|norm2|mlp", "attention": "norm2|mlp"}
        return part != "all" and bool(re.match(rf"encoder/block\d+/({behind[part]})/", name))

    def trunk(self, block: int, norm: bool = False) -> "TwoWidths":
        # Its widths hang on its depth, so it is not cut: what nothing reads is not computed under jit.
        return dataclasses.replace(self, num_classes=0)

    def computing_like(self, other: Encoder) -> "TwoWidths":
        return dataclasses.replace(self, image_size=other.image_size, dtype=other.dtype)

    def embed_flops(self, patches: int) -> float:
        return 2.0 * patches * 3 * self.patch_size**2 * self.width

    def block_flops(self, block: int, patches: int, part: Part = "all") -> float:
        n, d = patches, self.width_of(block)
        widen = 2.0 * n * self.width * d if block == self.depth // 2 + 1 else 0.0
        attention = 8.0 * n * d * d + 4.0 * n * n * d
        return widen + {"qkv": 6.0 * n * d * d, "attention": attention, "all": attention + 16.0 * n * d * d}[part]


class TwoWidthsModule(nn.Module):
    """What a `TwoWidths` describes."""

    cfg: TwoWidths

    @nn.compact
    def __call__(self, images: jax.Array, *, capture: Sequence[int] = (), train: bool = False) -> EncoderOutput:
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        table = posembed.sincos(cfg.grid, cfg.width, 0)
        pos = self.param("pos_embed", lambda _: jnp.asarray(table))
        x = nn.Dense(cfg.width, dtype=dtype, name="patch_embed")(layers.patchify(images, cfg.patch_size)) + pos
        trace = {}
        for i in range(1, cfg.depth + 1):
            if cfg.width_of(i) != x.shape[-1]:
                x = nn.Dense(cfg.width_of(i), dtype=dtype, name="widen")(x)
            hidden = 4 * cfg.width_of(i)
            x, found = layers.Block(cfg.heads_of(i), hidden, dtype, "xla", name=f"block{i}")(x)
            if i in capture:
                trace[i] = found
        if not cfg.num_classes:
            return EncoderOutput(x, trace)
        pooled = layers.layer_norm(jnp.float32, "fc_norm")(x.mean(axis=1))
        logits = nn.Dense(cfg.num_classes, name="head")(pooled)
        return EncoderOutput(x, trace, logits=logits, heads=(logits,))
