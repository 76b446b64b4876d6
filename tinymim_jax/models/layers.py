"""The parts of a transformer block, as the paper draws them.

Shapes: B batch, N tokens incl. CLS, L patch tokens, D width, H heads, E head width, C classes, P values per patch.
"""

import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata

from tinymim_jax.models import attention, posembed
from tinymim_jax.models.contract import BlockTrace

xavier = nn.initializers.xavier_uniform()
normal = nn.initializers.normal(0.02)  # made once: blocks are compared by it


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """[B, H, W, 3] -> [B, L, P], P ordered (row, column, channel) as in MAE."""
    b, h, w, c = images.shape
    p = patch_size
    x = images.reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3)
    return x.reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(patches: jax.Array, patch_size: int) -> jax.Array:
    """The inverse of `patchify`, for square images."""
    b, num_patches, _ = patches.shape
    side, p = round(num_patches**0.5), patch_size
    return patches.reshape(b, side, side, p, p, -1).swapaxes(2, 3).reshape(b, side * p, side * p, -1)


def layer_norm(dtype: jnp.dtype, name: str | None = None, eps: float = 1e-6) -> nn.LayerNorm:
    """Statistics in float32 and in two passes, as torch has them."""
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x times the normal distribution's Phi(x), in float32; only x is kept for its derivative."""
    return (x * _phi(x.astype(jnp.float32))).astype(x.dtype)


