"""Heads that give each place of a map its logits (UPerNet, Semantic-FPN, FCN as mmseg has them; a linear layer).

Shapes: B batch, g patches a side, h and w rows and columns, D channels in, C classes.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinymim_jax.models.batch_norm import BatchNorm
from tinymim_jax.models.contract import Encoder
from tinymim_jax.models.pyramid import LEVELS, sides
from tinymim_jax.models.torch_ops import ChannelDropout, Conv, adaptive_average_pool, resize
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError

kaiming = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class SegmentHead(abc.ABC):
    """The config of a head, a dataclass with a `kind`."""

    kind: str
    reads_pyramid: ClassVar[bool] = True  # or the taps of which a pyramid is made

    @abc.abstractmethod
    def build(self, num_classes: int, dtype: str) -> nn.Module:
        """The module; `apply(variables, maps, train) -> logits [B, h, w, C]`, float32; it may need "drop_path"."""

    @abc.abstractmethod
    def check(self, where: str, encoder: Encoder) -> None:
        """Raises InputError, naming fields by `where`, if it cannot stand behind `encoder`."""

    @abc.abstractmethod
    def flops(self, grid: int, width: int, num_classes: int) -> float:
        """Matmul FLOPs of one image's forward pass, on maps of `width` channels; resizing is left out."""


@dataclasses.dataclass
class UPer(SegmentHead):
    """UPerNet: the coarsest map pooled in pyramids, added to the finer ones from top down, all of them fused."""

    width: int = ranged(768, at_least=1)  # channels inside
    bins: tuple[int, ...] = ranged((1, 2, 3, 6), at_least=1)  # a side, of each pooling of the coarsest map
    dropout: float = ranged(0.1, at_least=0, below=1)  # of whole channels, before the classifier
    kind: Literal["uper"] = "uper"

    def build(self, num_classes: int, dtype: str) -> "UPerHead":
        return UPerHead(self.width, self.bins, self.dropout, num_classes, jnp.dtype(dtype))

    def check(self, where: str, encoder: Encoder) -> None:
        if len(set(self.bins)) < len(self.bins):
            raise InputError(f"{where}: bins {self.bins} has a number twice; leave one out")

    def flops(self, grid: int, width: int, num_classes: int) -> float:
        c, (finest, *_, coarsest) = self.width, sides(grid)
        lateral = sum(side**2 for side in sides(grid)[:-1])
        ones = width * (lateral + sum(n**2 for n in self.bins)) + num_classes * finest**2
        pooled = (width + len(self.bins) * c) * coarsest**2
        return 2.0 * c * (ones + 9 * (pooled + c * lateral + LEVELS * c * finest**2))


@dataclasses.dataclass
class Fpn(SegmentHead):
    """Semantic-FPN: each map convolved and doubled until it is as fine as the finest, all of them summed."""

    width: int = ranged(128, at_least=1)  # channels inside
    dropout: float = ranged(0.1, at_least=0, below=1)  # of whole channels, before the classifier
    kind: Literal["fpn"] = "fpn"

    def build(self, num_classes: int, dtype: str) -> "FpnHead":
        return FpnHead(self.width, self.dropout, num_classes, jnp.dtype(dtype))

    def check(self, where: str, encoder: Encoder) -> None:
        """Any encoder will do."""

    def flops(self, grid: int, width: int, num_classes: int) -> float:
        c, areas = self.width, [side**2 for side in sides(grid)]
        later = sum(area * 4**i for level, area in enumerate(areas) for i in range(1, level))  # behind each first one
        return 2.0 * c * (9 * width * sum(areas) + 9 * c * later + num_classes * areas[0])


@dataclasses.dataclass
class Linear(SegmentHead):
    """One linear layer on the patches of the last block, at their own resolution."""

    reads_pyramid: ClassVar[bool] = False
    kind: Literal["linear"] = "linear"

    def build(self, num_classes: int, dtype: str) -> "LinearHead":
        return LinearHead(num_classes, jnp.dtype(dtype))

    def check(self, where: str, encoder: Encoder) -> None:
        """Any encoder will do."""

    def flops(self, grid: int, width: int, num_classes: int) -> float:
        return 2.0 * grid**2 * width * num_classes


