"""The tensors of a foreign checkpoint by MAE's names; each is kept, ignored for a reason, or an error."""

import re
from typing import Any

import numpy as np

from tinymim_jax.bridge import formats
from tinymim_jax.bridge.files import Source
from tinymim_jax.runtime.errors import InputError

MAE_LITE_PREFIX = "module.model."
PREFIXES = ("", MAE_LITE_PREFIX, "module.", "model.", "backbone.", "module.backbone.", "encoder.")
IGNORED = {  # of the remaining keys, in MAE's spelling
    r"(module\.)?(tch_model|teacher|model_t)\..*": "the teacher of the training",
    r"(module\.)?(attn_adapter|hidden_adapter)\..*": "an adapter of the training's loss",
    r"pooler\..*|vit\.pooler\..*": "a pooler that no plain ViT has",
}


def spell(source: Source, arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """`arrays` by MAE's names, and what is ignored, with the reason; raises InputError on names of no known model."""
    return _from_hf(arrays, source.settings) if source.format == "huggingface" else _without_prefix(arrays)


def _without_prefix(arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    prefix = next((p for p in PREFIXES if p + "cls_token" in arrays), None)
    if prefix is None:
        if any(k.endswith("embeddings.cls_token") for k in arrays):
            raise InputError("these are Hugging Face's names; give the folder, whose config.json tells the heads")
        shown = ", ".join(list(arrays)[:3]) or "nothing"
        raise InputError(
            f"no tensor is named cls_token (the file holds {shown}, ...): this is not a vision transformer"
        )
    inside = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    outside = [k for k in arrays if not k.startswith(prefix)]
    return _sort_out(inside, outside)


def _sort_out(inside: dict[str, np.ndarray], outside: list[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """`inside` without what is ignored; `outside` must be ignored altogether."""
    why = {k: next((w for p, w in IGNORED.items() if re.fullmatch(p, k)), None) for k in [*inside, *outside]}
    unknown = [k for k in outside if why[k] is None]
    if unknown:
        raise InputError(
            f"{unknown[0]} (and {len(unknown) - 1} more) belongs to no known model, which cannot be converted"
        )
    kept = {k: v for k, v in inside.items() if why[k] is None}
    return kept, {k: w for k, w in why.items() if w is not None}


def _from_hf(arrays: dict[str, np.ndarray], settings: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Hugging Face's names and split q, k, v -> MAE's; raises InputError on names that are not a ViT's."""
    if settings.get("hidden_act", "gelu") != "gelu" or settings.get("qkv_bias", True) is not True:
        raise InputError("config.json: only hidden_act gelu and qkv_bias true are a plain ViT; convert another model")
    # transformers 5 writes the decoder's blocks under the encoder's name.
    arrays = {k.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers."): v for k, v in arrays.items()}
    prefix = "vit." if "vit.embeddings.cls_token" in arrays else ""
    depths = [
        sum(1 for k in arrays if re.fullmatch(p, k))
        for p in (
            rf"{prefix}encoder\.layer\.\d+\.layernorm_before\.weight",
            r"decoder\.decoder_layers\.\d+\.layernorm_before\.weight",
        )
    ]
    fused: dict[str, np.ndarray] = {}
    left = dict(arrays)
    for mae in _mae_keys(*depths):
        parts = formats.hf_names(mae, prefix)
        if all(part in left for part in parts):
            found = [left.pop(part) for part in parts]
            if len(parts) > 1 and (len({a.shape for a in found}) > 1 or not found[0].ndim):
                raise InputError(f"{parts[0]} has shape {list(found[0].shape)}, key and value have others")
            fused[mae] = found[0] if len(found) == 1 else np.concatenate(found)
    if "cls_token" not in fused:
        raise InputError(
            f"config.json and model.safetensors are of no ViT (the weights hold {', '.join(list(arrays)[:3])}, ...)"
        )
    return _sort_out(fused, list(left))


def _mae_keys(depth: int, decoder_depth: int) -> list[str]:
    """Every key that a ViT or an MAE of these depths may have."""
    modules = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    stacks = [
        f"{stack}.{i}.{m}"
        for stack, n in (("blocks", depth), ("decoder_blocks", decoder_depth))
        for i in range(n)
        for m in modules
    ]
    single = ["patch_embed.proj", "norm", "head", "decoder_embed", "decoder_norm", "decoder_pred"]
    tokens = ["cls_token", "pos_embed", "mask_token", "decoder_pos_embed"]
    return [*tokens, *(f"{m}.{leaf}" for m in [*single, *stacks] for leaf in ("weight", "bias"))]


def drop_training_block(arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """Takes D2-MAE's last block, of norm1 and q, k, v only, out of `arrays`, and the decoder, which reads block 8."""
    last = depth(arrays, "blocks") - 1
    found = {k.removeprefix(f"blocks.{last}.") for k in arrays if k.startswith(f"blocks.{last}.")}
    if found != {f"{m}.{leaf}" for m in ("norm1", "attn.qkv") for leaf in ("weight", "bias")}:
        return {}
    reasons = {
        rf"blocks\.{last}\..*": "a block of D2-MAE's training, not of its model",
        r"(decoder_|mask_token).*": "D2-MAE's decoder, which reads block 8",
    }
    dropped = {k: why for k in arrays for p, why in reasons.items() if re.fullmatch(p, k)}
    for key in dropped:
        del arrays[key]
    return dropped


def depth(arrays: dict[str, np.ndarray], stack: str) -> int:
    """How many blocks `stack` has; 0 if their numbers have gaps."""
    found = {int(m[1]) for k in arrays if (m := re.match(rf"{stack}\.(\d{{1,4}})\.", k))}
    return len(found) if found == set(range(len(found))) else 0
