"""Attention, by whom it is computed.

Shapes: B batch, N tokens, H heads, E head width.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from tinymim_jax.runtime.errors import InputError


def attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(E) + bias) v on [B, H, N, E] and [H, N, N], softmax in float32."""
    return jax.lax.platform_dependent(q, k, v, bias, cpu=_on_cpu, default=_by_xla)


def _logits(q: jax.Array, k: jax.Array, bias: jax.Array | None) -> jax.Array:
    """[B, H, N, N]: with heads out front the products are plain batched matmuls, which XLA on the CPU runs fastest."""
    logits = jnp.einsum("bhne,bhme->bhnm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return logits if bias is None else logits + bias


def _by_xla(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    return jnp.einsum("bhnm,bhme->bhne", jax.nn.softmax(_logits(q, k, bias)).astype(v.dtype), v)


@jax.custom_vjp
def _on_cpu(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Rows are divided by their sums behind the product: fewer passes over [B, H, N, N], forward and backward."""
    return _on_cpu_forward(q, k, v, bias)[0]


def _on_cpu_forward(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, tuple]:
    logits = _logits(q, k, bias)
    e = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    sums = e.sum(axis=-1, keepdims=True)
    out = jnp.einsum("bhnm,bhme->bhne", e, v, preferred_element_type=jnp.float32) / sums
    return out.astype(v.dtype), (q, k, v, bias, e, sums, out)


def _on_cpu_backward(kept: tuple, grad: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, bias, e, sums, out = kept
    grad = grad.astype(jnp.float32)
    dv = jnp.einsum("bhnm,bhne->bhme", e, grad / sums)
    by_weight = jnp.einsum("bhne,bhme->bhnm", grad, v) - jnp.sum(grad * out, axis=-1, keepdims=True)
    d = e * (by_weight * (q.shape[-1] ** -0.5 / sums))
    dq, dk = jnp.einsum("bhnm,bhme->bhne", d, k), jnp.einsum("bhnm,bhne->bhme", d, q)
    dbias = None if bias is None else d.sum(axis=0) * q.shape[-1] ** 0.5
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dbias


_on_cpu.defvjp(_on_cpu_forward, _on_cpu_backward)


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attention`, by cuDNN where the program is compiled for an Nvidia GPU; bfloat16 or float16 only."""
    return jax.lax.platform_dependent(q, k, v, cuda=_by_cudnn, default=attention)


def _by_cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    n = q.shape[2]
    # jax refuses the gradient of an odd number of tokens: there, one more is added and hidden.
    odd = n % 2
    q, k, v = (jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q, k, v))
    # Made of q: under vmap (replicas) jax takes lengths [B] for those of [R, B].
    each = n + 0 * jnp.isnan(q[:, 0, 0, 0]).astype(jnp.int32)
    lengths = dict.fromkeys(("query_seq_lengths", "key_value_seq_lengths"), each) if odd else {}
    try:
        out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **lengths)
    except RuntimeError as error:  # without cuDNN jax cannot even trace it
        if isinstance(error, NotImplementedError) or jax.default_backend() == "gpu":
            raise
        return attention(*(x[:, :n].swapaxes(1, 2) for x in (q, k, v)))
    return out[:, :n].swapaxes(1, 2)


ATTENTIONS = {"xla": attention, "cudnn": cudnn_attention}


def check(where: str, kind: str, dtype: str, width: int, heads: Iterable[int]) -> None:
    """Raises InputError if cuDNN is to do what it does not do on every GPU since Ampere."""
    if kind != "cudnn":
        return
    if dtype == "float32":
        raise InputError(f"{where}: attention 'cudnn' does not compute in float32; set model.dtype=bfloat16")
    for count in heads:
        if width // count % 8 or width // count > 128:
            raise InputError(
                f"{where}: attention 'cudnn' takes heads of a width that is a multiple of 8 and at most 128, and"
                f" {count} heads are {width // count} wide; set model.attention=xla"
            )