@dataclasses.dataclass
class Fcn(SegmentHead):
    """One convolution on one map: an auxiliary head beside another."""

    width: int = ranged(256, at_least=1)  # channels inside
    level: int = 2  # the map it reads, 0 the finest
    dropout: float = ranged(0.1, at_least=0, below=1)  # of whole channels, before the classifier
    kind: Literal["fcn"] = "fcn"

    def build(self, num_classes: int, dtype: str) -> "FcnHead":
        return FcnHead(self.width, self.level, self.dropout, num_classes, jnp.dtype(dtype))

    def check(self, where: str, encoder: Encoder) -> None:
        if not 0 <= self.level < LEVELS:
            raise InputError(f"{where}: there is no level {self.level}; choose one of 0, the finest, to {LEVELS - 1}")

    def flops(self, grid: int, width: int, num_classes: int) -> float:
        return 2.0 * self.width * (9 * width + num_classes) * sides(grid)[self.level] ** 2


class ConvNorm(nn.Module):
    """A convolution without bias, BatchNorm, ReLU (MMCV's ConvModule)."""

    features: int
    dtype: jnp.dtype
    size: int = 3

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, h, w, D] -> [B, h, w, features]."""
        x = Conv(self.features, self.dtype, self.size, use_bias=False, kernel_init=kaiming, name="conv")(x)
        return nn.relu(BatchNorm(affine=True, name="norm")(x, train))


def classify(x: jax.Array, num_classes: int, dtype: jnp.dtype, dropout: float, train: bool) -> jax.Array:
    """Dropout of channels and a linear layer, the caller's `classifier`: logits [B, h, w, C], float32."""
    inits = {"kernel_init": nn.initializers.normal(0.01), "bias_init": nn.initializers.zeros}
    linear = Conv(num_classes, dtype, **inits, out_dtype=jnp.dtype("float32"), name="classifier")
    return linear(ChannelDropout(dropout)(x, train))


class UPerHead(nn.Module):
    """What a `UPer` describes (mmseg, decode_heads/uper_head.py)."""

    width: int
    bins: tuple[int, ...]
    dropout: float
    num_classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], train: bool) -> jax.Array:
        """Maps [B, h, w, D], finest first -> logits [B, h, w, C] of the finest map's size, float32."""

        def conv(x: jax.Array, name: str, size: int = 3) -> jax.Array:
            return ConvNorm(self.width, self.dtype, size, name=name)(x, train)

        def like(x: jax.Array, other: jax.Array) -> jax.Array:
            return resize(x, other.shape[1:3])

        *finer, top = maps
        pooled = [like(conv(adaptive_average_pool(top, n), f"pool{n}", 1), top) for n in self.bins]
        levels = [conv(x, f"lateral{i}", 1) for i, x in enumerate(finer, 1)]
        levels.append(conv(jnp.concatenate([top, *pooled], axis=-1), "bottleneck"))
        for i in reversed(range(len(finer))):
            levels[i] = levels[i] + like(levels[i + 1], levels[i])
        levels[:-1] = [conv(x, f"fpn{i}") for i, x in enumerate(levels[:-1], 1)]
        x = conv(jnp.concatenate([like(x, levels[0]) for x in levels], axis=-1), "fuse")
        return classify(x, self.num_classes, self.dtype, self.dropout, train)


class FpnHead(nn.Module):
    """What an `Fpn` describes (mmseg, decode_heads/fpn_head.py)."""

    width: int
    dropout: float
    num_classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], train: bool) -> jax.Array:
        """Maps [B, h, w, D], finest first -> logits [B, h, w, C] of the finest map's size, float32."""
        total, size = 0, maps[0].shape[1:3]
        for level, x in enumerate(maps):
            for i in range(max(level, 1)):
                x = ConvNorm(self.width, self.dtype, name=f"level{level + 1}_conv{i + 1}")(x, train)
                x = resize(x, (2 * x.shape[1], 2 * x.shape[2])) if level else x
            total = total + resize(x, size)
        return classify(total, self.num_classes, self.dtype, self.dropout, train)


class LinearHead(nn.Module):
    """What a `Linear` describes."""

    num_classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, taps: Sequence[jax.Array], train: bool) -> jax.Array:
        """Taps [B, g, g, D] -> logits [B, g, g, C] of the last one, float32."""
        return classify(taps[-1], self.num_classes, self.dtype, 0.0, train)


class FcnHead(nn.Module):
    """What an `Fcn` describes (mmseg, decode_heads/fcn_head.py)."""

    width: int
    level: int
    dropout: float
    num_classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], train: bool) -> jax.Array:
        """Maps [B, h, w, D] -> logits [B, h, w, C] of one of them, float32."""
        x = ConvNorm(self.width, self.dtype, name="conv1")(maps[self.level], train)
        return classify(x, self.num_classes, self.dtype, self.dropout, train)
