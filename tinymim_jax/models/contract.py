"""What an encoder's config answers and what the encoder returns, so that nothing else asks which encoder it has.

Shapes: B batch, N tokens, L patch tokens, D width, H heads, E head width, C classes.
"""

import abc
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from tinymim_jax.runtime.errors import InputError

Pool = Literal["cls", "mean"]  # the first token, the mean patch token
Part = Literal["norm1", "qkv", "attention", "all"]  # of a block: up to its norm1, its q, k, v, its attention, whole
PARTS = get_args(Part)


@flax.struct.dataclass
class BlockTrace:
    """What one block computed; under jit, what nothing reads is not computed. None: this block has no such thing."""

    norm1: jax.Array | None = None  # [B, N, D], what attention reads
    q: jax.Array | None = None  # [B, N, H, E]
    k: jax.Array | None = None  # [B, N, H, E]
    v: jax.Array | None = None  # [B, N, H, E]
    attn_out: jax.Array | None = None  # [B, N, D], before the shortcut is added
    mid: jax.Array | None = None  # [B, N, D], behind it
    mlp_out: jax.Array | None = None  # [B, N, D], before the shortcut is added
    out: jax.Array | None = None  # [B, N, D]
    normed: jax.Array | None = None  # [B, N, D], `out` through the norm that stands behind the last block


@flax.struct.dataclass
class EncoderOutput:
    """tokens [B, N, D] as the last block leaves them, or its norm; trace of the captured blocks, numbered from 1.

    logits [B, C] if there is a head; `heads` has those of each head apart, where there are several. `stages` are the
    outputs of a hierarchical encoder's stages.
    """

    tokens: jax.Array
    trace: Mapping[int, BlockTrace]
    stages: tuple[jax.Array, ...] = ()
    logits: jax.Array | None = None
    heads: tuple[jax.Array, ...] = ()


@flax.struct.dataclass
class Outputs:
    """What evaluators read: features [B, D] of frozen-feature probes, logits [B, C] or of pixels [B, h, w, C]."""

    features: jax.Array
    logits: jax.Array | None = None
    pixels: jax.Array | None = None


