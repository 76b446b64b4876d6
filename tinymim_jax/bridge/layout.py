"""What a foreign checkpoint holds: which model, with every tensor accounted for."""

import dataclasses
import math
import re
from typing import Any

import numpy as np

from tinymim_jax.bridge import key_names, known_checkpoints
from tinymim_jax.bridge.files import Source, printable
from tinymim_jax.experiment.config import Decoder, ViT
from tinymim_jax.models import posembed
from tinymim_jax.runtime.codec import from_dict
from tinymim_jax.runtime.errors import InputError

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
TIMM_ARGS = {  # of model_args, those that this project's ViT has, or that change no number
    "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes", "global_pool", "qkv_bias",
    "class_token", "drop_rate", "drop_path_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate",
    "dynamic_img_size",
}  # fmt: skip
LAYER_NORM_EPS = (1e-6, 1e-12)  # 1e-12: what transformers writes for weights that were trained with 1e-6


@dataclasses.dataclass
class Told:
    """What the user says of a checkpoint, where its shapes cannot."""

    num_heads: int | None = None
    last_block_heads: int | None = None
    decoder_heads: int | None = None
    norm_pix: bool | None = None
    half: bool = False


@dataclasses.dataclass
class Layout:
    """A checkpoint understood: `arrays` by MAE's names, and the model that they are."""

    kind: str
    model: ViT
    decoder: Decoder | None
    norm_pix_loss: bool | None
    arrays: dict[str, np.ndarray]
    ignored: dict[str, str]  # tensor or entry -> why
    notes: list[str]  # what the shapes did not tell, and who did
    untrained: tuple[str, ...]  # regexes, on our keys
    licence: str
    preprocessing: dict[str, Any]  # mean, std, and where they are known interpolation and crop_pct
    is_stated: bool  # whether the file says mean and std, or ImageNet's are taken
    made_from: list[str]  # lines of provenance, of our own exports


def understand(source: Source, arrays: dict[str, np.ndarray], told: Told) -> Layout:
    """Works out what `arrays` are; raises InputError on keys or shapes that are of no known checkpoint."""
    is_mae_lite = any(key.startswith(key_names.MAE_LITE_PREFIX) for key in arrays)
    arrays, ignored = key_names.spell(source, arrays)
    widths = [arrays[k].shape[:1] for k in ("patch_embed.proj.weight", "decoder_embed.weight") if k in arrays]
    is_mae_lite |= sum(widths, ()) in known_checkpoints.MAE_LITE
    notes: list[str] = []
    if dropped := key_names.drop_training_block(arrays):
        notes.append("its norm was trained on the output of block 8, which D2-MAE's decoder read")
    model = _model(arrays, source, is_mae_lite or bool(dropped), told, notes)
    decoder = _decoder(arrays, source, model, told, notes)
    kind = printable(known_checkpoints.kind(arrays, source, is_mae_lite or bool(dropped)))
    norm_pix = None
    if decoder is not None:
        norm_pix, who = known_checkpoints.norm_pix(source.settings, is_mae_lite, told.norm_pix)
        notes.append(f"the decoder gives {'normalised' if norm_pix else 'plain'} pixels, {who}")
    untrained: tuple[str, ...] = ()
    if kind == "TinyMIM, pre-trained":
        untrained = (f"encoder/block{model.depth}/(attn/proj|norm2|mlp)/.*", "encoder/norm/.*", "encoder/pos_embed")
    made_from = []
    if kind == "tinymim_jax's own export":
        untrained, made_from = (_strings(source.settings, key) for key in ("untrained", "made_from"))
        untrained = tuple(re.escape(key) for key in untrained)
    preprocessing, is_stated = _preprocessing(source, notes)
    return Layout(
        kind, model, decoder, norm_pix, arrays, {**source.beside, **ignored, **dropped}, notes, untrained,
        known_checkpoints.licence(kind), preprocessing, is_stated, made_from,
    )  # fmt: skip


def _strings(settings: dict[str, Any], key: str) -> list[str]:
    value = settings.get(key)
    return [printable(str(item)) for item in value] if isinstance(value, list) else []


