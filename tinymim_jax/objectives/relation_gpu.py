"""The relation loss of `relation_kl` and its gradient as Pallas kernels for GPUs.

As in FlashAttention, a block of queries meets the keys block by block, and sums over keys are relative to the largest
logit so far. Two kernels: one for each block of queries (KL and dq), one for each block of keys (dk), which finds the
relations again from the rows' log-sum-exps. Logits, softmaxes and sums are float32. Triton's blocks are powers of 2:
what is beyond N and E is read as 0. Queries of 0 have twice the same relation, hence a KL and a gradient of exactly 0.

Triton, although jax 0.11 calls it deprecated: it serves Ampere and Hopper, jax 0.10 and 0.11 and unrounded float32
alike, and Mosaic GPU does not.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from tinymim_jax.objectives.kernels import HIDDEN, Arrays, dot

Widths = tuple[int, int]  # E of teacher and student

TILE = 16  # the least that Triton multiplies
ROWS = {2: 64, 4: 32}  # of a block by bytes a number, if BLOCK allows; of 64 float32 rows, registers spill
BLOCK = 2**15  # bytes of a block of teacher and student; three are held, and Ampere has 99 KiB or more for them


def supports(tq: jax.Array, q: jax.Array) -> bool:
    """Whether a block of teacher and student, [B, H, N, E] each, fits; of 256 float32 wide it does, for any N."""
    return _rows(tq, q) >= TILE


def kl_sums(gradient: bool, *arrays: jax.Array, interpret: bool = False) -> Arrays:
    """KL(teacher || student) summed over heads and queries, [B], float32; with `gradient` also those by q and k.

    Of one device's tq, tk, q, k [B, H, N, E]; raises ValueError if they are not supported.
    """
    tq, _, q, k = arrays
    b, h, n, width = q.shape
    rows, widths = _rows(tq, q), (tq.shape[-1], width)
    if rows < TILE:
        raise ValueError(f"heads of widths {widths[0]} and {width} do not fit into the memory of a kernel")
    inputs = [x.reshape(b * h, n, -1) for x in arrays]
    line = jax.ShapeDtypeStruct((b * h, n), jnp.float32)
    dq, dk = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs[2:])
    by_query = functools.partial(_query_kernel, n, widths)
    if not gradient:
        (kl,) = _launch(by_query, rows, inputs, [line], interpret)
        return (kl.reshape(b, -1).sum(axis=1),)
    kl, *sums, dq = _launch(by_query, rows, inputs, [line, line, line, dq], interpret)
    (dk,) = _launch(functools.partial(_key_kernel, n, widths), rows, [*inputs, *sums], [dk], interpret)
    return kl.reshape(b, -1).sum(axis=1), dq.reshape(q.shape), dk.reshape(k.shape)


def _launch(kernel: Callable[..., None], rows: int, inputs: list, outputs: list, interpret: bool) -> list[jax.Array]:
    """Runs `kernel` for each block of rows of each head: on all of the head's inputs and this block of its outputs.

    Arrays are [heads, N, E] or [heads, N].
    """
    heads, n = inputs[0].shape[:2]
    blocks, width = pl.cdiv(n, rows), max(x.shape[-1] for x in inputs if x.ndim == 3)

    def spec(x: Any, size: int, step: int) -> pl.BlockSpec:
        shape = (None, size, *map(_power, x.shape[2:]))
        return pl.BlockSpec(shape, lambda i, head: (head, step * i, 0)[: len(shape)])

    return pl.pallas_call(
        kernel,
        outputs,
        grid=(blocks, heads),
        in_specs=[spec(x, blocks * rows, 0) for x in inputs],
        out_specs=[spec(x, rows, 1) for x in outputs],
        compiler_params=triton.CompilerParams(num_warps=4 if width <= 64 else 8, num_stages=2),
        interpret=interpret,
    )(*inputs)


def _power(size: int) -> int:
    return max(TILE, pl.next_power_of_2(size))


def _rows(tq: jax.Array, q: jax.Array) -> int:
    """Queries or keys of a block."""
    row = sum(_power(x.shape[-1]) * x.dtype.itemsize for x in (tq, q))
    size = max(tq.dtype.itemsize, q.dtype.itemsize)
    return min(ROWS.get(size, 0), _power(q.shape[2]), BLOCK // pl.next_power_of_2(row))


def _query_kernel(n: int, widths: Widths, tq: Any, tk: Any, q: Any, k: Any, kl: Any, *rest: Any) -> None:
    """References: [N, E] of a head; of a block, KL and log-sum-exps of teacher and student [rows], dq [rows, E]."""
    rows, block = kl.shape[0], pl.program_id(0)
    queries = _read((tq, q), block, rows, n, widths)

    def relate(i: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """Logits [rows, keys] with the keys of block `i`, and the student's keys."""
        keys = _read((tk, k), i, rows, n, widths)
        is_key = _is_inside(i, (rows,), n)
        return [jnp.where(is_key, x, HIDDEN) for x in _logits(queries, keys, widths)], keys[1]

    tops, sums, difference = _softmaxes(rows, pl.cdiv(n, rows), lambda i: relate(i)[0])
    _write(kl, difference / sums[0] - jnp.log(sums[0]) + jnp.log(sums[1]), block, n)
    if not rest:
        return
    *refs, dq = rest
    totals = [top + jnp.log(x) for top, x in zip(tops, sums, strict=True)]
    for ref, x in zip(refs, totals, strict=True):
        _write(ref, x, block, n)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        (t, s), keys = relate(i)
        d = jnp.exp(s - totals[1][:, None]) - jnp.exp(t - totals[0][:, None])
        return total + dot(d.astype(keys.dtype), keys, 1, 0)

    total = jax.lax.fori_loop(0, pl.cdiv(n, rows), add, jnp.zeros(dq.shape, jnp.float32))
    _write(dq, (total * widths[1] ** -0.5).astype(dq.dtype), block, n, widths[1])