class Encoder(abc.ABC):
    """The config of an encoder, a dataclass with a `kind` that `models.MODELS` lists.

    Parameters are named by `layer_id`'s rules; a fused `.../qkv/...` ends in [3, H, E], so that its heads can be
    regrouped, and a `pos_embed` is [1, prefix + grid^2, D], so that it can be resized.
    """

    kind: str
    depth: int  # blocks
    last_block_heads: Any = None  # H of the last block, if it differs from that of the others
    image_size: int  # pixels a side
    num_classes: int  # 0: no head
    dtype: str  # of the computation
    remat: bool  # recompute each block in the backward pass
    drop_path: Any = 0.0  # the largest rate in training
    attention: Any = "xla"  # who computes attention, of those that attention.ATTENTIONS has
    layer_norm_eps: Any = 1e-6  # of its norms, and of those of a decoder behind it
    num_prefix: ClassVar[Any]  # tokens in front of the patches
    patch_size: Any  # pixels a side of a token's patch
    export_formats: Any = ()  # of other projects, that can hold it (`bridge.export`)

    @abc.abstractmethod
    def build(self) -> nn.Module:
        """The module; `apply(variables, images, capture=(), train=False, keep=None) -> EncoderOutput`."""

    @abc.abstractmethod
    def check(self, where: str) -> None:
        """Raises InputError, naming fields by `where`, on a combination that cannot be built."""

    @abc.abstractmethod
    def summary(self) -> str:
        """The model in a line, for people."""

    @abc.abstractmethod
    def width_of(self, block: int) -> int:
        """D of what `block` (from 1) puts out."""

    @abc.abstractmethod
    def heads_of(self, block: int) -> int:
        """H of `block`."""

    @abc.abstractmethod
    def layer_id(self, name: str) -> int:
        """0 for embeddings, i for block i, depth + 1 for what follows; InputError if there is no such parameter."""

    def block_of(self, name: str) -> int | None:
        """The block that parameter `name` belongs to; None: it stands in front of the blocks or behind them."""
        layer = self.layer_id(name)
        return layer if 1 <= layer <= self.depth else None

    @abc.abstractmethod
    def is_behind(self, name: str, part: Part) -> bool:
        """Whether that part of the block that parameter `name` belongs to does not depend on it."""

    @abc.abstractmethod
    def trunk(self, block: int, norm: bool = False) -> "Encoder":
        """The encoder up to `block`, without head; with the norm that stands behind the last block, or without."""

    def check_norm(self, where: str) -> None:
        """Raises InputError, naming `where`, if no norm stands behind the last block."""
        raise InputError(f"{where}: an encoder of kind {self.kind!r} has no norm behind its blocks")

    def is_norm(self, name: str) -> bool:
        """Whether parameter `name` is of the norm that stands behind the last block."""
        return False

    @abc.abstractmethod
    def computing_like(self, other: "Encoder") -> "Encoder":
        """The encoder as it computes on the images of `other`: dtype, image size. InputError if it cannot see them."""

    def dropping(self, rate: float, where: str) -> "Encoder":
        """The encoder with this rate of drop path; raises InputError, naming `where`, if it drops no paths."""
        raise InputError(f"{where}: an encoder of kind {self.kind!r} drops no paths; set it to 0")

    @abc.abstractmethod
    def embed_flops(self, patches: int) -> float:
        """Matmul FLOPs of the patch embedding of one image of which `patches` are seen."""

    @abc.abstractmethod
    def block_flops(self, block: int, patches: int, part: Part = "all") -> float:
        """Matmul FLOPs of one block's forward pass, or of that part of it."""

    def head_flops(self, patches: int) -> float:
        """Matmul FLOPs of what stands behind the blocks."""
        return 2.0 * self.width_of(self.depth) * self.num_classes

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size

    @property
    def mask_unit(self) -> int | None:
        """Pixels a side of what a mask hides (`keep` takes indices of such units); None: it cannot be masked."""
        return None

    @property
    def unit(self) -> int:
        """Patches a side of what a mask hides."""
        return (self.mask_unit or self.patch_size) // self.patch_size

    @property
    def units(self) -> int:
        """How many of them an image has."""
        return (self.grid // self.unit) ** 2

    def visible(self, mask_ratio: float) -> int:
        """Patches of an image that a mask leaves over."""
        return int(self.units * (1 - mask_ratio)) * self.unit**2

    def grid_of(self, block: int) -> int | None:
        """Tokens a side that q, k and v of `block` are of; None: they are of windows, or not equally many."""
        return self.grid

    def check_masked(self, where: str) -> None:
        """Raises InputError if it cannot be trained on the patches that a mask leaves over."""
        if self.mask_unit is None:
            raise InputError(f"{where}: the encoder {self.kind!r} cannot be masked, so it has no masked auto-encoding")

    @property
    def label_heads(self) -> int:
        """Heads that learn labels apart: 2 with a distillation token."""
        return 1 if self.num_classes else 0

    @property
    def has_state(self) -> bool:
        """Whether it needs collections beside its parameters."""
        return False

    def merge_state(self, before: Any, parts: Any, rows: int) -> Any:
        """The state behind a batch from those behind its K parts of `rows` rows, [K, ...], which began at `before`."""
        return jax.tree.map(lambda values: values.mean(axis=0), parts)

    def stateless(self, variables: Mapping[str, Any]) -> tuple["Encoder", Mapping[str, Any]]:
        """An encoder without state, and its params, that evaluates like this one with `variables`, numpy arrays."""
        return self, variables["params"]

    @property
    def fixed(self) -> tuple[str, ...]:
        """Regexes of parameters that are never trained."""
        return ()

    @property
    def features_on_cls(self) -> bool:
        """Whether probes read the first token and not the mean patch token."""
        return False

    def attention_bias(self, params: Mapping[str, Any], block: int) -> jax.Array | None:
        """What `params` of a whole model add to the logits of a block's attention, [H, N, N]; None: nothing."""
        return None

    def reads(self, name: str, block: int, part: Part = "all", norm: bool = False) -> bool:
        """Whether parameter `name` matters for that part of `block`, or for what stands behind the last, if `norm`."""
        layer = self.layer_id(name)
        if layer > self.depth:
            return norm and self.is_norm(name)
        return layer < block or (layer == block and not self.is_behind(name, part))

    def half_trained(self, names: Iterable[str], untrained: Collection[str]) -> int | None:
        """The first block, with its parameters among `names`, of which nothing behind a `Part` was trained, or None."""
        blocks: dict[int, list[str]] = {}
        for name in names:
            if name.startswith("encoder/") and (block := self.block_of(name)):
                blocks.setdefault(block, []).append(name)
        return min((block for block, own in blocks.items() if self.trained_part(own, untrained)), default=None)

    def trained_part(self, names: Iterable[str], untrained: Collection[str]) -> Part | None:
        """The part behind which nothing of the block with parameters `names` was trained; None: it is no such block."""
        found = {name: name in untrained for name in names}
        for part in PARTS[:-1]:
            behind = {name: self.is_behind(name, part) for name in found}
            if found == behind and len(set(behind.values())) == 2:
                return part
        return None

    def forward_flops(self, patches: int | None = None, block: int | None = None, part: Part = "all") -> float:
        """Of one image's forward pass, a multiply-add counting as 2; up to that part of `block`, if there is one."""
        seen, last = patches or self.grid**2, block or self.depth
        blocks = sum(self.block_flops(i, seen, part if i == last else "all") for i in range(1, last + 1))
        return self.embed_flops(seen) + blocks + (0.0 if block else self.head_flops(seen))

    def train_flops(
        self, patches: int | None = None, block: int | None = None, part: Part = "all", *, frozen_blocks: int = 0
    ) -> float:
        """Forward and backward; pixels get no gradient, nor does what lies below `frozen_blocks`."""
        seen = patches or self.grid**2
        frozen = sum(2 * self.block_flops(i, seen) for i in range(1, frozen_blocks + 1))
        embed = self.embed_flops(seen) * (2 if frozen_blocks else 1)
        return 3 * self.forward_flops(patches, block, part) - embed - frozen

    def encode(
        self, variables: Mapping[str, Any], images: jax.Array, capture: Sequence[int] = (), **options: Any
    ) -> EncoderOutput:
        """What `build` makes of normalised images, for `variables` of a whole model; `options` as of its module."""
        encoder = {**variables, "params": variables["params"]["encoder"]}
        return self.build().apply(encoder, images, capture=capture, **options)

    def outputs(
        self, variables: Mapping[str, Any], images: jax.Array, block: int | None = None, pool: Pool | None = None
    ) -> Outputs:
        """What evaluators read, for normalised images [B, S, S, 3] and `variables` of a whole model (`encoder/...`).

        Features are those of the last block, or as they leave `block`, and then there are no logits; of the token that
        `pool` names, or else that the head reads. Raises InputError if there is no such token.
        """
        on_cls = self.features_on_cls if pool is None else pool == "cls"
        if on_cls and not self.num_prefix:
            raise InputError(f"an encoder of kind {self.kind!r} has no token for pool 'cls'; use 'mean'")
        out = self.encode(variables, images, () if block is None else (block,))
        tokens = (out.tokens if block is None else out.trace[block].out).astype(jnp.float32)
        features = tokens[:, 0] if on_cls else tokens[:, self.num_prefix :].mean(axis=1)
        return Outputs(features, out.logits if block is None else None)
