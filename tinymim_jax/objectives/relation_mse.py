"""Mean squared error between a teacher's and a student's scaled products of tokens, without softmax.

TinyMIM's Table 7 has relations without softmax and does not say their loss: this is the plainest.
"""

import functools

import jax
import jax.numpy as jnp

from tinymim_jax.objectives.relation_kl import Pair, blocks, by_head


def relation_mse(teacher: Pair, student: Pair, rows: int | None = None) -> jax.Array:
    """The mean over keys, queries and heads of the squared difference of a b^T / sqrt(E) -> [B], float32.

    Each pair is two [B, N, H, E] arrays; B, N and H agree, E may differ. No gradient reaches the teacher. `rows` of the
    queries are worked on at a time (None: as many as measurements of `relation_kl` advise), and again for the gradient,
    so that nothing of size [N, N] is kept.
    """
    b, n, h, _ = student[0].shape
    rows, arrays = by_head(teacher, student, rows)
    tq, tk, q, k = (x.reshape(b * h, n, x.shape[-1]) for x in arrays)

    @jax.checkpoint
    def block(total: jax.Array, queries: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        error = _products(queries[1], k) - _products(queries[0], tk)
        return total + jnp.sum(jnp.square(error), axis=(1, 2)), None

    total, _ = jax.lax.scan(block, jnp.zeros(b * h), blocks(rows, tq, q))
    return total.reshape(b, h).mean(axis=1) / n**2


def _products(q: jax.Array, k: jax.Array) -> jax.Array:
    product = functools.partial(jnp.einsum, "gne,gme->gnm", preferred_element_type=jnp.float32)
    return product(q, k) * q.shape[-1] ** -0.5
