"""The keys and array layouts of other people's checkpoints, in one place.

Three spellings of the same weights: ours (`encoder/block1/attn/qkv/kernel`), MAE's (`blocks.0.attn.qkv.weight`, which
timm, DeiT, TinyMIM and MAE-Lite share; pyramid and heads as mmseg has them behind `backbone.`) and Hugging Face's
(`encoder.layer.0.attention.attention.query.weight`).
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinymim_jax.runtime.errors import InputError
from tinymim_jax.weights.handoff import RELATIVE

DECODER = "pretext/decoder/"  # how our keys of MAE's decoder begin
HEADS = ("decode_head.", "auxiliary_head.")  # how mmseg's names of heads for pixels begin
CLASSIFIER = "decode_head.conv_seg.weight"  # what every model that segments has
BINS = (1, 2, 3, 6)  # mmseg's
TABLE = "blocks.0.attn.relative_position_bias_table"  # of a model whose attention has a bias by distance
FPN1 = {"up1": 0, "norm": 1, "up2": 3}
UP, UP_AXES = "_up", (0, 2, 3, 1)  # in our names of transposed convolutions, and torch's axes in our order
OURS_TO_MAE = (
    (r"^(pretext|batch_stats)/(?=(pyramid|head|aux)/)", ""),
    (r"^pyramid/fc_norm/", "conv1x1.0."),
    (r"^pyramid/fc/", "conv1x1.1."),
    (r"^pyramid/level1_(\w+)/", lambda m: f"fpn1.{FPN1[m[1]]}."),
    (r"^pyramid/level2_up/", "fpn2.0."),
    (r"^pyramid/level3_conv/", "fpn3."),
    (r"^pyramid/level4_conv/", "fpn4.0."),
    (r"^head/(lateral|fpn)(\d)/", lambda m: f"head/{m[1]}_convs.{int(m[2]) - 1}."),
    (r"^head/fuse/", "head/fpn_bottleneck."),
    (r"^aux/conv(\d)/", lambda m: f"aux/convs.{int(m[1]) - 1}."),
    (r"^(head|aux)/classifier/", r"\1/conv_seg."),
    (r"^((head|aux)/.*)\bnorm/", r"\1bn."),
    (r"^head/", HEADS[0]),
    (r"^aux/", HEADS[1]),
    (r"(?<=[/.])(?=(mean|var)$)", "running_"),
    (r"/relative_position/kernel$", "/relative_position_bias_table"),
    (r"/gamma(\d)/scale$", r"/gamma_\1"),
    (r"^encoder/block(\d+)/", lambda m: f"blocks.{int(m[1]) - 1}."),
    (rf"^{DECODER}block(\d+)/", lambda m: f"decoder_blocks.{int(m[1]) - 1}."),
    (rf"^{DECODER}mask_token$", "mask_token"),
    (rf"^{DECODER}", "decoder_"),
    (r"^encoder/patch_embed/", "patch_embed.proj."),
    (r"\bshortcut/", "proj/"),
    (r"^encoder/fuse(\d)/", lambda m: f"multi_scale_fusion_heads.{int(m[1]) - 1}."),
    (r"^encoder/neck_norm/", "conv1x1.0."),
    (r"^encoder/neck/", "conv1x1.1."),
    (r"^encoder/", ""),
    (r"(?<=[/.])(kernel|scale)$", "weight"),
    (r"/", "."),
)
OF_DECODER = ("decoder_", "mask_token")  # how MAE's names of the decoder begin
HF_STARTS = (  # how names begin, MAE's and Hugging Face's (ViTMAEModel, ViTModel); {}: what it puts before the encoder
    ("decoder_blocks.", "decoder.decoder_layers."),
    ("decoder_", "decoder.decoder_"),
    ("mask_token", "decoder.mask_token"),
    *((f"{head}conv_seg.", f"{head}classifier.") for head in HEADS),
    *((head, head) for head in HEADS),
    ("head.", "classifier."),
    ("blocks.", "{}encoder.layer."),
    ("patch_embed.proj.", "{}embeddings.patch_embeddings.projection."),
    ("cls_token", "{}embeddings.cls_token"),
    ("pos_embed", "{}embeddings.position_embeddings"),
    ("norm.", "{}layernorm."),
    ("fc_norm.", "{}pooler.layernorm."),  # BEiT's
    ("", "{}"),
)
HF_PARTS = (  # of a block
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.qkv.", ".attention.attention.qkv."),
    (".attn.proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
    (".attn.relative_position_bias_table", ".attention.attention.relative_position_bias.relative_position_bias_table"),
    (".gamma_", ".lambda_"),
    (".bn.", ".batch_norm."),  # UperNet's, where BEiT's own head has bn
)
PREFIXES = ("vit.", "beit.", "backbone.")  # what stands before the encoder's names in Hugging Face's spelling
QKV = ("query", "key", "value")


def bins_of(task: Any) -> Sequence[int]:
    """The bins of a task's head, by which its modules are numbered; where there are none, mmseg's."""
    return getattr(getattr(task, "head", None), "bins", BINS)


def mae_name(ours: str, bins: Sequence[int] = BINS) -> str:
    """Our key in MAE's spelling; `bins` are UPerNet's."""
    ours = re.sub(r"(?<=/)pool(\d+)/", lambda m: f"psp_modules.{bins.index(int(m[1]))}.1.", ours)
    for pattern, replacement in OURS_TO_MAE:
        ours = re.sub(pattern, replacement, ours)
    return ours


def hf_names(mae: str, prefix: str = "vit.") -> tuple[str, ...]:
    """MAE's key in Hugging Face's spelling: one name, or three for a fused qkv.

    `prefix` is what a model with a head or a decoder puts before the encoder's names.
    """
    start, theirs = next(pair for pair in HF_STARTS if mae.startswith(pair[0]))
    name = theirs.format(prefix) + mae.removeprefix(start)
    for part, theirs in HF_PARTS:
        name = name.replace(part, theirs)
    return tuple(name.replace(".qkv.", f".{part}.") for part in QKV) if ".qkv." in name else (name,)


def _mae_name_of_hf(name: str, prefix: str) -> str:
    name = re.sub(rf"(?<=\.attention\.attention\.)({'|'.join(QKV)})(?=\.)", "qkv", name)
    start, theirs = next(
        ((start, theirs) for start, theirs in HF_STARTS if name.startswith(theirs.format(prefix))), ("", "")
    )
    name = start + name.removeprefix(theirs.format(prefix))
    for part, theirs in HF_PARTS:
        name = name.replace(theirs, part)
    return name


def to_hf(arrays: dict[str, np.ndarray], prefix: str = "vit.") -> dict[str, np.ndarray]:
    """Arrays by MAE's names in Hugging Face's spelling, q, k and v apart."""
    split = {}
    for mae, array in arrays.items():
        names = hf_names(mae, prefix)
        split |= zip(names, np.split(array, len(names)) if len(names) > 1 else [array], strict=True)
    return split


def from_hf(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `to_hf`, where other names stay; raises InputError on q, k, v that do not go together.

    The keys of BEiT have no bias: zeros, which softmax does not see.
    """
    prefix = next((prefix for prefix in PREFIXES if f"{prefix}embeddings.cls_token" in arrays), "")
    if not any(name.endswith(".key.bias") for name in arrays):
        biases = {name: array for name, array in arrays.items() if name.endswith(".attention.query.bias")}
        arrays |= {name.replace(".query.", ".key."): np.zeros_like(array) for name, array in biases.items()}
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        # transformers 5 writes the decoder's blocks under the encoder's name.
        name = name.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers.").replace(".bn.", ".batch_norm.")
        name = re.sub(r"^(?=fpn\d\.)", prefix, name)
        found.setdefault(_mae_name_of_hf(name, prefix), {})[name] = array
    joined = {}
    for mae, parts in found.items():
        names = hf_names(mae, prefix)
        if set(parts) != set(names):
            raise InputError(f"the weights hold {', '.join(parts)} where a ViT has {', '.join(names)}")
        in_order = [parts[name] for name in names]
        if len({array.shape for array in in_order}) > 1:
            raise InputError(f"{names[0]} has shape {list(in_order[0].shape)}, key and value have others")
        joined[mae] = np.concatenate(np.atleast_1d(*in_order)) if len(names) > 1 else in_order[0]
    return joined


def from_mae(ours: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An array of MAE's layout in ours, of `shape`, which shows the heads of a qkv.

    torch's [out, in] and [out, in, p, p] become [in, out] and [p, p, in, out], for patches flattened to
    (row, column, channel); a transposed convolution's [in, out, 2, 2] becomes [in, 2, 2, out].
    """
    if array.ndim == 4:
        array = array.transpose(UP_AXES if UP in ours else (2, 3, 1, 0))
    elif ours.endswith("/kernel") and RELATIVE not in ours:
        array = array.T
    return array.reshape(shape)


def to_mae(ours: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `from_mae`."""
    if ours == "encoder/patch_embed/kernel" and array.ndim == 2:
        side = round((len(array) / 3) ** 0.5)
        array = array.reshape(side, side, 3, -1)
    if "/qkv/" in ours:
        array = array.reshape(*array.shape[:-3], -1)
    if array.ndim == 4:
        return array.transpose(np.argsort(UP_AXES) if UP in ours else (3, 2, 0, 1))
    return array.T if ours.endswith("/kernel") and RELATIVE not in ours else array
