"""What a foreign checkpoint holds: which model, with every tensor accounted for."""

import dataclasses
import math
import re
from typing import Any

import numpy as np

from tinymim_jax.bridge import folding, formats, key_names, known_checkpoints, segmentation, stated
from tinymim_jax.bridge.files import Source, printable
from tinymim_jax.bridge.known_checkpoints import Told
from tinymim_jax.experiment.config import Decoder, Masks, Task, ViT
from tinymim_jax.models import posembed
from tinymim_jax.runtime.codec import from_dict
from tinymim_jax.runtime.errors import InputError

TIMM_ARGS = {  # of model_args, those that this project's ViT has, or that change no number
    "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes", "global_pool", "qkv_bias",
    "class_token", "drop_rate", "drop_path_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate",
    "dynamic_img_size", "init_values",
}  # fmt: skip
# What only our own exports tell.
UNSEEN = ("posembed", "drop_path", "drop_path_shape", "weight_init", "dtype", "remat", "attention")
Arrays = dict[str, np.ndarray]  # by MAE's names


@dataclasses.dataclass
class Layout:
    """A checkpoint understood: `arrays` by MAE's names, and the model that they are."""

    kind: str
    model: Any
    decoder: Decoder | None
    norm_pix_loss: bool | None
    arrays: Arrays
    ignored: dict[str, str]  # tensor or entry -> why
    notes: list[str]  # what the shapes did not tell, and who did
    untrained: tuple[str, ...]  # regexes, on our keys
    licence: str
    preprocessing: dict[str, Any]  # fields of `Data`: mean, std, and where they are known those of resizing
    is_stated: bool  # whether the file says mean and std, or ImageNet's are taken
    made_from: list[str]  # lines of provenance, of our own exports
    classes: list[str] | None  # the names of the head's outputs, where the file says them
    task: Task | None = None  # of a model that segments: its pyramid and heads
    masks: Masks | None = None  # whose classes these give


def understand(source: Source, arrays: Arrays, told: Told) -> Layout:
    """Works out what `arrays` are; raises InputError on keys or shapes that are of no known checkpoint."""
    source = dataclasses.replace(source, settings=segmentation.with_backbone(source.settings))
    is_mae_lite = any(key.startswith(key_names.MAE_LITE_PREFIX) for key in arrays)
    arrays, ignored = key_names.spell(source, arrays)
    widths = [arrays[k].shape[:1] for k in ("patch_embed.proj.weight", "decoder_embed.weight") if k in arrays]
    is_mae_lite |= sum(widths, ()) in known_checkpoints.MAE_LITE
    notes: list[str] = []
    if dropped := key_names.drop_training_block(arrays):
        notes.append("its norm was trained on the output of block 8, which D2-MAE's decoder read")
    dropped |= segmentation.unread(arrays)
    kind = printable(known_checkpoints.kind(arrays, source, is_mae_lite or bool(dropped)))
    notes += folding.fold(arrays, source)
    model = _model(arrays, kind, source, told, notes)
    decoder = _decoder(arrays, kind, source, model, told, notes)
    task = segmentation.read_task(arrays, source, model, told, notes)
    masks = segmentation.read_masks(task, source, model.image_size, told, notes) if task else None
    norm_pix = None
    if decoder is not None:
        norm_pix, who = known_checkpoints.norm_pix(kind, source.settings, told)
        notes.append(f"the decoder gives {'normalised' if norm_pix else 'plain'} pixels, {who}")
    untrained: list[str] = []
    made_from: list[str] = []
    if kind == "TinyMIM, pre-trained":
        untrained = [f"encoder/block{model.depth}/(attn/proj|norm2|mlp)/.*", "encoder/norm/.*", "encoder/pos_embed"]
    if kind == known_checkpoints.OWN:
        untrained = [re.escape(key) for key in strings(source.settings, "untrained")]
        made_from = strings(source.settings, "made_from")
    preprocessing, is_stated = stated.preprocessing(source, model.image_size, told, notes)
    return Layout(
        kind, model, decoder, norm_pix, arrays, {**source.beside, **ignored, **dropped}, notes, tuple(untrained),
        known_checkpoints.licence(kind), preprocessing, is_stated, made_from,
        stated.classes(source, task.num_classes if task else model.num_classes, notes), task, masks,
    )  # fmt: skip


def strings(settings: dict[str, Any], key: str) -> list[str]:
    """What our own exports list under `key`; [] if there is nothing."""
    value = settings.get(key)
    return [printable(str(item)) for item in value] if isinstance(value, list) else []


def _shape(arrays: Arrays, key: str, ndim: int) -> tuple[int, ...]:
    if key not in arrays:
        raise InputError(f"there is no {key}: this is not a whole vision transformer")
    shape = arrays[key].shape
    if len(shape) != ndim or not all(shape):
        raise InputError(f"{key} has shape {list(shape)}, which no vision transformer has")
    return shape


