"""The keys and array layouts of other people's checkpoints, in one place.

Three spellings of the same weights: ours (`encoder/block1/attn/qkv/kernel`), MAE's (`blocks.0.attn.qkv.weight`, which
timm, DeiT, TinyMIM and MAE-Lite share) and Hugging Face's (`encoder.layer.0.attention.attention.query.weight`).
"""

import re

import numpy as np

OURS_TO_MAE = (
    (r"^encoder/block(\d+)/", lambda m: f"blocks.{int(m[1]) - 1}."),
    (r"^decoder/block(\d+)/", lambda m: f"decoder_blocks.{int(m[1]) - 1}."),
    (r"^decoder/mask_token$", "mask_token"),
    (r"^decoder/", "decoder_"),
    (r"^encoder/patch_embed/", "patch_embed.proj."),
    (r"^encoder/neck_norm/", "conv1x1.0."),
    (r"^encoder/neck/", "conv1x1.1."),
    (r"^encoder/", ""),
    (r"(?<=[/.])(kernel|scale)$", "weight"),
    (r"/", "."),
)
MAE_TO_HF = (  # of ViTMAEModel and ViTModel; `hf_names` adds what stands in front
    (r"^(decoder_)?blocks\.(\d+)\.", lambda m: f"{'decoder_layers' if m[1] else 'encoder.layer'}.{m[2]}."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.qkv\.", ".attention.attention.qkv."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^norm\.", "layernorm."),
    (r"^head\.", "classifier."),
)
QKV = ("query", "key", "value")


def mae_name(ours: str) -> str:
    """Our key in MAE's spelling."""
    return _rewrite(ours, OURS_TO_MAE)


def hf_names(mae: str, prefix: str = "vit.") -> tuple[str, ...]:
    """MAE's key in Hugging Face's spelling: one name, or three for a fused qkv.

    `prefix` is what a model with a head or a decoder puts before the encoder's names.
    """
    name = _rewrite(mae, MAE_TO_HF)
    if mae.startswith("decoder_") or mae == "mask_token":
        name = "decoder." + name
    elif not mae.startswith("head."):
        name = prefix + name
    return tuple(name.replace(".qkv.", f".{part}.") for part in QKV) if ".qkv." in name else (name,)


def _rewrite(name: str, rules: tuple) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def from_mae(ours: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An array of MAE's layout in ours, of `shape`, which shows the heads of a qkv.

    torch's [out, in] and [out, 3, p, p] become [in, out], the latter's inputs ordered (row, column, channel).
    """
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
    elif ours.endswith("/kernel"):
        array = array.T
    return array.reshape(shape)


def to_mae(ours: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `from_mae`."""
    if ours == "encoder/patch_embed/kernel":
        side = round((len(array) / 3) ** 0.5)
        return array.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)
    if "/qkv/" in ours:
        array = array.reshape(*array.shape[:-3], -1)
    return array.T if ours.endswith("/kernel") else array
