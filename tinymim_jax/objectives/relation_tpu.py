"""The relation loss of `relation_kl` and its gradient as Pallas kernels for TPU.

A grid step holds all keys of a few heads in VMEM and a block of their queries, side by side in the lanes, so that the
sums of a softmax over keys are sums of registers. Logits and softmaxes are float32, one head's block at a time. Arrays
come as [heads, E, N]: no lane is lost to a narrow E and nothing is padded; what is read beyond N is masked here.
Queries masked to 0 have twice the same relation, hence a KL and a gradient of exactly 0.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tinymim_jax.objectives.kernels import HIDDEN, Arrays, dot

LANES = 128
TILE = 16  # rows of a register of bfloat16
CHUNK = 512  # keys worked on at a time
VMEM = 13 * 2**20  # bytes of blocks, of 16 MiB; up to 2.3 were seen to go to what the compiler keeps
STEP = 4 * 2**20  # up to so many bytes, heads share a step: one costs as much as a small head
HEADS = 16


def supports(tq: jax.Array, q: jax.Array) -> bool:
    """Whether a block of teacher and student, [B, H, N, E] each, fits into VMEM; of 4097 tokens 64 wide it does."""
    return _block_size(tq, q)[0] > 0


def kl_sums(gradient: bool, *arrays: jax.Array, interpret: bool = False) -> Arrays:
    """As `relation_gpu.kl_sums`; the KL is hardly dearer than its gradients alone."""
    tq, _, q, k = arrays
    b, h, n, width = q.shape
    heads, lanes = _block_size(tq, q)
    if not heads:
        raise ValueError(f"{n} tokens of widths {tq.shape[-1]} and {width} do not fit into the memory of a kernel")

    def spec(rows: int, size: int, step: int) -> pl.BlockSpec:
        return pl.BlockSpec((heads, rows, size), lambda head, i: (head, 0, i * step))

    def spec_pair(rows: int) -> list[pl.BlockSpec]:
        return [spec(rows, lanes, 1), spec(rows, _up(n, LANES), 0)]

    outputs = [jax.ShapeDtypeStruct((b * h, 1, lanes), jnp.float32)]
    out_specs, scratch = [spec(1, lanes, 0)], [pltpu.VMEM((_up(n, TILE), lanes), jnp.float32)] * 2
    if gradient:
        outputs += [jax.ShapeDtypeStruct((b * h, width, n), x.dtype) for x in (q, k)]
        out_specs += spec_pair(width)
        scratch += [pltpu.VMEM((heads, width, _up(n, LANES)), jnp.float32)]
    kl, *grads = pl.pallas_call(
        functools.partial(_kernel, n, gradient),
        outputs,
        grid=(b * h // heads, -(-n // lanes)),
        in_specs=[*spec_pair(tq.shape[-1]), *spec_pair(width)],
        out_specs=out_specs,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(gradient, tq, q),
        interpret=interpret,
        name="relation_kl_gradient" if gradient else "relation_kl",
    )(*[x.swapaxes(2, 3).reshape(b * h, -1, n) for x in arrays])
    return kl.reshape(b, -1).sum(axis=1), *[g.reshape(b, h, width, n).swapaxes(2, 3) for g in grads]


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _block_size(tq: jax.Array, q: jax.Array) -> tuple[int, int]:
    """Heads and queries of a step; (0, 0) where VMEM is too small for one head."""
    b, h, n, width = q.shape
    buffered = 2 * (_up(tq.shape[-1], TILE) * tq.dtype.itemsize + 2 * _up(width, TILE) * q.dtype.itemsize)

    def needed(heads: int, lanes: int) -> int:
        keys = _up(n, LANES) * (buffered + 4 * _up(width, TILE))
        return heads * (keys + lanes * buffered) + 8 * _up(n, TILE) * lanes

    # Wide blocks are faster if few of their queries are none; of float32, the compiler keeps too many copies.
    is_wide = jnp.float32 not in (tq.dtype, q.dtype) and _up(n, 2 * LANES) <= 1.125 * _up(n, LANES)
    for lanes in (2 * LANES, LANES) if is_wide else (LANES,):
        if needed(1, lanes) <= VMEM:
            shared = [i for i in range(2, HEADS + 1) if b * h % i == 0 and needed(i, lanes) <= STEP]
            return max(shared, default=1), lanes
    return 0, 0


def _cost(gradient: bool, tq: jax.Array, q: jax.Array) -> pl.CostEstimate:
    pairs = q.shape[0] * q.shape[1] * q.shape[2] ** 2
    widths = tq.shape[-1] + (3 if gradient else 1) * q.shape[-1]
    moved = 2 * tq.nbytes + (4 if gradient else 2) * q.nbytes
    return pl.CostEstimate(flops=2 * pairs * widths, transcendentals=2 * pairs, bytes_accessed=moved)


def _kernel(n: int, gradient: bool, tq: Any, tk: Any, q: Any, k: Any, kl: Any, *rest: Any) -> None:
    """References: queries [heads, E, lanes], keys [heads, E, N], results alike; work [N, lanes], dk in float32."""
    dq, dk, t_work, s_work, dk_sum = rest if gradient else (None, None, *rest, None)
    block, lanes = pl.program_id(1), tq.shape[2]
    sums = [kl, dk_sum] if gradient else [kl]

    @pl.when(block == 0)
    def _() -> None:
        for ref in sums:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    def head(i: jax.Array, _: None) -> None:
        mine = [_known(x[i], n - block * lanes if n % lanes else lanes, axis=1) for x in (tq, q)]
        t_sum, s_sum, rows = _softmaxes(n, mine, (tk.at[i], k.at[i]), (t_work, s_work))
        kl[i] += rows
        if gradient:
            _gradients(n, mine[1], k.at[i], (t_work, s_work), (1 / t_sum, 1 / s_sum), dq.at[i], dk_sum.at[i])

    jax.lax.fori_loop(0, tq.shape[0], head, None)
    if gradient:

        @pl.when(block == pl.num_programs(1) - 1)
        def _() -> None:
            dk[...] = (dk_sum[...] * q.shape[1] ** -0.5).astype(dk.dtype)


def _softmaxes(n: int, queries: list[jax.Array], keys: tuple, work: tuple) -> Arrays:
    """Of one head: sums [1, lanes] of the teacher's and the student's exponentials, left in `work`, and the KL."""

    def logits(at: Any, left: int, tops: list[jax.Array]) -> list[jax.Array]:
        products = [dot(key[:, at], x, 0, 0) * x.shape[0] ** -0.5 for x, key in zip(queries, keys, strict=True)]
        products = [_known(x, left, axis=0, fill=HIDDEN) for x in products]
        for ref, x in zip(work, products, strict=True):
            ref[at, :] = x
        return [jnp.maximum(top, x.max(axis=0, keepdims=True)) for top, x in zip(tops, products, strict=True)]

    def exponentials(at: Any, _: int, totals: list[jax.Array]) -> list[jax.Array]:
        t, s = (ref[at, :] - top for ref, top in zip(work, tops, strict=True))
        exp_t, exp_s = jnp.exp(t), jnp.exp(s)
        work[0][at, :], work[1][at, :] = exp_t, exp_s
        terms = (exp_t, exp_s, exp_t * (t - s))
        return [total + x.sum(axis=0, keepdims=True) for total, x in zip(totals, terms, strict=True)]

    lanes = queries[0].shape[1]
    tops = _over_keys(n, logits, [jnp.full((1, lanes), HIDDEN, jnp.float32)] * 2)
    t_sum, s_sum, difference = _over_keys(n, exponentials, [jnp.zeros((1, lanes), jnp.float32)] * 3)
    return t_sum, s_sum, difference / t_sum - jnp.log(t_sum) + jnp.log(s_sum)


def _gradients(n: int, q: jax.Array, k: Any, work: tuple, inverse: tuple, dq: Any, dk_sum: Any) -> None:
    """Of one head: sets dq, and adds to dk_sum (not yet scaled), from what `_softmaxes` kept."""

    def add(at: Any, left: int, total: jax.Array) -> jax.Array:
        t, s = (ref[at, :] * x for ref, x in zip(work, inverse, strict=True))
        d = (s - t).astype(q.dtype)
        dk_sum[:, at] += dot(q, d, 1, 1)
        return total + dot(_known(k[:, at], left, axis=1), d, 1, 0)

    total = _over_keys(n, add, jnp.zeros(q.shape, jnp.float32))
    dq[...] = (total * q.shape[0] ** -0.5).astype(dq.dtype)


def _over_keys(n: int, body: Callable[[Any, int, Any], Any], carry: Any) -> Any:
    """carry = body(slice of keys, how many of them are keys, carry), over all N."""

    def whole(i: jax.Array, carry: Any) -> Any:
        return body(pl.ds(pl.multiple_of(i * CHUNK, CHUNK), CHUNK), CHUNK, carry)

    chunks, left = divmod(n, CHUNK)
    if chunks:  # a loop is traced even if it never runs
        carry = jax.lax.fori_loop(0, chunks, whole, carry)
    return body(pl.ds(chunks * CHUNK, _up(left, TILE)), left, carry) if left else carry


def _known(x: jax.Array, count: Any, axis: int, fill: float = 0.0) -> jax.Array:
    """`fill` in place of all but the first `count` along `axis`: beyond an array's end, anything may be read."""
    if isinstance(count, int) and count >= x.shape[axis]:
        return x
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < count, x, jnp.asarray(fill, x.dtype))
