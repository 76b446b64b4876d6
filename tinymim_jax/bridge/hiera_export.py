"""Our Hiera's weights as transformers', Meta's and timm's."""

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from etils.epath import Path

from tinymim_jax.bridge import hiera
from tinymim_jax.bridge.files import need, save_safetensors
from tinymim_jax.bridge.hugging_face import labels, processor
from tinymim_jax.experiment.config import Decoder, Hiera
from tinymim_jax.runtime.codec import from_dict, to_dict
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.metric_log import write_json

if TYPE_CHECKING:
    from tinymim_jax.bridge.export import Weights

TIMM = {  # sizes by width and blocks of the stages
    (46, (1, 2, 7, 2)): "tiny",
    (96, (1, 2, 7, 2)): "tiny",
    (96, (1, 2, 11, 2)): "small",
    (112, (2, 3, 16, 3)): "base_plus",
    (144, (2, 6, 36, 4)): "large",
    (256, (2, 6, 36, 4)): "huge",
}


def to_hugging_face(weights: "Weights", folder: Path) -> str:
    """A folder that `from_pretrained` reads: HieraForPreTraining, HieraForImageClassification or HieraModel."""
    name, extra = hf_class(weights.model, weights.decoder, weights.mask_ratio)
    prefix = "" if name == "HieraModel" else "hiera."
    arrays = {
        hiera.hf_name(key, weights.model, prefix): array
        for key, array in hiera.theirs(weights.model, weights.arrays).items()
    }
    save_safetensors(arrays, folder / "model.safetensors")
    write_json(folder / "config.json", {"architectures": [name], "dtype": "float32", **extra, **labels(weights)})
    write_json(folder / "preprocessor_config.json", processor(weights))
    argument = ", add_pooling_layer=False" if name == "HieraModel" else ""
    return f'from transformers import {name}\n\nmodel = {name}.from_pretrained("PATH"{argument})  # PATH: this folder'


def hf_class(model: Hiera, decoder: Any, mask_ratio: float | None) -> tuple[str, dict[str, Any]]:
    """transformers' class for a model, and its config."""
    d = from_dict(Decoder, to_dict(decoder)) if decoder else None
    settings = {
        "model_type": "hiera", **hiera.FIXED, "embed_dim": model.width, "depths": list(model.stages),
        "num_heads": [model.num_heads * 2**i for i in range(len(model.stages))],
        "image_size": [model.image_size] * 2, "patch_size": [2 * model.stride - 1] * 2,
        "patch_stride": [model.stride] * 2, "patch_padding": [model.stride - 1] * 2, "num_query_pool": model.q_pool,
        "layer_norm_eps": model.layer_norm_eps, "drop_path_rate": 0.0,
    }  # fmt: skip
    if d:
        settings |= {"decoder_hidden_size": d.width, "decoder_depth": d.depth, "decoder_num_heads": d.num_heads}
        return "HieraForPreTraining", {**settings, "normalize_pixel_loss": True, "mask_ratio": mask_ratio or 0.6}
    return ("HieraForImageClassification" if model.num_classes else "HieraModel"), settings


def to_meta(weights: "Weights", folder: Path) -> str:
    """checkpoint.pth in Meta's layout, {"model_state": state_dict}, with our own settings beside it."""
    from tinymim_jax.bridge.export import own_settings

    torch = need("torch", "torch", "this format")
    state = {
        name: torch.from_numpy(np.ascontiguousarray(array))
        for name, array in hiera.theirs(weights.model, weights.arrays).items()
    }
    torch.save({"model_state": state, "tinymim_jax": own_settings(weights)}, folder / "checkpoint.pth")
    m = weights.model
    sizes = f"embed_dim={m.width}, num_heads={m.num_heads}, stages={m.stages}, q_pool={m.q_pool}"
    return (
        'import torch\n\nstate_dict = torch.load("PATH/checkpoint.pth")["model_state"]  # PATH: this folder\n'
        f"# for Meta's Hiera with {sizes}"
    )


def to_timm(weights: "Weights", folder: Path) -> str:
    """model.safetensors and config.json as `timm.create_model("local-dir:...")` reads them."""
    m, pixels = weights.model, weights.pixels
    if not m.num_classes:
        raise InputError("timm's Hiera has a head and its norm, and this model none; export it with --format=hf or mae")
    names = {"head.projection.": "head.fc.", "norm.": "head.norm."}
    arrays = {
        re.sub(r"^(head\.projection\.|norm\.)", lambda m: names[m[1]], name): array
        for name, array in hiera.theirs(weights.model, weights.arrays).items()
    }
    args = {"img_size": [m.image_size] * 2, "embed_dim": m.width, "num_heads": m.num_heads, "stages": list(m.stages),
            "q_pool": m.q_pool, "patch_kernel": [2 * m.stride - 1] * 2, "patch_stride": [m.stride] * 2,
            "patch_padding": [m.stride - 1] * 2}  # fmt: skip
    settings = {
        "architecture": f"hiera_{TIMM.get((m.width, m.stages), 'base')}_224",
        "num_classes": m.num_classes,
        "model_args": args,
        "pretrained_cfg": {"num_classes": m.num_classes, "input_size": [3, m.image_size, m.image_size], **pixels},
    }
    settings |= {"label_names": weights.classes} if weights.classes else {}
    save_safetensors(arrays, folder / "model.safetensors")
    write_json(folder / "config.json", settings)
    return 'import timm\n\nmodel = timm.create_model("local-dir:PATH", pretrained=True)  # PATH: this folder'


FORMATS = {"timm": to_timm, "hf": to_hugging_face, "mae": to_meta}
