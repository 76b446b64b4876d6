"""The tensors of a foreign checkpoint by MAE's names; each is kept, ignored for a reason, or an error."""

import re

import numpy as np

from tinymim_jax.bridge import formats
from tinymim_jax.bridge.files import Source
from tinymim_jax.runtime.errors import InputError

MAE_LITE_PREFIX = "module.model."
PREFIXES = ("", MAE_LITE_PREFIX, "module.", "model.", "backbone.", "module.backbone.", "encoder.")
IGNORED = {  # of names in MAE's spelling
    r"(module\.)?(tch_model|teacher|model_t)\..*": "the teacher of the training",
    r"(module\.)?(attn_adapter|hidden_adapter)\..*": "an adapter of the training's loss",
    r"pooler\..*": "a pooler that no plain ViT has",
}
Arrays = dict[str, np.ndarray]


def spell(source: Source, arrays: Arrays) -> tuple[Arrays, dict[str, str]]:
    """`arrays` by MAE's names, and what is ignored, with the reason; raises InputError on names of no known model."""
    if source.format == "huggingface":
        if source.settings.get("hidden_act", "gelu") != "gelu" or source.settings.get("qkv_bias", True) is not True:
            raise InputError("config.json: only hidden_act gelu and qkv_bias true are a plain ViT; take another model")
        arrays, outside = formats.from_hf(arrays), []
    else:
        prefix = _prefix(arrays)
        outside = [name for name in arrays if not name.startswith(prefix)]
        arrays = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    why = {k: w for k in [*arrays, *outside] for pattern, w in IGNORED.items() if re.fullmatch(pattern, k)}
    if unknown := [name for name in outside if name not in why]:
        raise InputError(
            f"{unknown[0]} (and {len(unknown) - 1} more) belongs to no known model, which cannot be converted"
        )
    return {name: array for name, array in arrays.items() if name not in why}, why


def _prefix(arrays: Arrays) -> str:
    """What stands before the names of the model."""
    prefix = next((p for p in PREFIXES if p + "cls_token" in arrays), None)
    if prefix is None:
        if any(name.endswith("embeddings.cls_token") for name in arrays):
            raise InputError("these are Hugging Face's names; give the folder, whose config.json tells the heads")
        shown = ", ".join(list(arrays)[:3]) or "nothing"
        raise InputError(f"no tensor is named cls_token (it holds {shown}, ...): this is not a vision transformer")
    return prefix


def drop_training_block(arrays: Arrays) -> dict[str, str]:
    """Takes D2-MAE's last block, of norm1 and q, k, v only, out of `arrays`, and the decoder, which reads block 8."""
    last = f"blocks.{depth(arrays, 'blocks') - 1}."
    found = {name.removeprefix(last) for name in arrays if name.startswith(last)}
    if found != {f"{module}.{leaf}" for module in ("norm1", "attn.qkv") for leaf in ("weight", "bias")}:
        return {}
    dropped = {name: "a block of D2-MAE's training, not of its model" for name in arrays if name.startswith(last)}
    for name in arrays:
        if name.startswith(formats.OF_DECODER):
            dropped[name] = "D2-MAE's decoder, which reads block 8"
    for name in dropped:
        del arrays[name]
    return dropped


def depth(arrays: Arrays, stack: str) -> int:
    """How many blocks `stack` has; 0 if their numbers have gaps."""
    found = {int(m[1]) for k in arrays if (m := re.match(rf"{stack}\.(\d{{1,4}})\.", k))}
    return len(found) if found == set(range(len(found))) else 0
