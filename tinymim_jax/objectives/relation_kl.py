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
from tinymim_jax.objectives.kernels import Arrays, per_device

Pair = tuple[jax.Array, jax.Array]
Platforms = tuple[str, ...]  # those with a kernel
DENSE = 256  # up to so many tokens, all rows are one block
ROWS = 64  # of a block, where there are more tokens; both as BENCHMARKS.md has them of a CPU
Kernel = Literal["xla", "pallas"]
KERNELS = {"tpu": relation_tpu, "cuda": relation_gpu}  # by platform


def relation_kl(teacher: Pair, student: Pair, rows: int | None = None, kernel: Kernel = "xla") -> jax.Array:
    """KL(teacher || student): sum over keys, mean over heads and queries -> [B], float32.

    Each pair is two [B, N, H, E] arrays; B, N and H agree, E may differ. No gradient reaches the teacher. `rows` of the
    queries are worked on at a time (None: as many as measurements advise). With `kernel` "pallas", a TPU uses
    `relation_tpu` and an Nvidia GPU `relation_gpu`, where these have the memory for it.
    """
    rows, (tq, tk, q, k) = by_head(teacher, student, rows)
    return _kl(rows, with_kernel(kernel, tq, q), tq, tk, q, k) / (q.shape[1] * q.shape[2])


def by_head(teacher: Pair, student: Pair, rows: int | None) -> tuple[int, Arrays]:
    """The rows of a block, as many as measurements advise if `rows` is None, and all four arrays [B, H, N, E]."""
    chex.assert_rank([*teacher, *student], 4)
    chex.assert_equal_shape(teacher)
    chex.assert_equal_shape(student)
    chex.assert_equal_shape([teacher[0], student[0]], dims=(0, 1, 2))
    n = student[0].shape[1]
    # Heads out front make the products plain batched matmuls.
    arrays = tuple(x.swapaxes(1, 2) for x in (*map(jax.lax.stop_gradient, teacher), *student))
    return min(n, rows or (n if n <= DENSE else ROWS)), arrays


def with_kernel(kernel: Kernel, tq: jax.Array, q: jax.Array) -> Platforms:
    """The platforms on which `kernel` is one of ours for the teacher's and the student's queries [B, H, N, E]."""
    return tuple(p for p, module in KERNELS.items() if kernel == "pallas" and module.supports(tq, q))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kl(rows: int, platforms: Platforms, tq: jax.Array, tk: jax.Array, q: jax.Array, k: jax.Array) -> jax.Array:
    """Summed over heads and queries: [B, H, N, E] each -> [B]."""
    return _route(platforms, False, lambda *arrays: _in_blocks(rows, *arrays)[:1], tq, tk, q, k)[0]


def _forward(rows: int, platforms: Platforms, *arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    kl, dq, dk = _route(platforms, True, functools.partial(_in_blocks, rows), *arrays)
    return kl, (dq, dk)


def _route(platforms: Platforms, gradient: bool, plain: Callable[..., Arrays], *arrays: jax.Array) -> Arrays:
    """Chosen when a program is compiled for a platform: that may be another than the one it is traced on."""
    ours = {p: functools.partial(per_device, functools.partial(KERNELS[p].kl_sums, gradient)) for p in platforms}
    return jax.lax.platform_dependent(*arrays, **ours, default=plain) if ours else plain(*arrays)


def _backward(rows: int, platforms: Platforms, kept: tuple, grad: jax.Array) -> tuple[None, None, jax.Array, jax.Array]:
    del rows, platforms
    dq, dk = ((grad[:, None, None, None] * x).astype(x.dtype) for x in kept)
    return None, None, dq, dk


_kl.defvjp(_forward, _backward)


def _in_blocks(
    rows: int, tq: jax.Array, tk: jax.Array, q: jax.Array, k: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """KL [B], and its gradients by q and k [B, H, N, E]."""
    shape, dtype, scale = q.shape, q.dtype, q.shape[-1] ** -0.5
    # Images and heads as one axis: XLA on the CPU is slow at reductions whose first axis is 1.
    tq, tk, q, k = (x.reshape(-1, *x.shape[2:]) for x in (tq, tk, q, k))

    def block(dk: jax.Array, queries: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        (t, e_t, sum_t), (s, e_s, sum_s) = _shifted(queries[0], tk), _shifted(queries[1], k)
        kl = jnp.sum(e_t * (t - s), axis=-1) / sum_t + jnp.log(sum_s / sum_t)
        d = (e_s * (1 / sum_s)[..., None] - e_t * (1 / sum_t)[..., None]).astype(dtype)
        dk += jnp.einsum("gnm,gne->gme", d, queries[1], preferred_element_type=jnp.float32)
        return dk, (kl, jnp.einsum("gnm,gme->gne", d, k, preferred_element_type=jnp.float32))

    dk, (kl, dq) = jax.lax.scan(block, jnp.zeros(k.shape, jnp.float32), blocks(rows, tq, q))
    dq = jnp.moveaxis(dq, 0, 1).reshape(len(q), -1, shape[-1])[:, : shape[2]]
    dq, dk = ((x * scale).astype(dtype).reshape(shape) for x in (dq, dk))
    return kl.sum(axis=(0, 2)).reshape(shape[:2]).sum(axis=1), dq, dk


def _shifted(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits less the largest of their row, their exponentials, and the sums of these, [B * H, rows]; in float32.

    Scaled in float32: in bfloat16, 1/sqrt(E) itself is off unless E is a power of 4.
    """
    logits = jnp.einsum("gne,gme->gnm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    logits -= logits.max(axis=-1, keepdims=True)
    e = jnp.exp(logits)
    return logits, e, e.sum(axis=-1)


def blocks(rows: int, *queries: jax.Array) -> tuple[jax.Array, ...]:
    """[B * H, N, E] each -> [blocks, B * H, rows, E]; zeros behind N, whose relations are equal and add nothing."""
    n = queries[0].shape[1]
    count = -(-n // rows)
    padded = [jnp.pad(x, ((0, 0), (0, count * rows - n), (0, 0))) for x in queries]
    return tuple(jnp.moveaxis(x.reshape(len(x), count, rows, x.shape[-1]), 1, 0) for x in padded)
