"""Our weights as folders that transformers' `from_pretrained` reads."""

from typing import TYPE_CHECKING, Any

import numpy as np
from etils.epath import Path

from tinymim_jax.bridge import formats
from tinymim_jax.bridge.files import save_safetensors
from tinymim_jax.data.fast_jpeg import RESAMPLE
from tinymim_jax.experiment import config
from tinymim_jax.models.segment_heads import UPer
from tinymim_jax.runtime import codec
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.metric_log import write_json

if TYPE_CHECKING:
    from tinymim_jax.bridge.export import Weights


def to_hugging_face(weights: "Weights", folder: Path) -> str:
    """A folder that `from_pretrained` reads: ViTMAEForPreTraining, ViTModel, a classifier, or UPerNet."""
    weights.check("Hugging Face")
    m = weights.model
    if m.neck or m.dist_token:
        raise InputError("Hugging Face's ViT has no distillation token and no neck; export it with --format=mae")
    is_classifier = bool(m.num_classes) and m.pool == "mean"
    if (m.relative_position or m.layer_scale) and not (is_classifier or weights.task):
        raise InputError(
            "Hugging Face's ViT has no relative positions and no LayerScale, and its BEiT no final norm; fine-tune the"
            " model, or export it with --format=mae"
        )
    if weights.task:
        name, extra, arrays = "UperNetForSemanticSegmentation", _upernet(weights), _beit_arrays(weights, "backbone.")
    elif weights.decoder:
        name, extra, arrays = "ViTMAEForPreTraining", _mae_settings(weights), formats.to_hf(weights.arrays, "vit.")
    elif not m.num_classes:
        name, extra, arrays = "ViTModel", {"model_type": "vit"}, formats.to_hf(weights.encoder, "")
    elif m.pool == "cls":
        name, extra, arrays = "ViTForImageClassification", {"model_type": "vit"}, formats.to_hf(weights.encoder, "vit.")
    else:
        name, extra, arrays = "BeitForImageClassification", _beit(weights), _beit_arrays(weights, "beit.")
    settings = {"architectures": [name], "dtype": "float32", **({} if weights.task else _sizes(weights)), **extra}
    settings |= labels(weights)
    save_safetensors(arrays, folder / "model.safetensors")
    write_json(folder / "config.json", settings)
    write_json(folder / "preprocessor_config.json", processor(weights))
    argument = ", add_pooling_layer=False" if name == "ViTModel" else ""
    return f'from transformers import {name}\n\nmodel = {name}.from_pretrained("PATH"{argument})  # PATH: this folder'


def labels(weights: "Weights") -> dict[str, Any]:
    """The names of the head's outputs, which also say how many there are; {} without a head."""
    num_classes = weights.task.num_classes if weights.task else weights.model.num_classes
    names = dict(enumerate(weights.classes or [f"LABEL_{i}" for i in range(num_classes)]) if num_classes else ())
    if not names:
        return {}
    return {"id2label": {str(i): name for i, name in names.items()}, "label2id": {name: i for i, name in names.items()}}


