"""Hiera: a hierarchical vision transformer of plain blocks (Ryali et al. 2023; MAE-Lite's Tiny is 46 wide).

Tokens of 4 x 4 pixels (`stride`) lie in units of 8 x 8, which is what a mask hides. A unit is a window of attention in
the first two stages, and loses three quarters of its tokens where a stage begins with pooled queries. Units stay an
axis of their own: no order of tokens has to be known to find a window.

Shapes: B batch, U units seen, s tokens a side of a unit, D width, H heads, E head width.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinymim_jax.models import layers
from tinymim_jax.models.contract import BlockTrace, Encoder, EncoderOutput, Part
from tinymim_jax.models.hiera_blocks import UNIT, HieraBlock, PatchEmbed, UnitConv, norm
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError

WINDOWED = 2  # stages whose attention stays within units; the first block of the next one does, too


@dataclasses.dataclass(unsafe_hash=True)
class Hiera(Encoder):
    """A hierarchical vision transformer, whose width and heads double with each stage."""

    width: int = ranged(at_least=1)  # of the first stage
    stages: tuple[int, ...] = ranged((1, 2, 7, 2), at_least=1)  # blocks of each
    num_heads: int = ranged(1, at_least=1)  # of the first stage
    image_size: int = ranged(224, at_least=1)  # pixels a side
    stride: int = ranged(4, at_least=1)  # pixels a side of a first token, seen by a convolution 2 stride - 1 wide
    q_pool: int = ranged(3, at_least=0, at_most=3)  # stages behind the first that pool queries; an auto-encoder's: 2
    fusion: bool = False  # maps of the stages, equally fine, are added up and normalised, as an auto-encoder has it
    num_classes: int = ranged(0, at_least=0)  # 0: no head
    layer_norm_eps: float = ranged(1e-6, above=0)  # of every norm
    drop_path: float = ranged(0.0, at_least=0, below=1)  # stochastic depth, rising with the blocks
    weight_init: Literal["mae", "supervised"] = "mae"  # xavier, biases 0 | normal 0.02, biases 0.02, head a thousandth
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters are float32
    remat: bool = False  # recompute each block in the backward pass
    attention: Literal["xla"] = "xla"
    kind: Literal["hiera"] = "hiera"

    num_prefix: ClassVar[int] = 0

    export_formats: ClassVar[tuple[str, ...]] = ("timm", "hf", "mae")

    @property
    def depth(self) -> int:
        return sum(self.stages)

    @property
    def patch_size(self) -> int:
        return self.stride * 2 ** min(self.q_pool, len(self.stages) - 1)

    @property
    def mask_unit(self) -> int:
        return self.stride * UNIT

    def build(self) -> "HieraTransformer":
        return HieraTransformer(self)

    def check(self, where: str) -> None:
        if self.image_size % self.mask_unit:
            raise InputError(f"{where}: image_size {self.image_size} is not a multiple of its units' {self.mask_unit}")
        if self.width % self.num_heads:
            raise InputError(f"{where}: width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.fusion and self.num_classes:
            raise InputError(f"{where}: fusion is for masked auto-encoding, without num_classes; set one of them only")

    def check_masked(self, where: str) -> None:
        if self.num_classes or not self.fusion:
            raise InputError(f"{where}: mae needs model.fusion, whose maps feed the decoder, and no num_classes")

    def summary(self) -> str:
        blocks = "+".join(map(str, self.stages))
        head = f"{self.num_classes} classes on the mean token" if self.num_classes else "no head"
        fused = ", stages fused" * self.fusion
        return (
            f"Hiera, width {self.width} to {self.width_of(self.depth)}, {blocks} blocks, {self.image_size} px in tokens"
            f" of {self.stride} to {self.patch_size}, {head}{fused}"
        )

    def stage_of(self, block: int) -> int:
        """The stage, from 0, of `block` (from 1)."""
        return next(i for i, end in enumerate(itertools.accumulate(self.stages)) if block <= end)

    def is_first(self, block: int) -> bool:
        """Whether a stage behind the first begins with `block`: its width doubles there."""
        return block > 1 and self.stage_of(block) != self.stage_of(block - 1)

    def is_pooling(self, block: int) -> bool:
        """Whether `block` has pooled queries."""
        return self.is_first(block) and self.stage_of(block) <= self.q_pool

    def is_global(self, block: int) -> bool:
        """Whether attention of `block` is over all tokens, and not within units."""
        return self.stage_of(block - 1 if self.is_first(block) else block) >= WINDOWED

    def grid_of(self, block: int) -> int | None:
        is_whole = self.is_global(block) and not self.is_pooling(block)
        return self.side_of(block) * self.image_size // self.mask_unit if is_whole else None

    def side_of(self, block: int) -> int:
        """Tokens a side of a unit that `block` puts out."""
        return UNIT // 2 ** min(self.stage_of(block), self.q_pool)

    def width_of(self, block: int) -> int:
        return self.width * 2 ** self.stage_of(block)

    def heads_of(self, block: int) -> int:
        return self.num_heads * 2 ** self.stage_of(block)

    def shape_of(self, block: int) -> tuple[int, int, bool, bool, bool]:
        """What tells `block` from others: the first fields of `HieraBlock`."""
        kinds = self.is_first(block), self.is_pooling(block), self.is_global(block)
        return self.width_of(block), self.heads_of(block), *kinds

    def layer_id(self, name: str) -> int:
        if re.fullmatch(r"encoder/(pos_embed|patch_embed/.*)", name):
            return 0
        if block := re.match(r"encoder/block(\d+)/", name):
            return int(block[1])
        if re.fullmatch(r"encoder/(norm|head|fuse\d+)/.*", name):
            return self.depth + 1
        raise InputError(f"a Hiera has no parameter {name}, so no layer for it")

    def is_behind(self, name: str, part: Part) -> bool:
        behind = {"norm1": "attn|shortcut|norm2|mlp", "qkv": "attn/proj|shortcut|norm2|mlp", "attention": "norm2|mlp"}
        return part != "all" and bool(re.match(rf"encoder/block\d+/({behind[part]})/", name))

    def trunk(self, block: int, norm: bool = False) -> "Hiera":
        before = self.stages[: self.stage_of(block)]
        stages = (*before, block - sum(before))
        return dataclasses.replace(self, stages=stages, num_classes=0, fusion=norm and block == self.depth)

    def check_norm(self, where: str) -> None:
        if not self.fusion:
            raise InputError(f"{where}: without model.fusion there is no norm behind the last block; set it to True")

    def is_norm(self, name: str) -> bool:
        return self.fusion and bool(re.match(r"encoder/(norm|fuse\d+)/", name))

    def computing_like(self, other: Encoder) -> "Hiera":
        like = dataclasses.replace(self, image_size=other.image_size, dtype=other.dtype, remat=False)
        like.check("the teacher")
        return like

    def dropping(self, rate: float, where: str) -> "Hiera":
        return dataclasses.replace(self, drop_path=rate)

    def _units(self, patches: int) -> float:
        return patches / self.side_of(self.depth) ** 2

    def embed_flops(self, patches: int) -> float:
        side = self.image_size // self.stride  # of all pixels, hidden ones, too, and of those that the kernel pads
        return 2.0 * side**2 * 3 * (2 * self.stride) ** 2 * self.width

    def block_flops(self, block: int, patches: int, part: Part = "all") -> float:
        units, before, d = self._units(patches), max(block - 1, 1), self.width_of(block)
        seen, out = (units * self.side_of(i) ** 2 for i in (before, block))  # tokens
        d_in = self.width_of(before)
        keys = seen if self.is_global(block) else self.side_of(before) ** 2
        qkv = 6.0 * seen * d_in * d
        attend = 4.0 * out * keys * d + 2.0 * out * d * d + 2.0 * seen * d_in * d * self.is_first(block)
        mlp = 16.0 * out * d * d
        return {"norm1": 0.0, "qkv": qkv, "attention": qkv + attend, "all": qkv + attend + mlp}[part]

    def head_flops(self, patches: int) -> float:
        fused = sum(
            2.0 * patches * self.width_of(end) * (self.side_of(end) // self.side_of(self.depth)) ** 2
            for end in self.fused_blocks()
        )
        return super().head_flops(patches) + fused * self.width_of(self.depth)

    def fused_blocks(self) -> list[int]:
        """The last blocks of the stages whose maps are finer than the last one, if they are fused with it."""
        ends = list(itertools.accumulate(self.stages))
        return [end for end in ends if self.fusion and self.side_of(end) > self.side_of(self.depth)]


class HieraTransformer(nn.Module):
    """What a `Hiera` describes."""

    cfg: Hiera

    @nn.compact
    def __call__(
        self, images: jax.Array, capture: Sequence[int] = (), train: bool = False, keep: jax.Array | None = None
    ) -> EncoderOutput:
        """Encodes normalised images.

        Args:
          images: [B, image_size, image_size, 3] float.
          capture: blocks whose trace is returned; of those that attend within units, q, k and v are [B, U, n, H, E].
          train: drop path on (needs the rng "drop_path").
          keep: [B, U] indices of the units to see; None: all. Tokens are then in order of units, else of rows.
        """
        cfg = self.cfg
        dtype = jnp.dtype(cfg.dtype)
        x = self._embed(images.astype(dtype), keep)
        maps, trace, numbers = [], {}, range(1, cfg.depth + 1)
        kinds = dtype, cfg.weight_init, cfg.layer_norm_eps
        blocks = [HieraBlock(*cfg.shape_of(i), *kinds, parent=None) for i in numbers]
        rates = [cfg.drop_path * (i - 1) / max(cfg.depth - 1, 1) if train else 0.0 for i in numbers]
        for _, group in itertools.groupby(numbers, lambda i: (cfg.stage_of(i), blocks[i - 1])):
            first, *others = group
            own, each = slice(first - 1, first + len(others)), {"remat": cfg.remat, "capture": capture, "first": first}
            x, found = layers.run_blocks(self, blocks[own], x, rates[own] if train else None, **each)
            trace |= {i: self._trace(block, i, keep is None) for i, block in found.items()}
            if first + len(others) in cfg.fused_blocks():
                maps.append(x)
        if cfg.fusion:
            for i, finer in enumerate(maps, 1):
                x += UnitConv(x.shape[2], x.shape[-1], dtype, name=f"fuse{i}")(finer)
            x = norm("norm", *kinds)(x)
        tokens = in_order(x, keep is None)
        if cfg.fusion and cfg.depth in trace:
            trace[cfg.depth] = trace[cfg.depth].replace(normed=tokens)
        if not cfg.num_classes:
            return EncoderOutput(tokens, trace)
        pooled = tokens.astype(jnp.float32).mean(axis=1)
        pooled = norm("norm", jnp.dtype("float32"), *kinds[1:])(pooled)
        init = {"kernel_init": nn.initializers.normal(2e-5), "bias_init": nn.initializers.constant(2e-5)}
        logits = nn.Dense(cfg.num_classes, **init, name="head")(pooled)
        return EncoderOutput(tokens, trace, (), logits, (logits,))

    def _embed(self, images: jax.Array, keep: jax.Array | None) -> jax.Array:
        """[B, U, 8, 8, D] of the units that are seen, whose neighbours are black to the convolution if they are not."""
        cfg = self.cfg
        b, units, side = len(images), cfg.image_size // cfg.mask_unit, cfg.image_size // cfg.stride
        if keep is not None:
            seen = jax.nn.one_hot(keep, units**2, dtype=images.dtype).sum(axis=1).reshape(b, units, 1, units, 1, 1)
            cut = images.reshape(b, units, cfg.mask_unit, units, cfg.mask_unit, 3)
            images = (cut * seen).reshape(images.shape)
        x = PatchEmbed(cfg.width, cfg.stride, images.dtype, cfg.weight_init, name="patch_embed")(images)
        pos = self.param("pos_embed", layers.normal, (1, side**2, cfg.width)).astype(images.dtype)
        x = x + pos.reshape(1, side, side, cfg.width)
        x = x.reshape(b, units, UNIT, units, UNIT, cfg.width).swapaxes(2, 3).reshape(b, units**2, UNIT, UNIT, cfg.width)
        return x if keep is None else jnp.take_along_axis(x, keep[..., None, None, None], axis=1)

    def _trace(self, found: BlockTrace, block: int, of_rows: bool) -> BlockTrace:
        """With tokens as one axis, `q`, `k` and `v` within units [B, U, tokens, H, E]."""
        names = [field.name for field in dataclasses.fields(found) if getattr(found, field.name) is not None]
        within = () if self.cfg.is_global(block) else ("q", "k", "v")
        parts = {name: getattr(found, name) for name in names}
        return BlockTrace(**{
            name: x.reshape(*x.shape[:2], -1, *x.shape[4:]) if name in within else in_order(x, of_rows)
            for name, x in parts.items()
        })  # fmt: skip


def in_order(x: jax.Array, of_rows: bool) -> jax.Array:
    """[B, U, s, s, ...] -> [B, N, ...] in the order of units, or of the rows of all units."""
    b, u, s, _, *rest = x.shape
    if of_rows:
        grid = round(u**0.5)
        x = x.reshape(b, grid, grid, s, s, *rest).swapaxes(2, 3)
    return x.reshape(b, u * s * s, *rest)
