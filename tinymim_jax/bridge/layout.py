"""What a foreign checkpoint holds: which model, in MAE's spelling, with every tensor accounted for."""

import dataclasses
import math
import re
from typing import Any

import numpy as np

from tinymim_jax.bridge import names
from tinymim_jax.bridge.files import Source
from tinymim_jax.config import Decoder, InputError, ViT, from_dict
from tinymim_jax.models import posembed

PREFIXES = ("", "module.model.", "module.", "model.", "backbone.", "module.backbone.", "encoder.")
IGNORED = {  # of the remaining keys, in MAE's spelling
    r"(module\.)?(tch_model|teacher|model_t)\..*": "the teacher of the training",
    r"(module\.)?(attn_adapter|hidden_adapter)\..*": "an adapter of the training's loss",
    r"pooler\..*|vit\.pooler\..*": "a pooler that no plain ViT has",
}
TINYMIM = {  # args.model of the released code: heads, and heads of the last block (models_tinymim.py)
    "tinymim_vit_tiny_patch16": (6, 12),
    "tinymim_vit_small_patch16": (6, 12),
    "tinymim_vit_base_patch16": (12, 16),
}
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # by width, of MAE, DeiT and timm
DECODER_HEADS = {512: 16, 96: 3, 192: 6}  # by width, of MAE and MAE-Lite
MAE_LITE = {(192, 96): 12, (384, 192): 12}  # heads by widths of encoder and decoder
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
LICENCES = {  # by how the kind begins, the first that fits
    "MAE-Lite": "Apache-2.0 if these are the weights of wangsr126/MAE-Lite",
    "MAE or TinyMIM": "CC-BY-NC 4.0 if the weights come from facebookresearch/mae; OliverRensu/TinyMIM states none",
    "MAE": "CC-BY-NC 4.0 if these are the weights of facebookresearch/mae",
    "TinyMIM": "the repository OliverRensu/TinyMIM states none; its code derives from MAE, CC-BY-NC 4.0",
    "DeiT": "Apache-2.0 if these are the weights of facebookresearch/deit",
}
ASK_THE_SOURCE = "not stated in the file; see where it came from"


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
    preprocessing: dict[str, Any]


def understand(source: Source, arrays: dict[str, np.ndarray], told: Told) -> Layout:
    """Works out what `arrays` are; raises InputError on keys or shapes that are of no known checkpoint."""
    is_hf = source.format == "huggingface"
    arrays, ignored = _from_hf(arrays, source.settings) if is_hf else _without_prefix(arrays)
    ignored |= _drop_training_block(arrays)
    notes: list[str] = []
    model = _model(arrays, source, told, notes)
    decoder = _decoder(arrays, source.settings, model, told, notes)
    kind = _kind(arrays, source)
    norm_pix = None
    if decoder is not None:
        norm_pix = _norm_pix(source.settings, told, notes)
    if is_hf and source.settings.get("layer_norm_eps", 1e-6) != 1e-6:
        notes.append(
            "LayerNorm eps is 1e-6, which ViT weights were trained with; config.json says"
            f" {source.settings['layer_norm_eps']}"
        )
    untrained = ()
    if kind == "TinyMIM, pre-trained":
        untrained = (f"encoder/block{model.depth}/(attn/proj|norm2|mlp)/.*", "encoder/norm/.*", "encoder/pos_embed")
    licence = next((text for name, text in LICENCES.items() if kind.startswith(name)), ASK_THE_SOURCE)
    preprocessing = _preprocessing(source, notes)
    return Layout(
        kind, model, decoder, norm_pix, arrays, {**source.beside, **ignored}, notes, untrained, licence, preprocessing
    )