def _phi(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


def _gelu_backward(x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    # Else XLA sees that Phi(x) was known before, and keeps it: a tenth of a distillation's memory on a TPU v4.
    wide = jax.lax.optimization_barrier(x).astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) * (2 * jnp.pi) ** -0.5
    return ((grad * (_phi(wide) + wide * density)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
    """U(-b, b) with b = fan_in^-1/2, torch's default for kernels and biases."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def xavier_of_three(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Xavier's, of a fused kernel [D, 3 C], whose three parts are matrices for themselves."""
    bound = (6 / (shape[0] + shape[1] // 3)) ** 0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class RelativePosition(nn.Module):
    """A learnt bias for each distance between two of `grid` x `grid` patches, and for the tokens in front (BEiT)."""

    grid: int
    num_heads: int
    num_prefix: int

    @nn.compact
    def __call__(self) -> jax.Array:
        """[H, N, N], to be added to logits."""
        shape = ((2 * self.grid - 1) ** 2 + 3 * self.num_prefix, self.num_heads)
        table = self.param("kernel", nn.initializers.zeros, shape)
        return table[posembed.relative_index(self.grid, self.num_prefix)].transpose(2, 0, 1)


class LayerScale(nn.Module):
    """A learnt factor for each channel (BEiT's gamma)."""

    start: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> the same."""
        return x * self.param("scale", nn.initializers.constant(self.start), x.shape[-1:]).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv kernel [D, 3, H, E]; `kind` is one of `attention.ATTENTIONS`.

    `grid`, patches a side behind `num_prefix` other tokens, gives it a learnt bias for each distance between two
    patches, 0 none.
    """

    num_heads: int
    dtype: jnp.dtype
    kind: str
    kernel_init: nn.initializers.Initializer = xavier
    grid: int = 0
    qkv_init: nn.initializers.Initializer | None = None  # None: kernel_init
    num_prefix: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        """[B, N, D] -> output [B, N, D] and (q, k, v), each [B, N, H, E]."""
        b, n, d = x.shape
        heads = (3, self.num_heads, d // self.num_heads)
        # Tokens flattened: the gradient of a plain [B*N, D] matmul is the fast one.
        init = self.qkv_init or self.kernel_init
        qkv = nn.DenseGeneral(heads, kernel_init=init, dtype=self.dtype, name="qkv")(x.reshape(b * n, d))
        # Split, not indexed: the gradient of that is one concatenation.
        parts = jax.lax.split(qkv.reshape(b, n, *heads), (1, 1, 1), axis=2)
        q, k, v = (part.squeeze(2).swapaxes(1, 2) for part in parts)  # each [B, H, N, E]
        bias = ()
        if self.grid:
            bias = (RelativePosition(self.grid, self.num_heads, self.num_prefix, name="relative_position")(),)
        out = attention.ATTENTIONS[self.kind](q, k, v, *bias).swapaxes(1, 2).reshape(b * n, d)
        out = nn.Dense(d, kernel_init=self.kernel_init, dtype=self.dtype, name="proj")(out).reshape(b, n, d)
        return out, (q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2))


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    hidden: int
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer = xavier

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        b, n, d = x.shape
        h = nn.Dense(self.hidden, kernel_init=self.kernel_init, dtype=self.dtype, name="fc1")(x.reshape(b * n, d))
        return nn.Dense(d, kernel_init=self.kernel_init, dtype=self.dtype, name="fc2")(gelu(h)).reshape(b, n, d)


class Block(nn.Module):
    """A pre-norm transformer block."""

    num_heads: int
    hidden: int
    dtype: jnp.dtype
    attention: str
    kernel_init: nn.initializers.Initializer = xavier
    eps: float = 1e-6  # of its norms
    grid: int = 0  # as `Attention`
    qkv_init: nn.initializers.Initializer | None = None
    num_prefix: int = 1
    layer_scale: float = 0.0  # where the factors of both branches start; 0: there are none

    @nn.compact
    def __call__(self, x: jax.Array, drop_path: float | jax.Array | None = None) -> tuple[jax.Array, BlockTrace]:
        """[B, N, D] -> output [B, N, D] and everything on the way.

        `drop_path` is the rate at which each residual branch is dropped, per sample (needs the rng "drop_path").
        """

        def drop(branch: jax.Array) -> jax.Array:
            if drop_path is None:
                return branch
            is_kept = jax.random.bernoulli(self.make_rng("drop_path"), 1 - drop_path, (len(branch), 1, 1))
            return jnp.where(is_kept, branch / (1 - drop_path), 0).astype(branch.dtype)

        def scale(branch: jax.Array, name: str) -> jax.Array:
            return LayerScale(self.layer_scale, name=name)(branch) if self.layer_scale else branch

        kinds = (self.num_heads, self.dtype, self.attention, self.kernel_init, self.grid, self.qkv_init)
        attend = Attention(*kinds, self.num_prefix, name="attn")
        norm1 = layer_norm(self.dtype, "norm1", self.eps)(x)
        attn_out, (q, k, v) = attend(norm1)
        attn_out = scale(attn_out, "gamma1")
        mid = x + drop(attn_out)
        norm2 = layer_norm(self.dtype, "norm2", self.eps)(mid)
        mlp_out = scale(Mlp(self.hidden, self.dtype, self.kernel_init, name="mlp")(norm2), "gamma2")
        out = mid + drop(mlp_out)
        return out, BlockTrace(norm1, q, k, v, attn_out, mid, mlp_out, out)


def run_blocks(
    parent: nn.Module, blocks: Sequence[Block], x: jax.Array, drop_path: Sequence[float] | None = None, *,
    remat: bool = False, capture: Collection[int] = (), first: int = 1,
) -> tuple[jax.Array, dict[int, BlockTrace]]:  # fmt: skip
    """[B, N, D] through modules without a parent, as `block<first>`, ... of `parent`; and the traces of those captured.

    Unlike plain children, equal blocks are initialised at once, and those that are not captured are traced once and,
    on a CPU, compiled once. `drop_path` are the blocks' rates.
    """
    names = [f"block{i}" for i in range(first, first + len(blocks))]
    if parent.is_initializing():
        _init_blocks(parent, dict(zip(names, blocks, strict=True)), x)
    rates = drop_path or [0.0] * len(blocks)
    keys = jax.random.split(parent.make_rng("drop_path"), len(blocks)) if any(rates) else None
    trace = {}
    for i, (name, block, rate) in enumerate(zip(names, blocks, rates, strict=True), first):
        params = parent.get_variable("params", name)
        drop = (jnp.float32(rate), keys[i - first]) if rate else None
        if i in capture:
            x, trace[i] = _apply(block, remat, params, x, drop)
        else:
            with compiled_once():
                x = _apply_jitted(block, remat, params, x, drop)
    return x, trace


def _init_blocks(parent: nn.Module, blocks: Mapping[str, Block], x: jax.Array) -> None:
    like = jnp.zeros(x.shape, x.dtype)  # so that nothing waits for what x is made of
    for block in dict.fromkeys(blocks.values()):
        names = [name for name in blocks if blocks[name] == block]
        keys = jax.random.split(parent.make_rng("params"), len(names))
        stacked = jax.vmap(lambda key, block=block: block.init(key, like)["params"])(keys)
        for i, name in enumerate(names):
            parent.param(name, lambda _, i=i, stacked=stacked: jax.tree.map(lambda rows: rows[i], stacked))


def _apply(block: Block, remat: bool, params: Any, x: jax.Array, drop: Any) -> tuple[jax.Array, BlockTrace]:
    def apply(params: Any, x: jax.Array, drop: Any) -> tuple[jax.Array, BlockTrace]:
        rate, key = drop or (None, None)
        return block.apply({"params": params}, x, rate, rngs={} if key is None else {"drop_path": key})

    return (jax.checkpoint(apply) if remat else apply)(params, x, drop)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply_jitted(block: Block, remat: bool, params: Any, x: jax.Array, drop: Any) -> jax.Array:
    return _apply(block, remat, params, x, drop)[0]


_is_for_others = False  # whether what is traced now is for devices that are not the default backend's


def compiled_once() -> contextlib.AbstractContextManager[object]:
    """Jitted functions called in it are compiled once for all their calls: XLA on the CPU is told not to inline them.

    Other compilers are left to do what they do, which is to inline them: untested on hardware.
    """
    is_for_cpu = jax.default_backend() == "cpu" and not _is_for_others
    return set_xla_metadata(inlineable="false") if is_for_cpu else contextlib.nullcontext()


@contextlib.contextmanager
def for_other_devices() -> Iterator[None]:
    """Around what is traced for devices that are described and not at hand."""
    global _is_for_others
    _is_for_others = True
    try:
        yield
    finally:
        _is_for_others = False
