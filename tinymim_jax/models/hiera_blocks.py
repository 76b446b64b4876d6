"""The parts of a Hiera, whose tokens lie in units.

Shapes: B batch, U units seen, s tokens a side of a unit, D width, H heads, E head width; S pixels a side.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinymim_jax.models import attention, layers
from tinymim_jax.models.contract import BlockTrace
from tinymim_jax.models.torch_ops import max_pool2

UNIT = 8  # first tokens a side of a unit


class PatchEmbed(nn.Module):
    """A convolution of 2 stride - 1 pixels a side, padded by stride - 1, as one product of matrices."""

    width: int
    stride: int
    dtype: jnp.dtype
    weight_init: str

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, S, S, 3] -> [B, S / stride, S / stride, D]."""
        stride, side = self.stride, 2 * self.stride - 1
        kernel = self.param("kernel", self._init, (side, side, 3, self.width)).astype(self.dtype)
        bias = self.param("bias", layers.torch_uniform(side**2 * 3), (self.width,)).astype(self.dtype)
        b, size, n = len(images), images.shape[1] + stride, images.shape[1] // stride
        x = jnp.pad(images, ((0, 0), (stride, 0), (stride, 0), (0, 0))).reshape(b, n + 1, stride, size, 3)
        x = jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2).reshape(b, n, 2 * stride, n + 1, stride, 3)
        x = jnp.concatenate([x[:, :, :, :-1], x[:, :, :, 1:]], axis=4).swapaxes(2, 3)
        x = jax.lax.optimization_barrier(x.reshape(b * n * n, -1))  # made once, as in `vit`
        kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0))).reshape(-1, self.width)
        return (x @ kernel + bias).reshape(b, n, n, self.width)

    def _init(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        init = layers.xavier if self.weight_init == "mae" else layers.normal
        return init(key, (math.prod(shape[:-1]), shape[-1])).reshape(shape)


class UnitConv(nn.Module):
    """A convolution within units, as large as its stride, that leaves `side` x `side` of each."""

    side: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, U, s, s, D] -> [B, U, side, side, width]."""
        b, u, s, _, d = x.shape
        k, n = s // self.side, self.side
        init = layers.torch_uniform(k * k * d)
        kernel = self.param("kernel", init, (k, k, d, self.width)).astype(self.dtype)
        bias = self.param("bias", init, (self.width,)).astype(self.dtype)
        x = x.reshape(b * u, n, k, n, k, d).swapaxes(2, 3).reshape(-1, k * k * d)
        return (x @ kernel.reshape(-1, self.width) + bias).reshape(b, u, n, n, self.width)


def linear(features: int | tuple[int, ...], name: str, dtype: jnp.dtype, weight_init: str) -> nn.Module:
    """A linear layer, initialised as `Hiera.weight_init` says."""
    is_mae = weight_init == "mae"
    kernel, bias = (layers.xavier, nn.initializers.zeros) if is_mae else (layers.normal, nn.initializers.constant(0.02))
    return nn.DenseGeneral(features, kernel_init=kernel, bias_init=bias, dtype=dtype, name=name)


def norm(name: str, dtype: jnp.dtype, weight_init: str, eps: float) -> nn.Module:
    """A LayerNorm, likewise; statistics in float32 and in two passes, as torch has them."""
    bias = nn.initializers.constant(0.0 if weight_init == "mae" else 0.02)  # the released code sets both alike
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, bias_init=bias, name=name)


class HieraAttention(nn.Module):
    """Attention within units or over all tokens, with one fused kernel [D, 3, H, E] and pooled queries, or not."""

    width: int
    num_heads: int
    is_pooling: bool
    is_global: bool
    dtype: jnp.dtype
    weight_init: str

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """[B, U, s, s, D] -> output [B, U, s', s', width] and q, k, v, [B, U, s or s', s or s', H, E]."""
        b, u, s, _, d = x.shape
        heads = (self.num_heads, self.width // self.num_heads)
        qkv = linear((3, *heads), "qkv", self.dtype, self.weight_init)(x.reshape(-1, d))
        parts = jax.lax.split(qkv.reshape(b * u, s * s, 3, *heads), (1, 1, 1), axis=2)
        q, k, v = (part.squeeze(2) for part in parts)  # [B U, s s, H, E]
        if self.is_pooling:
            q = max_pool2(q.reshape(b * u, s, s, -1)).reshape(b * u, -1, *heads)
            s //= 2
        windows = b if self.is_global else b * u
        folded = (part.reshape(windows, -1, *heads).swapaxes(1, 2) for part in (q, k, v))
        out = attention.attention(*folded).swapaxes(1, 2).reshape(-1, self.width)
        out = linear(self.width, "proj", self.dtype, self.weight_init)(out)
        sides = (s, *x.shape[2:3] * 2)
        each = (part.reshape(b, u, side, side, *heads) for part, side in zip((q, k, v), sides, strict=True))
        return out.reshape(b, u, s, s, self.width), tuple(each)


class HieraBlock(nn.Module):
    """A pre-norm block; where a stage begins, the shortcut is a pooled projection of the norm."""

    width: int  # D that it puts out
    num_heads: int
    is_first: bool  # of a stage behind the first
    is_pooling: bool
    is_global: bool
    dtype: jnp.dtype
    weight_init: str
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array, drop_path: float | jax.Array | None = None) -> tuple[jax.Array, BlockTrace]:
        """[B, U, s, s, D] -> output [B, U, s', s', width] and everything on the way, in the same order."""

        def drop(branch: jax.Array) -> jax.Array:
            if drop_path is None:
                return branch
            is_kept = jax.random.bernoulli(self.make_rng("drop_path"), 1 - drop_path, (len(branch), 1, 1, 1, 1))
            return jnp.where(is_kept, branch / (1 - drop_path), 0).astype(branch.dtype)

        kinds = self.dtype, self.weight_init
        shape = self.width, self.num_heads, self.is_pooling, self.is_global
        norm1 = norm("norm1", *kinds, self.eps)(x)
        attn_out, qkv = HieraAttention(*shape, *kinds, name="attn")(norm1)
        if self.is_first:
            x = linear(self.width, "shortcut", *kinds)(norm1)
            x = max_pool2(x.reshape(-1, *x.shape[2:])).reshape(attn_out.shape) if self.is_pooling else x
        mid = x + drop(attn_out)
        norm2 = norm("norm2", *kinds, self.eps)(mid)
        mlp_out = HieraMlp(self.width, *kinds, name="mlp")(norm2)
        out = mid + drop(mlp_out)
        return out, BlockTrace(norm1, *qkv, attn_out, mid, mlp_out, out)


class HieraMlp(nn.Module):
    """Linear, exact GELU, linear; four times as wide inside."""

    width: int
    dtype: jnp.dtype
    weight_init: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> the same."""
        h = linear(4 * self.width, "fc1", self.dtype, self.weight_init)(x.reshape(-1, self.width))
        return linear(self.width, "fc2", self.dtype, self.weight_init)(layers.gelu(h)).reshape(x.shape)
