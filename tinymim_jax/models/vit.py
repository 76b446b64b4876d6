"""One vision transformer for teacher, student, fine-tuning and features."""

import dataclasses
from collections.abc import Mapping, Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.lax import optimization_barrier

from tinymim_jax.experiment import config
from tinymim_jax.models import layers, posembed
from tinymim_jax.models.layers import Block, BlockTrace, patchify
from tinymim_jax.runtime.errors import InputError


@flax.struct.dataclass
class ViTOutput:
    """tokens [B, N, D]: the last block's output, normed if pool is "cls". logits [B, C] if there is a head.

    With a distillation token, logits are the mean of its head's and the other's, which `heads` has apart.
    """

    tokens: jax.Array
    trace: Mapping[int, BlockTrace]
    logits: jax.Array | None = None
    heads: tuple[jax.Array, ...] = ()  # [B, C] each: of the pooled or CLS token, of the distillation token


class VisionTransformer(nn.Module):
    """A plain ViT; the fields are those of `config.ViT`. Blocks are numbered from 1, as in the paper."""

    width: int
    depth: int
    num_heads: int
    last_block_heads: int | None = None
    mlp_ratio: float = 4.0
    image_size: int = 224
    patch_size: int = 16
    posembed: str = "fixed"
    pool: str = "cls"
    num_classes: int = 0
    dist_token: bool = False
    neck: int = 0
    head_norm: bool = False
    drop_path: float = 0.0
    drop_path_shape: str = "constant"
    dtype: str = "float32"
    remat: bool = False
    attention: str = "xla"

    @nn.compact
    def __call__(
        self, images: jax.Array, *, capture: Sequence[int] = (), train: bool = False, keep: jax.Array | None = None
    ) -> ViTOutput:
        """Encodes normalised images.

        Args:
          images: [B, image_size, image_size, 3] float.
          capture: blocks whose trace is returned. Under jit, blocks that nothing reads are not computed.
          train: drop path on (needs the rng "drop_path").
          keep: [B, K] indices of the patches to see; None: all.
        """
        self._check_input(images, capture)
        dtype = jnp.dtype(self.dtype)
        x = self._embed(images.astype(dtype), keep)
        block_class = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        hidden, trace = int(self.width * self.mlp_ratio), {}
        for i in range(1, self.depth + 1):
            sizes = (heads_of(self, i), hidden, self._drop_path(i))
            x, block_trace = block_class(*sizes, dtype, self.attention, name=f"block{i}")(x, train)
            if i in capture:
                trace[i] = block_trace
        if self.pool == "cls":
            x = layers.layer_norm(dtype, "norm")(x)
        if not self.num_classes:
            return ViTOutput(x, trace)
        heads = self._heads(x, train)
        return ViTOutput(x, trace, sum(heads) / len(heads), heads)

    def _check_input(self, images: jax.Array, capture: Sequence[int]) -> None:
        size = self.image_size
        if images.shape[1:] != (size, size, 3):
            raise InputError(f"images are {list(images.shape)}, the model wants [B, {size}, {size}, 3]")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(f"images are {images.dtype}, the model wants floats, normalised by data.mean, data.std")
        if not isinstance(capture, Sequence):
            raise InputError(f"capture is {capture!r}; it is a sequence of blocks, e.g. ({capture},)")
        beyond = [i for i in capture if not 1 <= i <= self.depth]
        if beyond:
            raise InputError(f"block {beyond[0]} is beyond the model's {self.depth} blocks")

    def _embed(self, images: jax.Array, keep: jax.Array | None) -> jax.Array:
        """Patch embedding plus positions, CLS (and the distillation token) in front: [B, N, D]."""
        grid, extra = self.image_size // self.patch_size, num_extra(self)
        table = posembed.sincos(grid, self.width, extra)
        pos = self.param("pos_embed", lambda _: jnp.asarray(table)).astype(images.dtype)
        names = ("cls_token", "dist_token")[:extra]
        tokens = [self.param(name, nn.initializers.normal(0.02), (1, 1, self.width)) for name in names]
        front = jnp.concatenate(tokens, axis=1).astype(images.dtype) + pos[:, :extra]
        patches, patch_pos = patchify(images, self.patch_size), pos[:, extra:]
        if keep is not None:
            patches = jnp.take_along_axis(patches, keep[..., None], axis=1)
            patch_pos = patch_pos[0][keep]
        values = patches.shape[-1]
        # torch's default for a convolution's bias, which MAE and TinyMIM keep.
        bias_init = nn.initializers.uniform(2 * values**-0.5)
        embed = nn.Dense(
            self.width,
            kernel_init=layers.xavier,
            bias_init=lambda *a: bias_init(*a) - values**-0.5,
            dtype=images.dtype,
            name="patch_embed",
        )
        # Made once: else XLA on the CPU makes each pixel anew, augmentation included, in the gradient of the kernel.
        patches = optimization_barrier(patches.reshape(-1, values))
        x = embed(patches).reshape(len(images), -1, self.width) + patch_pos
        return jnp.concatenate([jnp.broadcast_to(front, (len(x), extra, self.width)), x], axis=1)

    def _drop_path(self, block: int) -> float:
        if self.drop_path_shape == "linear":
            return self.drop_path * (block - 1) / max(self.depth - 1, 1)
        return self.drop_path if block < self.depth else 0.0

    def _heads(self, x: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """[B, N, D] -> logits [B, C] of each head, float32."""
        if self.neck:
            x = nn.LayerNorm(epsilon=1e-5, dtype=x.dtype, use_fast_variance=False, name="neck_norm")(x)
            x = layers.gelu(nn.Dense(self.neck, kernel_init=layers.xavier, dtype=x.dtype, name="neck")(x))
        x = x.astype(jnp.float32)
        if self.pool == "mean":
            pooled = layers.layer_norm(jnp.float32, "fc_norm")(x[:, num_extra(self) :].mean(axis=1))
        else:
            pooled = x[:, 0]
        if self.head_norm:  # MAE's main_linprobe.py; torch's momentum 0.1
            norm = {"use_running_average": not train, "momentum": 0.9, "epsilon": 1e-6, "name": "head_norm"}
            pooled = nn.BatchNorm(use_bias=False, use_scale=False, **norm)(pooled)
        inputs = {"head": pooled, "head_dist": x[:, 1]} if self.dist_token else {"head": pooled}
        init = nn.initializers.truncated_normal(0.01) if self.head_norm else nn.initializers.normal(2e-5)
        return tuple(nn.Dense(self.num_classes, kernel_init=init, name=k)(v) for k, v in inputs.items())


def build(cfg: config.ViT) -> VisionTransformer:
    """The module that `cfg` describes."""
    return VisionTransformer(**dataclasses.asdict(cfg))


def heads_of(cfg: "config.ViT | VisionTransformer", block: int) -> int:
    """The number of heads of `block` (from 1)."""
    return cfg.last_block_heads if block == cfg.depth and cfg.last_block_heads else cfg.num_heads


def num_extra(cfg: "config.ViT | VisionTransformer") -> int:
    """The number of tokens in front of the patches."""
    return 2 if cfg.dist_token else 1
