"""What other vision transformers have and ours has not, written into weights that ours has: every output stays."""

import re

import numpy as np

from tinymim_jax.bridge import formats
from tinymim_jax.bridge.files import Source
from tinymim_jax.bridge.key_names import Arrays, depth
from tinymim_jax.models import batch_norm
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.weights import resize

SCALED = {"ls1.gamma": "attn.proj", "gamma_1": "attn.proj", "ls2.gamma": "mlp.fc2", "gamma_2": "mlp.fc2"}


def fold(arrays: Arrays, source: Source) -> list[str]:
    """Rewrites `arrays`, by MAE's names, in place; returns what was done. Raises InputError where parts do not fit."""
    done = (_layer_scale(arrays, source), _qkv_bias(arrays, source), _probe_norm(arrays), _positions(arrays))
    return [note for note in done if note]


def _layer_scale(arrays: Arrays, source: Source) -> str:
    found = {name: m for name in arrays if (m := re.fullmatch(rf"(blocks\.\d+\.)({'|'.join(SCALED)})", name))}
    args, expected = source.settings.get("model_args"), 2 * depth(arrays, "blocks")
    is_said = isinstance(args, dict) and bool(args.get("init_values"))
    if (found or is_said) and len(found) != expected:
        raise InputError(f"there are {len(found)} of {expected} gammas (LayerScale): this is not a whole model")
    for name, m in found.items():
        gamma = arrays.pop(name)
        for leaf in ("weight", "bias"):
            key = f"{m[1]}{SCALED[m[2]]}.{leaf}"
            if key not in arrays or gamma.shape != arrays[key].shape[:1]:
                raise InputError(f"{name} scales {key}, which is not there or of another size")
            arrays[key] = (arrays[key].T * gamma).T
    return "LayerScale is multiplied into attn.proj and mlp.fc2: the outputs are the same" if found else ""


def _qkv_bias(arrays: Arrays, source: Source) -> str:
    """Zeros where no block has one: a file that has lost some is left, and refused."""
    has_bias = bool(source.settings.get("qkv_bias", True)) if source.format == "huggingface" else None
    names = [f"{stack}.{i}.attn.qkv" for stack in ("blocks", "decoder_blocks") for i in range(depth(arrays, stack))]
    having = [name for name in names if f"{name}.bias" in arrays]
    if having and has_bias is False:
        raise InputError(f"config.json: qkv_bias is false, but there is {having[0]}.bias")
    if having or has_bias or not all(arrays.get(f"{name}.weight", np.empty(0)).ndim == 2 for name in names):
        return ""
    arrays |= {f"{name}.bias": np.zeros(len(arrays[f"{name}.weight"]), np.float32) for name in names}
    return "q, k and v have no bias: ours is zeros"


def _probe_norm(arrays: Arrays) -> str:
    keys = ("head.0.running_mean", "head.0.running_var", "head.1.weight", "head.1.bias")
    if not all(key in arrays for key in keys):
        return ""
    mean, var, weight, bias = (arrays[key] for key in keys)
    if weight.shape != (*bias.shape, *mean.shape) or var.shape != mean.shape or (var < 0).any():
        raise InputError("head.0 (BatchNorm) and head.1 (Linear) do not fit together, or a variance is negative")
    for key in keys:
        del arrays[key]
    kernel, arrays["head.bias"] = batch_norm.fold(weight.T, bias, mean, var)
    arrays["head.weight"] = kernel.T
    return f"the BatchNorm before the head (eps {batch_norm.PROBE_EPS:g}, as in MAE's linear probe) is folded into it"


def _positions(arrays: Arrays) -> str:
    table, token = (arrays.get(name, np.empty(0)) for name in (formats.TABLE, "cls_token"))
    if "pos_embed" in arrays or table.ndim != 2 or not table.size or token.ndim != 3:
        return ""
    tokens = resize.relative_front(len(table)) + resize.relative_side(len(table)) ** 2
    arrays["pos_embed"] = np.zeros((1, tokens, token.shape[-1]), np.float32)
    return "there are no absolute positions: ours are zeros"