def _model(arrays: Arrays, kind: str, source: Source, told: Told, notes: list[str]) -> ViT:
    """Sizes from shapes, heads from `source` or `told`."""
    width, channels, patch, patch_w = _shape(arrays, "patch_embed.proj.weight", 4)
    if channels != 3 or patch != patch_w or width % 4:
        raise InputError(
            f"patch_embed.proj.weight is for {channels} channels, patches of {patch} x {patch_w} and width {width};"
            " only 3 channels, square patches and multiples of 4 are supported"
        )
    depth, dist = key_names.depth(arrays, "blocks"), "dist_token" in arrays
    if not depth:
        raise InputError("the blocks are not numbered from 0 without gaps: this is not a whole vision transformer")
    grid = _grid(arrays, 1 + dist)
    pool = "mean" if "fc_norm.weight" in arrays else "cls"
    segments = formats.CLASSIFIER in arrays
    pool = "mean" if segments else pool
    if not segments and ("norm.weight" in arrays) == (pool == "mean"):
        raise InputError(
            "exactly one of norm and fc_norm is expected: a norm before the CLS token is read, or one after pooling"
        )
    # The sizes of our own exports are taken from the shapes, too.
    ours = from_dict(ViT, source.settings.get("model"), "tinymim_jax.model") if kind == known_checkpoints.OWN else None
    seen = segmentation.relative_heads(arrays)
    heads, last, note = known_checkpoints.heads(kind, source, ours, width, told, seen)
    notes.append(note)
    table = posembed.sincos(grid, width, 1 + dist)
    is_table = table.shape == arrays["pos_embed"].shape and np.allclose(arrays["pos_embed"], table, atol=1e-6)
    model = ViT(
        width, depth, heads, last_block_heads=last,
        mlp_ratio=_mlp_ratio(arrays, "blocks", width),
        image_size=grid * patch, patch_size=patch, posembed="fixed" if is_table else "trainable", pool=pool,
        num_classes=_shape(arrays, "head.weight", 2)[0] if "head.weight" in arrays else 0, dist_token=dist,
        neck=_shape(arrays, "conv1x1.1.weight", 2)[0] if "conv1x1.1.weight" in arrays and not segments else 0,
        relative_position=seen is not None,
    )  # fmt: skip
    if source.format == "timm":
        _check_timm(source.settings, model)
    if source.format == "huggingface":
        _check_hugging_face(source.settings, model)
    unseen = {field: getattr(ours, field) for field in UNSEEN} if ours else {}
    return dataclasses.replace(model, **unseen, layer_norm_eps=stated.layer_norm_eps(source, ours, told, notes))


def _mlp_ratio(arrays: Arrays, stack: str, width: int) -> float:
    """The number whose product with `width` is, rounded down, the hidden width of the MLP."""
    hidden = _shape(arrays, f"{stack}.0.mlp.fc1.weight", 2)[0]
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _grid(arrays: Arrays, in_front: int) -> int:
    """Patches a side, behind so many other tokens."""
    num_patches = _shape(arrays, "pos_embed", 3)[1] - in_front
    grid = math.isqrt(max(num_patches, 0))
    if grid**2 != num_patches or not grid:
        raise InputError(
            f"pos_embed is for {num_patches} patches, which is no square: rectangular images and register tokens are"
            " not supported"
        )
    return grid


def _check_hugging_face(settings: dict[str, Any], model: ViT) -> None:
    """Raises InputError if config.json describes another model than the weights, or one that this project has not."""
    _check_sides(settings, {"image_size": model.image_size, "patch_size": model.patch_size})
    for key, value in {"hidden_size": model.width, "num_hidden_layers": model.depth}.items():
        if settings.get(key, value) != value:
            raise InputError(f"config.json: {key} is {settings[key]!r}, but the weights have {value}")


def _check_sides(settings: dict[str, Any], sides: dict[str, int]) -> None:
    for key, value in sides.items():
        if stated.side(settings, key, value) != value:
            raise InputError(f"config.json: {key} is {settings[key]!r}, but the weights have {value}")


def _check_timm(settings: dict[str, Any], model: ViT) -> None:
    """The same of timm's config.json."""
    args = settings.get("model_args")
    args = args if isinstance(args, dict) else {}
    if odd := sorted(set(args) - TIMM_ARGS):
        raise InputError(f"config.json: model_args has {odd[0]}, which a plain ViT has not; it cannot be converted")
    _check_sides(args, {"img_size": model.image_size, "patch_size": model.patch_size})
    norm, expected = ("fc_norm", "avg") if model.pool == "mean" else ("norm", "token")
    pool = args.get("global_pool", settings.get("global_pool"))
    if model.num_classes and pool not in (None, expected):
        raise InputError(f"config.json: global_pool {pool!r} with {norm} is not supported, only {expected!r}")


def _decoder(arrays: Arrays, kind: str, source: Source, model: ViT, told: Told, notes: list[str]) -> Decoder | None:
    if "decoder_embed.weight" not in arrays:
        return None
    width, depth = _shape(arrays, "decoder_embed.weight", 2)[0], key_names.depth(arrays, "decoder_blocks")
    heads, note = known_checkpoints.decoder_heads(kind, source, width, told)
    if heads < 1 or width % heads or width % 4 or not depth:
        raise InputError(
            f"the decoder's width {width} is no multiple of 4 or of its {heads} heads, or it has no blocks"
        )
    if model.pool != "cls" or model.num_classes or model.dist_token:
        raise InputError("there is a decoder beside a head, fc_norm or dist_token, which no MAE has; remove one")
    notes.append(note)
    return Decoder(width, depth, heads, _mlp_ratio(arrays, "decoder_blocks", width))