def _without_prefix(arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    prefix = next((p for p in PREFIXES if p + "cls_token" in arrays), None)
    if prefix is None:
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
            f"{unknown[0]} (and {len(unknown) - 1} more) belongs to no known model; remove it from the file"
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
        parts = names.hf_names(mae, prefix)
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


def _drop_training_block(arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """Takes D2-MAE's last block, of norm1 and q, k, v only, out of `arrays`, and the decoder, which reads block 8."""
    depth = _depth(arrays, "blocks")
    if (
        not depth
        or f"blocks.{depth - 1}.attn.qkv.weight" not in arrays
        or f"blocks.{depth - 1}.attn.proj.weight" in arrays
    ):
        return {}
    reasons = {
        rf"blocks\.{depth - 1}\..*": "a block of D2-MAE's training, not of its model",
        r"(decoder_|mask_token).*": "D2-MAE's decoder, which reads block 8",
    }
    dropped = {k: why for k in arrays for p, why in reasons.items() if re.fullmatch(p, k)}
    for key in dropped:
        del arrays[key]
    return dropped


def _depth(arrays: dict[str, np.ndarray], stack: str) -> int:
    found = {int(m[1]) for k in arrays if (m := re.match(rf"{stack}\.(\d{{1,4}})\.", k))}
    return len(found) if found == set(range(len(found))) else 0


def _shape(arrays: dict[str, np.ndarray], key: str, ndim: int) -> tuple[int, ...]:
    if key not in arrays:
        raise InputError(f"there is no {key}: this is not a whole vision transformer")
    shape = arrays[key].shape
    if len(shape) != ndim or not all(shape):
        raise InputError(f"{key} has shape {list(shape)}, which no vision transformer has")
    return shape


def _model(arrays: dict[str, np.ndarray], source: Source, told: Told, notes: list[str]) -> ViT:
    """Sizes from shapes, heads from `source` or `told`."""
    width, channels, patch, patch_w = _shape(arrays, "patch_embed.proj.weight", 4)
    if channels != 3 or patch != patch_w:
        raise InputError(
            f"patch_embed.proj.weight is for {channels} channels and patches of {patch} x {patch_w};"
            " only 3 channels and square patches are supported"
        )
    depth, dist = _depth(arrays, "blocks"), "dist_token" in arrays
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
    heads, last = _heads(arrays, source.settings, ours, width, told, notes)
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
    _check_pool(source, model)
    unseen = ("posembed", "drop_path", "drop_path_shape", "dtype", "remat")
    return dataclasses.replace(model, **{field: getattr(ours, field) for field in unseen}) if ours else model


def _check_pool(source: Source, model: ViT) -> None:
    """Raises InputError if timm's config.json pools tokens otherwise than a model with these norms does."""
    args = source.settings.get("model_args")
    pool = (args if isinstance(args, dict) else {}).get("global_pool", source.settings.get("global_pool"))
    known = (None, "avg" if model.pool == "mean" else "token")
    if source.format == "timm" and model.num_classes and pool not in known:
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
    arrays: dict[str, np.ndarray],
    settings: dict[str, Any],
    ours: ViT | None,
    width: int,
    told: Told,
    notes: list[str],
) -> tuple[int, int | None]:
    """Heads of the blocks, and of the last one if they differ; shapes do not show them."""
    last = told.last_block_heads
    name = str(settings.get("model") or settings.get("architecture") or "")
    decoder = _shape(arrays, "decoder_embed.weight", 2)[0] if "decoder_embed.weight" in arrays else 0
    if told.num_heads is not None:
        heads, who = told.num_heads, "as you say"
    elif ours is not None:
        heads, who = ours.num_heads, "as the file says"
        last = ours.last_block_heads if last is None else last
    elif name in TINYMIM:
        (heads, in_last), who = TINYMIM[name], f"as its arguments name {name}"
        last = in_last if last is None else last
    elif "num_attention_heads" in settings:
        heads, who = _whole(settings, "num_attention_heads"), "as config.json says"
    elif isinstance(settings.get("model_args"), dict) and "num_heads" in settings["model_args"]:
        heads, who = _whole(settings["model_args"], "num_heads"), "as config.json says"
    elif (width, decoder) in MAE_LITE:
        heads, who = MAE_LITE[width, decoder], "as MAE-Lite's models with such a decoder have"
    elif "conv1x1.1.weight" in arrays:
        heads, who = 12, "as TinyMIM*-T has"
    elif width in HEADS:
        heads, who = (
            HEADS[width],
            f"as MAE's, DeiT's and timm's models of width {width} have; MAE-Lite's small ones have 12 (--num_heads)",
        )
    else:
        raise InputError(
            f"how many heads a model of width {width} has cannot be seen in its weights; convert it with --num_heads=N"
        )
    for number in (heads, last):
        if number is not None and (number < 1 or width % number):
            raise InputError(
                f"{number} heads do not divide width {width}; give --num_heads and --last_block_heads that do"
            )
    notes.append(f"{heads} heads, {who}" + (f"; {last} in the last block" if last not in (None, heads) else ""))
    return heads, last if last != heads else None


def _whole(settings: dict[str, Any], key: str) -> int:
    value = settings.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"config.json: {key} is {value!r}; it must be a whole number of at least 1")
    return value


