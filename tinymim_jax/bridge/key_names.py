"""The tensors of a foreign checkpoint by MAE's names; each is kept, ignored for a reason, or an error."""

import re

import numpy as np

from tinymim_jax.bridge import formats
from tinymim_jax.bridge.files import Source
from tinymim_jax.runtime.errors import InputError

MAE_LITE_PREFIX = "module.model."
# What torch.compile, FSDP and activation checkpointing put into names, anywhere.
WRAPPED = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
IGNORED = {  # of names in MAE's spelling
    r"(.*\.)?(tch_model|teacher|model_t)\..*": "the teacher of the training",
    r"(.*\.)?(attn_adapter|hidden_adapter)\..*": "an adapter of the training's loss",
    r"pooler\..*": "a pooler that no plain ViT has",
    r"embeddings\.mask_token": "what pre-training puts in place of hidden patches",
}
Arrays = dict[str, np.ndarray]


def spell(source: Source, arrays: Arrays) -> tuple[Arrays, dict[str, str]]:
    """`arrays` by MAE's names, and what is ignored, with the reason; raises InputError on names of no known model."""
    names = [WRAPPED.sub("", name) for name in arrays]
    arrays = dict(zip(names, arrays.values(), strict=True))
    is_hf = source.format == "huggingface"
    if is_hf and source.settings.get("hidden_act", "gelu") != "gelu":
        raise InputError("config.json: only hidden_act gelu is a plain ViT; take another model")
    prefix = _prefix(names, "embeddings.cls_token" if is_hf else "cls_token")
    root = prefix.removesuffix(next((p for p in formats.PREFIXES if prefix.endswith(p)), ""))
    inside = [name for name in arrays if name.startswith(prefix)]
    if is_hf:
        inside, prefix = [name for name in arrays if name.startswith(root)], root
    elif prefix.endswith("backbone."):  # mmseg's
        inside += [name for name in arrays if name.startswith(tuple(root + head for head in formats.HEADS))]
    outside = [name for name in arrays if name not in set(inside)]
    arrays = {name.removeprefix(prefix).removeprefix(root): arrays[name] for name in inside}
    arrays = formats.from_hf(arrays) if is_hf else arrays
    why = {k: w for k in [*arrays, *outside] for pattern, w in IGNORED.items() if re.fullmatch(pattern, k)}
    if unknown := [name for name in outside if name not in why]:
        raise InputError(
            f"{unknown[0]} (and {len(unknown) - 1} more) belongs to no known model, which cannot be converted"
        )
    return {name: array for name, array in arrays.items() if name not in why}, why


def _prefix(names: list[str], first: str) -> str:
    """What stands before the names of the model, one of which is `first`."""
    found = [name for name in names if f".{name}".endswith(f".{first}")]
    found = [name.removesuffix(first) for name in found if not any(re.fullmatch(p, name) for p in IGNORED)]
    if first == "cls_token" and any(prefix.endswith("embeddings.") for prefix in found):
        raise InputError("these are Hugging Face's names; give the folder, whose config.json tells the heads")
    if len(found) > 1:
        raise InputError(f"these are several models, {', '.join(f'{p}*' for p in found)}; save the weights of one")
    if not found:
        shown = ", ".join(names[:3]) or "nothing"
        raise InputError(f"no tensor is named {first} (it holds {shown}, ...): this is not a vision transformer")
    return found[0]


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