def _shape(arrays: dict[str, np.ndarray], key: str, ndim: int) -> tuple[int, ...]:
    if key not in arrays:
        raise InputError(f"there is no {key}: this is not a whole vision transformer")
    shape = arrays[key].shape
    if len(shape) != ndim or not all(shape):
        raise InputError(f"{key} has shape {list(shape)}, which no vision transformer has")
    return shape


def _model(arrays: dict[str, np.ndarray], source: Source, is_mae_lite: bool, told: Told, notes: list[str]) -> ViT:
    """Sizes from shapes, heads from `source` or `told`."""
    width, channels, patch, patch_w = _shape(arrays, "patch_embed.proj.weight", 4)
    if channels != 3 or patch != patch_w:
        raise InputError(
            f"patch_embed.proj.weight is for {channels} channels and patches of {patch} x {patch_w};"
            " only 3 channels and square patches are supported"
        )
    depth, dist = key_names.depth(arrays, "blocks"), "dist_token" in arrays
    if not depth:
        raise InputError("the blocks are not numbered from 0 without gaps: this is not a whole vision transformer")
    num_patches = _shape(arrays, "pos_embed", 3)[1] - 1 - dist
    grid = math.isqrt(max(num_patches, 0))
    if grid**2 != num_patches or not grid:
        raise InputError(
            f"pos_embed is for {num_patches} patches, which is no square; register tokens are not supported"
        )
    if ("norm.weight" in arrays) == ("fc_norm.weight" in arrays):
        raise InputError(
            "exactly one of norm and fc_norm is expected: a norm before the CLS token is read, or one after pooling"
        )
    classes = _shape(arrays, "head.weight", 2)[0] if "head.weight" in arrays else 0
    if width % 4:
        raise InputError(f"width {width} is not a multiple of 4, which positions here need")
    ours = _ours(source.settings)
    heads, last = _heads(source, ours, width, is_mae_lite, "conv1x1.1.weight" in arrays, told, notes)
    table = posembed.sincos(grid, width, 1 + dist)
    is_table = table.shape == arrays["pos_embed"].shape and np.allclose(arrays["pos_embed"], table, atol=1e-6)
    model = ViT(
        width,
        depth,
        heads,
        last_block_heads=last,
        mlp_ratio=_shape(arrays, "blocks.0.mlp.fc1.weight", 2)[0] / width,
        image_size=grid * patch,
        patch_size=patch,
        posembed="fixed" if is_table else "trainable",
        pool="mean" if "fc_norm.weight" in arrays else "cls",
        num_classes=classes,
        dist_token=dist,
        neck=_shape(arrays, "conv1x1.1.weight", 2)[0] if "conv1x1.1.weight" in arrays else 0,
    )
    _check_settings(source, model, notes)
    unseen = ("posembed", "drop_path", "drop_path_shape", "dtype", "remat", "attention")
    return dataclasses.replace(model, **{field: getattr(ours, field) for field in unseen}) if ours else model


def _check_settings(source: Source, model: ViT, notes: list[str]) -> None:
    """Raises InputError if config.json describes another model than the weights, or one that this project has not."""
    settings = source.settings
    if source.format == "timm":
        _check_timm(settings, model)
    if source.format != "huggingface":
        return
    sizes = {"hidden_size": model.width, "num_hidden_layers": model.depth, "image_size": model.image_size,
             "patch_size": model.patch_size}  # fmt: skip
    wrong = [key for key, value in sizes.items() if settings.get(key, value) != value]
    if wrong:
        raise InputError(f"config.json: {wrong[0]} is {settings[wrong[0]]!r}, but the weights have {sizes[wrong[0]]}")
    eps = settings.get("layer_norm_eps", 1e-6)
    if eps not in LAYER_NORM_EPS:
        raise InputError(f"config.json: layer_norm_eps is {eps!r}; only 1e-6 is supported")
    if eps != 1e-6:
        notes.append(f"LayerNorm eps is 1e-6, which ViT weights were trained with; config.json says {eps}")


