"""Token relations of one block: maps over pairs of tokens, one per head (TinyMIM Eq. 5 and 9)."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

PAIRS = {"qk": ("q", "k"), "vv": ("v", "v"), "qq": ("q", "q"), "kk": ("k", "k")}


def pair(trace: Any, name: str) -> tuple[jax.Array, jax.Array]:
    """The two [B, N, H, E] arrays whose products the relation `name` ("qk", "vv", "qq", "kk") holds."""
    a, b = PAIRS[name]
    return getattr(trace, a), getattr(trace, b)


def relation_logits(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b^T / sqrt(E) for a, b [B, N, H, E] -> [B, H, N, N], float32; CLS is a token like any other."""
    chex.assert_rank([a, b], 4)
    chex.assert_equal_shape([a, b])
    # Heads out front make the product a plain batched matmul, which XLA on the CPU runs fastest. Scaled in float32: in
    # bfloat16, 1/sqrt(E) itself is off unless E is a power of 4.
    a, b = a.swapaxes(1, 2), b.swapaxes(1, 2)
    return jnp.einsum("bhne,bhme->bhnm", a, b, preferred_element_type=jnp.float32) * a.shape[-1] ** -0.5


def relation(a: jax.Array, b: jax.Array) -> jax.Array:
    """softmax of `relation_logits` over the last (key) axis: [B, H, N, N], rows sum to 1."""
    return jax.nn.softmax(relation_logits(a, b))


def cosine(x: jax.Array, token: int) -> jax.Array:
    """Cosine similarities of one token of x [B, N, C] with all: [B, N]."""
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    return jnp.einsum("bc,bnc->bn", x[:, token], x)
