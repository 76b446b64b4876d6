"""KL divergence between a teacher's and a student's token relations (TinyMIM Eq. 5 and 9).

Nothing of size [N, N] is kept for the gradient: a block of query rows is worked on at a time, and again in the backward
pass, from float32 log-sum-exp. The gradient by the student's logits is (P - T) / (H N), with T and P the teacher's and
the student's relations.
"""

import functools

import chex
import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]
DENSE = 512  # up to so many tokens, all rows are one block: fastest (BENCHMARKS.md)
ROWS = 64


def relation_kl(teacher: Pair, student: Pair, rows: int | None = None) -> jax.Array:
    """KL(teacher || student): sum over keys, mean over heads and queries -> [B], float32.

    Each pair is two [B, N, H, E] arrays; B, N and H agree, E may differ. No gradient reaches the teacher. `rows` of the
    queries are worked on at a time (None: as many as measurements advise).
    """
    chex.assert_rank([*teacher, *student], 4)
    chex.assert_equal_shape(teacher)
    chex.assert_equal_shape(student)
    chex.assert_equal_shape([teacher[0], student[0]], dims=(0, 1, 2))
    _, n, h, _ = student[0].shape
    rows = rows or (n if n <= DENSE else ROWS)
    # Heads out front make the products plain batched matmuls.
    heads_first = [x.swapaxes(1, 2) for x in (*map(jax.lax.stop_gradient, teacher), *student)]
    return _kl(rows, *heads_first) / (h * n)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kl(rows: int, tq: jax.Array, tk: jax.Array, q: jax.Array, k: jax.Array) -> jax.Array:
    """Summed over heads and queries: [B, H, N, E] each -> [B]."""
    return _forward(rows, tq, tk, q, k)[0]


def _forward(rows: int, tq: jax.Array, tk: jax.Array, q: jax.Array, k: jax.Array) -> tuple[jax.Array, tuple]:
    def block(total: jax.Array, item: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        t_rows, s_rows, is_row = item
        t, s = _logits(t_rows, tk), _logits(s_rows, k)
        t_norm, s_norm = (jax.nn.logsumexp(x, axis=-1, keepdims=True) for x in (t, s))
        log_t = t - t_norm
        kl = jnp.sum(jnp.exp(log_t) * (log_t - (s - s_norm)), axis=-1)
        return total + jnp.sum(kl * is_row, axis=(1, 2)), (t_norm, s_norm)

    kl, norms = jax.lax.scan(block, jnp.zeros(len(q), jnp.float32), _blocks(rows, tq, q))
    return kl, (tq, tk, q, k, norms)


def _backward(rows: int, kept: tuple, grad: jax.Array) -> tuple[None, None, jax.Array, jax.Array]:
    tq, tk, q, k, norms = kept
    scale = grad[:, None, None, None] * q.shape[-1] ** -0.5

    def block(dk: jax.Array, item: tuple) -> tuple[jax.Array, jax.Array]:
        (t_rows, s_rows, is_row), (t_norm, s_norm) = item
        t, s = jnp.exp(_logits(t_rows, tk) - t_norm), jnp.exp(_logits(s_rows, k) - s_norm)
        d = ((s - t) * (scale * is_row[:, None])).astype(q.dtype)
        dk += jnp.einsum("bhnm,bhne->bhme", d, s_rows, preferred_element_type=jnp.float32)
        return dk, jnp.einsum("bhnm,bhme->bhne", d, k)

    dk, dq = jax.lax.scan(block, jnp.zeros(k.shape, jnp.float32), (_blocks(rows, tq, q), norms))
    dq = jnp.moveaxis(dq, 0, 2).reshape(*q.shape[:2], -1, q.shape[-1])[:, :, : q.shape[2]]
    return None, None, dq, dk.astype(k.dtype)


_kl.defvjp(_forward, _backward)


def _logits(q: jax.Array, k: jax.Array) -> jax.Array:
    """Scaled in float32: in bfloat16, 1/sqrt(E) itself is off unless E is a power of 4."""
    return jnp.einsum("bhne,bhme->bhnm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5


def _blocks(rows: int, *queries: jax.Array) -> tuple[jax.Array, ...]:
    """[B, H, N, E] each -> [blocks, B, H, rows, E], zeros behind N, and which rows are none of these [blocks, rows]."""
    n = queries[0].shape[2]
    count = -(-n // rows)
    padded = [jnp.pad(x, ((0, 0), (0, 0), (0, count * rows - n), (0, 0))) for x in queries]
    split = [jnp.moveaxis(x.reshape(*x.shape[:2], count, rows, x.shape[-1]), 2, 0) for x in padded]
    return *split, (jnp.arange(count * rows) < n).reshape(count, rows)