def _check_timm(settings: dict[str, Any], model: ViT) -> None:
    args = settings.get("model_args")
    args = args if isinstance(args, dict) else {}
    if odd := sorted(set(args) - TIMM_ARGS):
        raise InputError(f"config.json: model_args has {odd[0]}, which a plain ViT has not; it cannot be converted")
    pool = args.get("global_pool", settings.get("global_pool"))
    if model.num_classes and pool not in (None, "avg" if model.pool == "mean" else "token"):
        raise InputError(
            f"config.json: global_pool {pool!r} with {'fc_norm' if model.pool == 'mean' else 'norm'} is not supported;"
            " only 'token' with norm and 'avg' with fc_norm are"
        )


def _ours(settings: dict[str, Any]) -> ViT | None:
    """The model that a file of our own `export` names; None in others' files. Its sizes are taken from the shapes."""
    if settings.get("made_by") != "tinymim_jax":
        return None
    return from_dict(ViT, settings.get("model"), "tinymim_jax.model")


def _heads(
    source: Source, ours: ViT | None, width: int, is_mae_lite: bool, has_neck: bool, told: Told, notes: list[str]
) -> tuple[int, int | None]:
    """Heads of the blocks, and of the last one if they differ; shapes do not show them."""
    heads, last, who = known_checkpoints.heads(source, ours, width, is_mae_lite, has_neck, told.num_heads)
    last = last if told.last_block_heads is None else told.last_block_heads
    for number in (heads, last):
        if number is not None and (number < 1 or width % number):
            raise InputError(
                f"{number} heads do not divide width {width}; give --num_heads and --last_block_heads that do"
            )
    notes.append(f"{heads} heads, {who}" + (f"; {last} in the last block" if last not in (None, heads) else ""))
    return heads, last if last != heads else None


def _decoder(arrays: dict[str, np.ndarray], source: Source, model: ViT, told: Told, notes: list[str]) -> Decoder | None:
    if "decoder_embed.weight" not in arrays:
        return None
    width, depth = _shape(arrays, "decoder_embed.weight", 2)[0], key_names.depth(arrays, "decoder_blocks")
    heads, who = known_checkpoints.decoder_heads(source, width, told.decoder_heads)
    if heads < 1 or width % heads or width % 4 or not depth:
        raise InputError(
            f"the decoder's width {width} is no multiple of 4 or of its {heads} heads, or it has no blocks"
        )
    if model.pool != "cls" or model.num_classes or model.dist_token:
        raise InputError(
            "there is a decoder beside a head, fc_norm or dist_token, which no MAE has; remove one of them"
        )
    notes.append(f"decoder: {heads} heads, {who}")
    return Decoder(width, depth, heads)


def _preprocessing(source: Source, notes: list[str]) -> tuple[dict[str, Any], bool]:
    """Mean and std of the pixels that the model was trained on, and whether the file says so."""
    places = {"timm": "pretrained_cfg", "huggingface": "preprocessor"}  # "preprocessing": of our own exports
    told = source.settings.get(places.get(source.format, "preprocessing"))
    if isinstance(told, dict):
        mean, std = told.get("mean") or told.get("image_mean"), told.get("std") or told.get("image_std")
        if all(_are_three_numbers(values) for values in (mean, std)) and min(std) > 0:
            found = {"mean": [float(x) for x in mean], "std": [float(x) for x in std]}
            if told.get("interpolation") in ("bicubic", "bilinear"):
                found["interpolation"] = told["interpolation"]
            if isinstance(told.get("crop_pct"), float) and 0 < told["crop_pct"] <= 1:
                found["crop_pct"] = told["crop_pct"]
            return found, True
    notes.append("pixels are normalised with ImageNet's mean and std, which the file does not say")
    return dict(IMAGENET), False


def _are_three_numbers(values: Any) -> bool:
    return (
        isinstance(values, list) and len(values) == 3 and all(type(x) in (int, float) and abs(x) < 1e6 for x in values)
    )
