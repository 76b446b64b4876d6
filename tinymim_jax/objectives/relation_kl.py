"""KL divergence between a teacher's and a student's token relations (TinyMIM Eq. 5 and 9)."""

import chex
import jax
import jax.numpy as jnp

from tinymim_jax.objectives.relations import relation_logits

Pair = tuple[jax.Array, jax.Array]


def relation_kl(teacher: Pair, student: Pair) -> jax.Array:
    """KL(teacher || student): sum over keys, mean over heads and queries -> [B], float32.

    Each pair is two [B, N, H, E] arrays; B, N and H agree, E may differ. No gradient reaches the teacher.
    """
    chex.assert_equal_shape([teacher[0], student[0]], dims=(0, 1, 2))
    log_t = jax.lax.stop_gradient(jax.nn.log_softmax(relation_logits(*teacher)))
    log_p = jax.nn.log_softmax(relation_logits(*student))
    return jnp.sum(jnp.exp(log_t) * (log_t - log_p), axis=-1).mean(axis=(1, 2))
