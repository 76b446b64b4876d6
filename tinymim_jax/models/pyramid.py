"""Maps at four strides, made of the patches of four blocks: what stands between an encoder and dense heads.

Shapes: B batch, g patches a side, D width, C channels.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinymim_jax.models import layers
from tinymim_jax.models.batch_norm import BatchNorm
from tinymim_jax.models.contract import Encoder
from tinymim_jax.models.torch_ops import Conv, UpConv, max_pool2
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError

LEVELS = 4


@dataclasses.dataclass
class Pyramid:
    """A map of a quarter, half, once and twice the patches' size a pixel, each of another block's patches."""

    width: int | None = ranged(None, at_least=1)  # channels of each map; None: the encoder's, as TinyMIM has it
    hidden: int | None = ranged(None, at_least=1)  # between the two deconvolutions of the finest map; None: width
    # 0: the coarsest map is pooled by the maximum; else it is a convolution of stride 2 on a norm, a linear layer of so
    # many channels and GELU, which are the neck of TinyMIM*-T's classifier (1280)
    fc: int = ranged(0, at_least=0)
    kind: Literal["pyramid"] = "pyramid"

    def build(self, dtype: str) -> "FeaturePyramid":
        """The module; `apply(variables, taps, train) -> maps`."""
        return FeaturePyramid(self.width, self.hidden, self.fc, jnp.dtype(dtype))

    def check(self, where: str, encoder: Encoder) -> None:
        """Raises InputError, naming fields by `where`, if it cannot stand behind `encoder`."""
        if self.width is None and (self.hidden or self.fc):
            raise InputError(f"{where}: hidden and fc need a width; set width, e.g. to {encoder.width_of(1)}")
        if encoder.grid < 2:
            raise InputError(
                f"{where}: the coarsest map has half the encoder's {encoder.grid} patches a side, which is none; use"
                " larger images or smaller patches"
            )

    def check_blocks(self, where: str, encoder: Encoder, blocks: Sequence[int]) -> None:
        """Raises InputError unless `blocks`, the field `where`, are four of the encoder's, the finest map's first."""
        if len(blocks) != LEVELS or list(blocks) != sorted(set(blocks)) or blocks[0] < 1 or blocks[-1] > encoder.depth:
            raise InputError(
                f"{where} is {tuple(blocks)}; a pyramid is made of {LEVELS} blocks in order, of 1 to {encoder.depth}"
            )

    def channels(self, width: int) -> int:
        """Of each map, behind an encoder of that width."""
        return self.width or width

    def flops(self, grid: int, width: int) -> float:
        """Matmul FLOPs of one image's forward pass."""
        c, patches = self.channels(width), grid**2
        hidden = self.hidden or c
        ups = 8.0 * patches * (width * hidden + 4 * hidden * c + width * c)
        if self.width is None:
            return ups
        last = width * self.fc + 9 * self.fc * c / 4 if self.fc else width * c
        return ups + 2.0 * patches * (width * c + last)


def sides(grid: int) -> tuple[int, ...]:
    """Pixels a side of each map, finest first."""
    return 4 * grid, 2 * grid, grid, grid // 2


class FeaturePyramid(nn.Module):
    """What a `Pyramid` describes (TinyMIM, Segmentation/*/backbone/mae.py; MAE-Lite, projects/eval_tools/seg)."""

    width: int | None
    hidden: int | None
    fc: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, taps: Sequence[jax.Array], train: bool) -> list[jax.Array]:
        """Four taps [B, g, g, D] -> maps [B, 4 g, 4 g, C], [B, 2 g, 2 g, C], [B, g, g, C], [B, g / 2, g / 2, C]."""
        first, second, third, fourth = (tap.astype(self.dtype) for tap in taps)
        width = self.width or first.shape[-1]
        x = UpConv(self.hidden or width, self.dtype, name="level1_up1")(first)
        x = layers.gelu(BatchNorm(affine=True, name="level1_norm")(x, train))
        maps = [UpConv(width, self.dtype, name="level1_up2")(x), UpConv(width, self.dtype, name="level2_up")(second)]
        if self.width is None:
            return [*maps, third, max_pool2(fourth)]
        maps.append(Conv(width, self.dtype, name="level3_conv")(third))
        if self.fc:
            x = layers.layer_norm(self.dtype, "fc_norm", 1e-5)(fourth)
            x = layers.gelu(nn.Dense(self.fc, kernel_init=layers.normal, dtype=self.dtype, name="fc")(x))
            return [*maps, Conv(width, self.dtype, 3, 2, name="level4_conv")(x)]
        return [*maps, max_pool2(Conv(width, self.dtype, name="level4_conv")(fourth))]