def _sizes(weights: "Weights") -> dict[str, Any]:
    m = weights.model
    return {
        "hidden_size": m.width, "num_hidden_layers": m.depth, "num_attention_heads": m.num_heads,
        "intermediate_size": int(m.width * m.mlp_ratio), "image_size": m.image_size, "patch_size": m.patch_size,
        "num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": m.layer_norm_eps, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip


def _beit(weights: "Weights") -> dict[str, Any]:
    """BEiT: patches that are pooled by their mean, then a norm."""
    return {
        "model_type": "beit", "use_absolute_position_embeddings": True, "use_mean_pooling": True,
        "layer_scale_init_value": weights.model.layer_scale,
        "use_relative_position_bias": weights.model.relative_position, "use_shared_relative_position_bias": False,
        "use_mask_token": False, "drop_path_rate": 0.0,
    }  # fmt: skip


def _upernet(weights: "Weights") -> dict[str, Any]:
    """UPerNet behind BEiT and its pyramid; raises InputError, saying why, if these cannot hold the model.

    BEiT's own class for segmentation has no head of another width, and cannot read the last block: its out_indices
    count the tokens in front of the first one from 1, and none may be beyond the number of blocks.
    """
    task = weights.task
    odd = {
        f"no {task.head.kind!r} head": not isinstance(task.head, UPer),
        "a pyramid of the encoder's width alone": task.pyramid.width is not None,
        "an auxiliary head on level 2 alone": task.aux and task.aux.level != 2,
    }
    if why := next((text for text, is_so in odd.items() if is_so), None):
        raise InputError(f"Hugging Face's UperNet with BEiT has {why}; export it with --format=mae")
    stages = {"out_indices": list(task.taps), "out_features": [f"stage{block}" for block in task.taps]}
    backbone = {**_sizes(weights), **_beit(weights), **stages, "add_fpn": True, "reshape_hidden_states": True}
    auxiliary = {
        "use_auxiliary_head": bool(task.aux), "auxiliary_loss_weight": task.aux_weight, "auxiliary_in_channels": None,
        "auxiliary_channels": (task.aux or config.Fcn()).width, "auxiliary_num_convs": 1,
        "auxiliary_concat_input": False,
    }  # fmt: skip
    head = {"hidden_size": task.head.width, "pool_scales": list(task.head.bins), "loss_ignore_index": 255}
    return {"model_type": "upernet", "backbone_config": backbone, **head, **auxiliary}


def _mae_settings(weights: "Weights") -> dict[str, Any]:
    d = codec.from_dict(config.Decoder, weights.decoder)
    return {
        "model_type": "vit_mae", "norm_pix_loss": bool(weights.norm_pix), "mask_ratio": weights.mask_ratio,
        "qkv_bias": True,
        "decoder_hidden_size": d.width, "decoder_num_hidden_layers": d.depth,
        "decoder_num_attention_heads": d.num_heads, "decoder_intermediate_size": d.hidden,
    }  # fmt: skip


def _beit_arrays(weights: "Weights", prefix: str) -> dict[str, np.ndarray]:
    """Without the bias of the keys, which softmax does not see; with a count of batches beside each BatchNorm."""
    arrays = formats.to_hf(weights.arrays, prefix)
    means = [name for name in arrays if name.endswith("running_mean")]
    arrays |= {name.replace("running_mean", "num_batches_tracked"): np.array(0) for name in means}
    return {name: array for name, array in arrays.items() if not name.endswith(".key.bias")}


def processor(weights: "Weights") -> dict[str, Any]:
    """preprocessor_config.json, of the class of transformers that resizes and crops as our evaluation does.

    One that segments sees a whole image at once there, squashed.
    """
    pixels, final = weights.pixels, weights.model.image_size
    scaled = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True}
    scaled |= {"image_mean": pixels["mean"], "image_std": pixels["std"]}
    if weights.task:
        labels = {"do_reduce_labels": weights.data.masks.zero_is_ignored}
        resized = {"do_resize": True, "resample": int(RESAMPLE["bilinear"]), "size": {"height": final, "width": final}}
        return {"image_processor_type": "BeitImageProcessor", **resized, **labels, "do_center_crop": False, **scaled}
    edge, is_squashed = int(final / pixels["crop_pct"]), pixels["crop_mode"] == "squash"
    name = "CLIPImageProcessor"
    if is_squashed:
        name = "ViTImageProcessor" if edge == final else "DeiTImageProcessor"
    crop = {"do_center_crop": True, "crop_size": {"height": final, "width": final}}
    return {
        "image_processor_type": name, "do_resize": True, "resample": int(RESAMPLE[pixels["interpolation"]]),
        "size": {"height": edge, "width": edge} if is_squashed else {"shortest_edge": edge},
        **({} if name == "ViTImageProcessor" else crop), **scaled,
    }  # fmt: skip
