"""What a masked auto-encoder has beside its encoder: masks and a small decoder (He et al. 2022, models_mae.py)."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.models import attention, layers, posembed
from tinymim_jax.models.contract import Encoder
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError


@dataclasses.dataclass
class Decoder:
    """The MAE decoder."""

    width: int = ranged(512, at_least=1)
    depth: int = ranged(8, at_least=1)
    num_heads: int = ranged(16, at_least=1)
    mlp_ratio: float = ranged(4.0, above=0)  # hidden width of the MLP over the decoder's
    posembed: Literal["fixed", "trainable"] = "fixed"  # sin-cos table | learnt from random numbers

    @property
    def fixed(self) -> tuple[str, ...]:
        """Regexes of parameters that are never trained."""
        return ("pos_embed",) if self.posembed == "fixed" else ()

    @property
    def hidden(self) -> int:
        return int(self.width * self.mlp_ratio)

    def build(self, encoder: Encoder) -> "PixelDecoder":
        """The module behind `encoder`, whose dtype, attention and eps it shares."""
        return PixelDecoder(self, encoder)

    def check(self, where: str, encoder: Encoder) -> None:
        """Raises InputError if it cannot be built."""
        if self.width % 4 or self.width % self.num_heads:
            raise InputError(f"{where}: width {self.width} must be a multiple of 4 and of its num_heads")
        attention.check(where, encoder.attention, encoder.dtype, self.width, {self.num_heads})

    def flops(self, encoder: Encoder, visible: int) -> float:
        """Matmul FLOPs of one image's forward pass, of which the encoder has seen `visible` patches."""
        patches, d = encoder.grid**2, self.width
        n = patches + encoder.num_prefix
        ends = (visible + encoder.num_prefix) * encoder.width_of(encoder.depth) + patches * 3 * encoder.patch_size**2
        return self.depth * (8.0 * n * d * d + 4.0 * n * n * d + 4.0 * n * d * self.hidden) + 2.0 * d * ends


class PixelDecoder(nn.Module):
    """Mask tokens put back in place, a few narrow blocks, one linear layer to pixels."""

    cfg: Decoder
    encoder: Encoder

    @nn.compact
    def __call__(self, tokens: jax.Array, restore: jax.Array) -> jax.Array:
        """Visible tokens [B, prefix + K, D] and restore [B, L] -> pixels [B, L, P], float32."""
        cfg, encoder, width = self.cfg, self.encoder, self.cfg.width
        dtype, front, eps = jnp.dtype(encoder.dtype), encoder.num_prefix, encoder.layer_norm_eps
        b, num_patches = restore.shape
        grid = round(num_patches**0.5)
        table = posembed.sincos(grid, width, front)
        start = layers.normal if cfg.posembed == "trainable" else lambda *_: jnp.asarray(table)
        pos = self.param("pos_embed", start, table.shape).astype(dtype)
        mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, width)).astype(dtype)
        x = nn.Dense(width, kernel_init=layers.xavier, dtype=dtype, name="embed")(tokens)
        masks = jnp.broadcast_to(mask_token, (b, num_patches - (x.shape[1] - front), width))
        patches = permute(jnp.concatenate([x[:, front:], masks], axis=1), restore)
        x = jnp.concatenate([x[:, :front], patches], axis=1) + pos
        block = layers.Block(cfg.num_heads, cfg.hidden, dtype, encoder.attention, eps=eps, parent=None)
        x, _ = layers.run_blocks(self, [block] * cfg.depth, x)
        x = layers.layer_norm(dtype, "norm", eps)(x[:, front:])
        pred = nn.Dense(3 * encoder.patch_size**2, kernel_init=layers.xavier, dtype=dtype, name="pred")(x)
        return pred.astype(jnp.float32)


def draw_mask(rng: jax.Array, images: int, encoder: Encoder, mask_ratio: float) -> tuple[jax.Array, ...]:
    """`mask_by_noise` of uniform noise for so many images."""
    noise = jax.random.uniform(rng, (images, encoder.units))
    return mask_by_noise(noise, mask_ratio, encoder.unit)


def mask_by_noise(noise: jax.Array, mask_ratio: float, unit: int = 1) -> tuple[jax.Array, jax.Array, jax.Array]:
    """noise [B, U] -> keep [B, K] (K = int(U (1 - ratio))), restore [B, L], is_masked [B, L] bool.

    The units with the smallest noise are kept; the patches of each, `unit` a side, stand together behind each other.
    """
    num_keep = int(noise.shape[1] * (1 - mask_ratio))
    shuffle = jnp.argsort(noise, axis=1)
    restore = jnp.argsort(shuffle, axis=1)
    if unit > 1:
        grid, inside = round(noise.shape[1] ** 0.5), np.arange(unit**2).reshape(unit, 1, unit)
        restore = (unit**2 * restore.reshape(-1, grid, 1, grid, 1) + inside).reshape(len(noise), -1)
    return shuffle[:, :num_keep], restore, restore >= num_keep * unit**2


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array) -> jax.Array:
    """Rows of x [B, L, D] in `order` [B, L], each row once.

    The gradient of a gather is a scatter, which is slow; that of a permutation is the inverse permutation.
    """
    return jnp.take_along_axis(x, order[..., None], axis=1)


permute.defvjp(
    lambda x, order: (permute(x, order), order),
    lambda order, grad: (permute(grad, jnp.argsort(order, axis=1)), None),
)
