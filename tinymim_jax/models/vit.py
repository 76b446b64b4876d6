"""One plain vision transformer for teacher, student, fine-tuning and features."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import optimization_barrier

from tinymim_jax.models import attention, batch_norm, layers, posembed
from tinymim_jax.models.contract import Encoder, EncoderOutput, Part
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError


@dataclasses.dataclass(unsafe_hash=True)
class ViT(Encoder):
    """A plain vision transformer."""

    width: int  # D
    depth: int = ranged(at_least=1)  # number of blocks
    num_heads: int = ranged(at_least=1)  # H of every block but the last
    last_block_heads: int | None = ranged(None, at_least=1)  # H of the last block; None: num_heads
    mlp_ratio: float = ranged(4.0, above=0)  # hidden width of the MLP over D
    image_size: int = ranged(224, at_least=1)  # pixels a side
    patch_size: int = ranged(16, at_least=1)  # pixels a side
    posembed: Literal["fixed", "trainable"] = "fixed"  # sin-cos table, frozen or a starting point
    relative_position: bool = False  # each block's attention learns a bias by distance (BEiT); of whole images alone
    layer_scale: float = ranged(0.0, at_least=0)  # where learnt factors of each branch's channels start (BEiT); 0: none
    pool: Literal["cls", "mean"] = "cls"  # norm then CLS | mean of patch tokens then fc_norm
    num_classes: int = ranged(0, at_least=0)  # 0: no head
    dist_token: bool = False  # DeiT's distillation token behind CLS, with a head of its own; logits are their mean
    neck: int = ranged(0, at_least=0)  # width of a norm, linear and GELU before the heads (TinyMIM*-T); 0: none
    layer_norm_eps: float = ranged(1e-6, above=0)  # of every norm but the neck's; transformers' own models have 1e-12
    head_norm: bool = False  # BatchNorm without affine before the head (linear probing)
    drop_path: float = ranged(0.0, at_least=0, below=1)  # stochastic depth, per sample, per residual branch
    drop_path_shape: Literal["constant", "linear"] = "constant"  # constant: none in the last block
    # mae: xavier, head 2e-5; deit: truncated normal 0.02 everywhere, biases 0; moco: as mae, with q, k and v each for
    # itself, a class token of 1e-6 and a table whose first half encodes the row
    weight_init: Literal["mae", "deit", "moco"] = "mae"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters are float32
    remat: bool = False  # recompute each block in the backward pass
    attention: Literal["xla", "cudnn"] = "xla"  # cudnn: fused on Nvidia GPUs, in bfloat16; not measured yet
    kind: Literal["vit"] = "vit"

    @property
    def export_formats(self) -> tuple[str, ...]:
        return ("hf", "mae") if self.relative_position or self.layer_scale else ("timm", "hf", "mae", "onnx")

    @property
    def num_prefix(self) -> int:
        return 2 if self.dist_token else 1

    @property
    def mask_unit(self) -> int | None:
        return None if self.relative_position else self.patch_size

    @property
    def label_heads(self) -> int:
        return (1 + self.dist_token) * bool(self.num_classes)

    @property
    def has_state(self) -> bool:
        return self.head_norm

    def merge_state(self, before: Any, parts: Any, rows: int) -> Any:
        return batch_norm.merge(before, parts, rows)

    def stateless(self, variables: Mapping[str, Any]) -> tuple["ViT", Mapping[str, Any]]:
        """The BatchNorm before the head, which has no parameters, becomes part of the head's kernel and bias."""
        params = variables["params"]
        if not self.head_norm:
            return self, params
        kernel, bias = batch_norm.fold(**params["encoder"]["head"], **variables["batch_stats"]["head_norm"])
        head = {"kernel": kernel, "bias": bias}
        return dataclasses.replace(self, head_norm=False), {**params, "encoder": {**params["encoder"], "head": head}}

    def check_masked(self, where: str) -> None:
        if self.relative_position:
            raise InputError(f"{where}: model.relative_position needs whole images; set it to False")
        if self.pool != "cls" or self.num_classes or self.dist_token:
            raise InputError(
                f"{where}: mae needs model.pool 'cls', whose norm feeds the decoder, no num_classes and no dist_token"
            )

    @property
    def fixed(self) -> tuple[str, ...]:
        return ("encoder/pos_embed",) if self.posembed == "fixed" else ()

    @property
    def features_on_cls(self) -> bool:
        return bool(self.num_classes) and self.pool == "cls"

    def build(self) -> "VisionTransformer":
        return VisionTransformer(self)

    def check(self, where: str) -> None:
        if self.image_size % self.patch_size:
            raise InputError(f"{where}: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % 4:
            raise InputError(f"{where}: width {self.width} is not a multiple of 4, which sin-cos positions need")
        for field in ("num_heads", "last_block_heads"):
            if self.width % (getattr(self, field) or 1):
                raise InputError(f"{where}: width {self.width} is not a multiple of {field} {getattr(self, field)}")
        if self.neck and (not self.num_classes or self.pool != "mean"):
            raise InputError(f"{where}: neck {self.neck} needs pool 'mean' and num_classes; set them, or neck=0")
        if self.relative_position and self.attention != "xla":
            raise InputError(f"{where}: relative_position needs attention 'xla'; set attention=xla")
        attention.check(where, self.attention, self.dtype, self.width, {self.num_heads, self.heads_of(self.depth)})

    def summary(self) -> str:
        last = f" ({self.last_block_heads} in the last block)" if self.last_block_heads else ""
        extras = ", relative positions" * self.relative_position + ", layer scale" * bool(self.layer_scale)
        head = f"{self.num_classes} classes on the {'mean patch' if self.pool == 'mean' else 'CLS'} token"
        return (
            f"ViT, width {self.width}, {self.depth} blocks, {self.num_heads} heads{last}, {self.image_size} px in"
            f" patches of {self.patch_size}, {head if self.num_classes else 'no head'}{extras}"
        )

    def width_of(self, block: int) -> int:
        return self.width

    def heads_of(self, block: int) -> int:
        return self.last_block_heads if block == self.depth and self.last_block_heads else self.num_heads

    def layer_id(self, name: str) -> int:
        if re.fullmatch(r"encoder/(cls_token|pos_embed|patch_embed/.*)", name):
            return 0
        if block := re.match(r"encoder/block(\d+)/", name):
            return int(block[1])
        if re.fullmatch(r"encoder/(dist_token|(norm|neck_norm|neck|fc_norm|head|head_dist|head_norm)/.*)", name):
            return self.depth + 1
        raise InputError(f"a ViT has no parameter {name}, so no layer for it")

    def reads(self, name: str, block: int, part: Part = "all", norm: bool = False) -> bool:
        # It stands before the blocks, though layer decay counts it behind them.
        return name == "encoder/dist_token" or super().reads(name, block, part, norm)

    def is_behind(self, name: str, part: Part) -> bool:
        mlp = "norm2|mlp|gamma2"
        qkv = f"attn/proj|attn/relative_position|gamma1|{mlp}"
        behind = {"norm1": f"attn|gamma1|{mlp}", "qkv": qkv, "attention": mlp}
        return part != "all" and bool(re.match(rf"encoder/block\d+/({behind[part]})/", name))

    def trunk(self, block: int, norm: bool = False) -> "ViT":
        bare = {"pool": "cls" if norm else "mean", "num_classes": 0, "neck": 0, "head_norm": False}
        return dataclasses.replace(self, depth=block, last_block_heads=self.heads_of(block), **bare)

    def check_norm(self, where: str) -> None:
        if self.pool != "cls":
            raise InputError(f"{where}: model.pool 'mean' has no norm behind the blocks; set it to 'cls'")

    def is_norm(self, name: str) -> bool:
        return name.startswith("encoder/norm/")

    def attention_bias(self, params: Mapping[str, Any], block: int) -> jax.Array | None:
        if not self.relative_position:
            return None
        bias = layers.RelativePosition(self.grid, self.heads_of(block), self.num_prefix)
        return bias.apply({"params": params["encoder"][f"block{block}"]["attn"]["relative_position"]})

    def dropping(self, rate: float, where: str) -> "ViT":
        return dataclasses.replace(self, drop_path=rate)

    def computing_like(self, other: Encoder) -> "ViT":
        computed = {"dtype": other.dtype, "attention": other.attention, "remat": False}
        like = dataclasses.replace(self, image_size=other.image_size, **computed)
        like.check("the teacher")
        return like

    def embed_flops(self, patches: int) -> float:
        return 2.0 * patches * 3 * self.patch_size**2 * self.width

    def block_flops(self, block: int, patches: int, part: Part = "all") -> float:
        n, d = patches + self.num_prefix, self.width
        qkv, attention, mlp = 6.0 * n * d * d, 2.0 * n * d * d + 4.0 * n * n * d, 4.0 * n * d * int(d * self.mlp_ratio)
        return {"norm1": 0.0, "qkv": qkv, "attention": qkv + attention, "all": qkv + attention + mlp}[part]

    def head_flops(self, patches: int) -> float:
        neck = 2.0 * (patches + self.num_prefix) * self.width * self.neck
        return neck + 2.0 * (self.neck or self.width) * self.num_classes * (1 + self.dist_token)


class VisionTransformer(nn.Module):
    """What a `ViT` describes. Blocks are numbered from 1, as in the paper."""

    cfg: ViT

    @nn.compact
    def __call__(
        self, images: jax.Array, *, capture: Sequence[int] = (), train: bool = False, keep: jax.Array | None = None
    ) -> EncoderOutput:
        """Encodes normalised images.

        Args:
          images: [B, image_size, image_size, 3] float.
          capture: blocks whose trace is returned. Under jit, blocks that nothing reads are not computed.
          train: drop path on (needs the rng "drop_path").
          keep: [B, K] indices of the patches to see; None: all.
        """
        cfg = self.cfg
        self._check_input(images, capture)
        dtype = jnp.dtype(cfg.dtype)
        x = self._embed(images.astype(dtype), keep)
        kinds = (int(cfg.width * cfg.mlp_ratio), dtype, cfg.attention, self._kernel_init(), cfg.layer_norm_eps)
        numbers = range(1, cfg.depth + 1)
        grid = cfg.grid if cfg.relative_position else 0
        qkv_init = layers.xavier_of_three if cfg.weight_init == "moco" else None
        extras = (grid, qkv_init, cfg.num_prefix, cfg.layer_scale)
        blocks = [layers.Block(cfg.heads_of(i), *kinds, *extras, parent=None) for i in numbers]
        drop_path = [self._drop_path(i) for i in numbers] if train else None
        x, trace = layers.run_blocks(self, blocks, x, drop_path, remat=cfg.remat, capture=capture)
        on_cls = cfg.pool == "cls"
        norm = layers.layer_norm(dtype if on_cls else jnp.float32, "norm" if on_cls else "fc_norm", cfg.layer_norm_eps)
        x = norm(x) if on_cls else x
        if on_cls or (cfg.num_classes and not cfg.neck):
            trace = {i: block.replace(normed=norm(block.out).astype(dtype)) for i, block in trace.items()}
        if not cfg.num_classes:
            return EncoderOutput(x, trace)
        heads = self._heads(x, norm, train)
        return EncoderOutput(x, trace, (), sum(heads) / len(heads), heads)

    def _check_input(self, images: jax.Array, capture: Sequence[int]) -> None:
        size = self.cfg.image_size
        if images.shape[1:] != (size, size, 3):
            raise InputError(f"images are {list(images.shape)}, the model wants [B, {size}, {size}, 3]")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(f"images are {images.dtype}, the model wants floats, normalised by data.mean, data.std")
        if not isinstance(capture, Sequence):
            raise InputError(f"capture is {capture!r}; it is a sequence of blocks, e.g. ({capture},)")
        beyond = [i for i in capture if not 1 <= i <= self.cfg.depth]
        if beyond:
            raise InputError(f"block {beyond[0]} is beyond the model's {self.cfg.depth} blocks")

    def _kernel_init(self) -> nn.initializers.Initializer:
        # torch's trunc_normal_ cuts at 2, which is 100 standard deviations away: nothing is cut.
        return layers.normal if self.cfg.weight_init == "deit" else layers.xavier

    def _embed(self, images: jax.Array, keep: jax.Array | None) -> jax.Array:
        """Patch embedding plus positions, CLS (and the distillation token) in front: [B, N, D]."""
        cfg, extra = self.cfg, self.cfg.num_prefix
        table, is_moco = posembed.sincos(cfg.grid, cfg.width, extra), cfg.weight_init == "moco"
        table = np.roll(table, cfg.width // 2, axis=-1) if is_moco else table
        is_random = cfg.weight_init == "deit" and cfg.posembed == "trainable"
        start = layers.normal if is_random else lambda *_: jnp.asarray(table)
        pos = self.param("pos_embed", start, table.shape).astype(images.dtype)
        names = ("cls_token", "dist_token")[:extra]
        token_init = nn.initializers.normal(1e-6) if is_moco else layers.normal
        tokens = [self.param(name, token_init, (1, 1, cfg.width)) for name in names]
        front = jnp.concatenate(tokens, axis=1).astype(images.dtype) + pos[:, :extra]
        patches, patch_pos = layers.patchify(images, cfg.patch_size), pos[:, extra:]
        if keep is not None:
            patches = jnp.take_along_axis(patches, keep[..., None], axis=1)
            patch_pos = patch_pos[0][keep]
        values = patches.shape[-1]
        # torch's default for a convolution, which MAE and TinyMIM keep for its bias, and DeiT for its kernel, too.
        uniform = layers.torch_uniform(values)
        kernel_init = uniform if cfg.weight_init == "deit" else layers.xavier
        bias_init = nn.initializers.zeros if is_moco else uniform
        embed = nn.Dense(
            cfg.width, kernel_init=kernel_init, bias_init=bias_init, dtype=images.dtype, name="patch_embed"
        )
        # Made once: else XLA on the CPU makes each pixel anew, augmentation included, in the gradient of the kernel.
        patches = optimization_barrier(patches.reshape(-1, values))
        x = embed(patches).reshape(len(images), -1, cfg.width) + patch_pos
        return jnp.concatenate([jnp.broadcast_to(front, (len(x), extra, cfg.width)), x], axis=1)

    def _drop_path(self, block: int) -> float:
        if self.cfg.drop_path_shape == "linear":
            return self.cfg.drop_path * (block - 1) / max(self.cfg.depth - 1, 1)
        return self.cfg.drop_path if block < self.cfg.depth else 0.0

    def _heads(self, x: jax.Array, norm: nn.Module, train: bool) -> tuple[jax.Array, ...]:
        """[B, N, D] -> logits [B, C] of each head, float32."""
        cfg = self.cfg
        if cfg.neck:
            x = nn.LayerNorm(epsilon=1e-5, dtype=x.dtype, use_fast_variance=False, name="neck_norm")(x)
            x = layers.gelu(nn.Dense(cfg.neck, kernel_init=layers.xavier, dtype=x.dtype, name="neck")(x))
        x = x.astype(jnp.float32)
        if cfg.pool == "mean":
            pooled = norm(x[:, cfg.num_prefix :].mean(axis=1))
        else:
            pooled = x[:, 0]
        if cfg.head_norm:  # MAE's main_linprobe.py
            pooled = batch_norm.BatchNorm(batch_norm.PROBE_EPS, name="head_norm")(pooled, train)
        inputs = {"head": pooled, "head_dist": x[:, 1]} if cfg.dist_token else {"head": pooled}
        init = nn.initializers.normal(0.01 if cfg.head_norm else 2e-5)  # not cut, as in `_kernel_init`
        if cfg.weight_init == "deit":
            init = self._kernel_init()
        return tuple(nn.Dense(cfg.num_classes, kernel_init=init, name=k)(v) for k, v in inputs.items())