def _decoder(
    arrays: dict[str, np.ndarray], settings: dict[str, Any], model: ViT, told: Told, notes: list[str]
) -> Decoder | None:
    if "decoder_embed.weight" not in arrays:
        return None
    width, depth = _shape(arrays, "decoder_embed.weight", 2)[0], _depth(arrays, "decoder_blocks")
    if told.decoder_heads is not None:
        heads, who = told.decoder_heads, "as you say"
    elif "decoder_num_attention_heads" in settings:
        heads, who = _whole(settings, "decoder_num_attention_heads"), "as config.json says"
    elif isinstance(settings.get("decoder"), dict) and settings.get("made_by") == "tinymim_jax":
        heads, who = _whole(settings["decoder"], "num_heads"), "as the file says"
    elif width in DECODER_HEADS:
        heads, who = DECODER_HEADS[width], f"as MAE's decoders of width {width} have"
    else:
        raise InputError(
            f"how many heads a decoder of width {width} has cannot be seen in its weights;"
            " convert it with --decoder_heads=N"
        )
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


def _norm_pix(settings: dict[str, Any], told: Told, notes: list[str]) -> bool:
    if told.norm_pix is not None:
        return told.norm_pix
    if isinstance(settings.get("norm_pix_loss"), bool):
        notes.append(f"norm_pix_loss is {settings['norm_pix_loss']}, as its settings say")
        return settings["norm_pix_loss"]
    notes.append("whether the decoder gives normalised pixels is not in the file: taken as no (--norm_pix if it does)")
    return False


def _kind(arrays: dict[str, np.ndarray], source: Source) -> str:
    settings, keys = source.settings, arrays.keys()
    if source.format == "huggingface":
        named = settings.get("architectures")
        return f"Hugging Face {named[0] if isinstance(named, list) and named else settings.get('model_type', 'ViT')}"
    if source.format == "timm":
        return f"timm {settings['architecture']}"
    if "conv1x1.1.weight" in keys:
        return "TinyMIM*-T, fine-tuned"
    if "dist_token" in keys:
        return "DeiT, distilled"
    if str(settings.get("model")) in TINYMIM:
        return "TinyMIM, pre-trained"
    if "decoder_embed.weight" in keys:
        widths = (arrays["patch_embed.proj.weight"].shape[0], arrays["decoder_embed.weight"].shape[0])
        return "MAE-Lite, with decoder" if widths in MAE_LITE else "MAE, with decoder"
    if "head.weight" in keys:
        return "MAE or TinyMIM, fine-tuned" if "fc_norm.weight" in keys else "DeiT or timm classifier"
    return "MAE, encoder only"


def _preprocessing(source: Source, notes: list[str]) -> dict[str, Any]:
    """Mean and std of the pixels that the model was trained on."""
    told = source.settings.get("pretrained_cfg") if source.format == "timm" else source.settings.get("preprocessor")
    if isinstance(told, dict):
        mean, std = told.get("mean") or told.get("image_mean"), told.get("std") or told.get("image_std")
        if all(_are_three_numbers(values) for values in (mean, std)) and min(std) > 0:
            return {"mean": [float(x) for x in mean], "std": [float(x) for x in std]}
    notes.append("pixels are normalised with ImageNet's mean and std, which the file does not say")
    return dict(IMAGENET)


def _are_three_numbers(values: Any) -> bool:
    return (
        isinstance(values, list) and len(values) == 3 and all(type(x) in (int, float) and abs(x) < 1e6 for x in values)
    )
