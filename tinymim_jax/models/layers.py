"""The parts of a transformer block, as the paper draws them.

Shapes: B batch, N tokens incl. CLS, L patch tokens, D width, H heads, E head width, C classes, P values per patch.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

xavier = nn.initializers.xavier_uniform()


@flax.struct.dataclass
class BlockTrace:
    """What one block computed. attn_out and mlp_out are taken before their shortcut is added."""

    q: jax.Array  # [B, N, H, E]
    k: jax.Array  # [B, N, H, E]
    v: jax.Array  # [B, N, H, E]
    attn_out: jax.Array  # [B, N, D]
    mlp_out: jax.Array  # [B, N, D]
    out: jax.Array  # [B, N, D]


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """[B, H, W, 3] -> [B, L, P], P ordered (row, column, channel) as in MAE."""
    b, h, w, c = images.shape
    p = patch_size
    x = images.reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3)
    return x.reshape(b, (h // p) * (w // p), p * p * c)


def layer_norm(dtype: jnp.dtype, name: str | None = None) -> nn.LayerNorm:
    """eps 1e-6, statistics in float32 and in two passes, as torch has them."""
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(E)) v on [B, H, N, E], softmax in float32.

    Heads out front make both products plain batched matmuls, which XLA on the CPU runs fastest.
    """
    logits = jnp.einsum("bhne,bhme->bhnm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jnp.einsum("bhnm,bhme->bhne", jax.nn.softmax(logits).astype(v.dtype), v)


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv kernel [D, 3, H, E]."""

    num_heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        """[B, N, D] -> output [B, N, D] and (q, k, v), each [B, N, H, E]."""
        b, n, d = x.shape
        heads = (3, self.num_heads, d // self.num_heads)
        # Tokens flattened: the gradient of a plain [B*N, D] matmul is the fast one.
        qkv = nn.DenseGeneral(heads, kernel_init=xavier, dtype=self.dtype, name="qkv")(x.reshape(b * n, d))
        q, k, v = jnp.moveaxis(qkv.reshape(b, n, *heads), (2, 3), (0, 2))  # each [B, H, N, E]
        out = attention(q, k, v).swapaxes(1, 2).reshape(b * n, d)
        out = nn.Dense(d, kernel_init=xavier, dtype=self.dtype, name="proj")(out).reshape(b, n, d)
        return out, (q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2))


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        b, n, d = x.shape
        h = nn.Dense(self.hidden, kernel_init=xavier, dtype=self.dtype, name="fc1")(x.reshape(b * n, d))
        h = nn.gelu(h, approximate=False)
        return nn.Dense(d, kernel_init=xavier, dtype=self.dtype, name="fc2")(h).reshape(b, n, d)


class Block(nn.Module):
    """A pre-norm transformer block; `drop_path` drops each residual branch per sample."""

    num_heads: int
    hidden: int
    drop_path: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, BlockTrace]:
        """[B, N, D] -> output [B, N, D] and everything on the way."""
        drop = nn.Dropout(self.drop_path, broadcast_dims=(1, 2), rng_collection="drop_path", deterministic=not train)
        attn_out, (q, k, v) = Attention(self.num_heads, self.dtype, name="attn")(layer_norm(self.dtype, "norm1")(x))
        x = x + drop(attn_out)
        mlp_out = Mlp(self.hidden, self.dtype, name="mlp")(layer_norm(self.dtype, "norm2")(x))
        x = x + drop(mlp_out)
        return x, BlockTrace(q, k, v, attn_out, mlp_out, x)