def _softmaxes(rows: int, blocks: int, logits: Callable[[jax.Array], list[jax.Array]]) -> tuple:
    """Over all keys, [rows] each: largest logits, sums of exp(logit - largest), both of teacher and student, and that
    of the teacher's exponentials times the difference of teacher and student, both relative to their largest."""

    def body(i: jax.Array, carry: tuple) -> tuple:
        (t_top, s_top), (t_sum, s_sum), difference = carry
        t, s = logits(i)
        tops = jnp.maximum(t_top, t.max(axis=1)), jnp.maximum(s_top, s.max(axis=1))
        t_shift, s_shift = t_top - tops[0], s_top - tops[1]
        t, s = t - tops[0][:, None], s - tops[1][:, None]
        t_scale, exp_t = jnp.exp(t_shift), jnp.exp(t)
        difference = t_scale * (difference + t_sum * (t_shift - s_shift)) + (exp_t * (t - s)).sum(axis=1)
        sums = t_scale * t_sum + exp_t.sum(axis=1), jnp.exp(s_shift) * s_sum + jnp.exp(s).sum(axis=1)
        return tops, sums, difference

    top, zero = jnp.full(rows, HIDDEN, jnp.float32), jnp.zeros(rows, jnp.float32)
    return jax.lax.fori_loop(0, blocks, body, ((top, top), (zero, zero), zero))


def _key_kernel(n: int, widths: Widths, tq: Any, tk: Any, q: Any, k: Any, t_total: Any, s_total: Any, dk: Any) -> None:
    """References: [N, E] and log-sum-exps [N] of a head, and dk [rows, E] of a block."""
    rows, block = dk.shape[0], pl.program_id(0)
    keys = _read((tk, k), block, rows, n, widths)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        queries = _read((tq, q), i, rows, n, widths)
        t, s = _logits(keys, queries, widths)  # [keys, queries]: no product is of a transposed difference
        t_totals, s_totals = _read((t_total, s_total), i, rows, n, widths)
        d = jnp.exp(s - s_totals) - jnp.exp(t - t_totals)
        return total + dot(d.astype(q.dtype), queries[1], 1, 0)

    total = jax.lax.fori_loop(0, pl.cdiv(n, rows), add, jnp.zeros(dk.shape, jnp.float32))
    _write(dk, (total * widths[1] ** -0.5).astype(dk.dtype), block, n, widths[1])


def _logits(left: list[jax.Array], right: list[jax.Array], widths: Widths) -> list[jax.Array]:
    """Of teacher and student: rows of `left` times rows of `right`."""
    return [dot(a, b, 1, 1) * e**-0.5 for a, b, e in zip(left, right, widths, strict=True)]


def _read(refs: tuple, block: jax.Array, rows: int, n: int, widths: Widths) -> list[jax.Array]:
    """Rows of block `block` of teacher and student, 0 beyond N and E."""
    at = pl.ds(block * rows, rows)
    masks = [_is_inside(block, (rows, *x.shape[1:]), n, e) for x, e in zip(refs, widths, strict=True)]
    return [triton.load(x.at[at], mask=mask, other=0.0) for x, mask in zip(refs, masks, strict=True)]


def _write(ref: Any, x: jax.Array, block: jax.Array, n: int, width: int = 0) -> None:
    triton.store(ref, x, mask=_is_inside(block, x.shape, n, width))


def _is_inside(block: jax.Array, shape: tuple[int, ...], n: int, width: int = 0) -> jax.Array:
    """Where block `block`, [rows, E] or [rows], is within N and `width`."""
    is_row = block * shape[0] + jnp.arange(shape[0]) < n
    return is_row[:, None] & (jnp.arange(shape[1]) < width) if len(shape) == 2 else is_row
