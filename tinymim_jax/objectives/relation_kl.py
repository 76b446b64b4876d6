"""KL divergence between a teacher's and a student's token relations (TinyMIM Eq. 5 and 9).

Nothing of size [N, N] is kept: a block of query rows is worked on at a time, in float32, and its part of the gradient
is made at once. That by the student's logits is (P - T) / (H N), with T and P the teacher's and the student's
relations, times the cotangent, which is one number an image and waits for the backward pass.
"""

import functools
from collections.abc import Callable
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from tinymim_jax.objectives import relation_gpu, relation_tpu

Pair = tuple[jax.Array, jax.Array]
Platforms = tuple[str, ...]  # those with a kernel
DENSE = 512  # up to so many tokens, all rows are one block: fastest (BENCHMARKS.md)
ROWS = 64
Kernel = Literal["xla", "pallas"]
KERNELS = {"tpu": relation_tpu, "cuda": relation_gpu}  # by platform


def relation_kl(teacher: Pair, student: Pair, rows: int | None = None, kernel: Kernel = "xla") -> jax.Array:
    """KL(teacher || student): sum over keys, mean over heads and queries -> [B], float32.

    Each pair is two [B, N, H, E] arrays; B, N and H agree, E may differ. No gradient reaches the teacher. `rows` of the
    queries are worked on at a time (None: as many as measurements advise). With `kernel` "pallas", a TPU uses
    `relation_tpu` and an Nvidia GPU `relation_gpu`, where these have the memory for it.
    """
    chex.assert_rank([*teacher, *student], 4)
    chex.assert_equal_shape(teacher)
    chex.assert_equal_shape(student)
    chex.assert_equal_shape([teacher[0], student[0]], dims=(0, 1, 2))
    _, n, h, _ = student[0].shape
    rows = rows or (n if n <= DENSE else ROWS)
    # Heads out front make the products plain batched matmuls.
    tq, tk, q, k = (x.swapaxes(1, 2) for x in (*map(jax.lax.stop_gradient, teacher), *student))
    platforms = [p for p, module in KERNELS.items() if kernel == "pallas" and module.supports(tq, q)]
    return _kl(rows, tuple(platforms), tq, tk, q, k) / (h * n)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kl(rows: int, platforms: Platforms, tq: jax.Array, tk: jax.Array, q: jax.Array, k: jax.Array) -> jax.Array:
    """Summed over heads and queries: [B, H, N, E] each -> [B]."""
    kernels = {p: KERNELS[p].forward for p in platforms}
    return _route(kernels, lambda *arrays: _in_blocks(rows, *arrays)[0])(tq, tk, q, k)


def _forward(rows: int, platforms: Platforms, *arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    kernels = {p: KERNELS[p].both for p in platforms}
    kl, dq, dk = _route(kernels, functools.partial(_in_blocks, rows))(*arrays)
    return kl, (dq, dk)


def _route(kernels: dict[str, Callable], plain: Callable) -> Callable:
    """Chosen when a program is compiled for a platform: that may be another than the one it is traced on."""
    return functools.partial(jax.lax.platform_dependent, **kernels, default=plain) if kernels else plain


def _backward(rows: int, platforms: Platforms, kept: tuple, grad: jax.Array) -> tuple[None, None, jax.Array, jax.Array]:
    del rows, platforms
    dq, dk = ((grad[:, None, None, None] * x).astype(x.dtype) for x in kept)
    return None, None, dq, dk


_kl.defvjp(_forward, _backward)


def _in_blocks(
    rows: int, tq: jax.Array, tk: jax.Array, q: jax.Array, k: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """KL [B], and its gradients by q and k [B, H, N, E]."""

    def block(total: tuple[jax.Array, jax.Array], item: tuple) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        kl, dk = total
        t_rows, s_rows, is_row = item
        log_t, log_s = jax.nn.log_softmax(_logits(t_rows, tk)), jax.nn.log_softmax(_logits(s_rows, k))
        t = jnp.exp(log_t)
        kl += jnp.sum(jnp.sum(t * (log_t - log_s), axis=-1) * is_row, axis=(1, 2))
        d = ((jnp.exp(log_s) - t) * (is_row[:, None] * q.shape[-1] ** -0.5)).astype(q.dtype)
        dk += jnp.einsum("bhnm,bhne->bhme", d, s_rows, preferred_element_type=jnp.float32)
        return (kl, dk), jnp.einsum("bhnm,bhme->bhne", d, k)

    zeros = jnp.zeros(len(q), jnp.float32), jnp.zeros(k.shape, jnp.float32)
    (kl, dk), dq = jax.lax.scan(block, zeros, _blocks(rows, tq, q))
    dq = jnp.moveaxis(dq, 0, 2).reshape(*q.shape[:2], -1, q.shape[-1])[:, :, : q.shape[2]]
    return kl, dq, dk.astype(k.dtype)


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
