"""Hiera's checkpoints: Meta's and MAE-Lite's files, transformers' and timm's folders, by Meta's names."""

import dataclasses
import itertools
import math
import re
from typing import Any

import numpy as np

from tinymim_jax.bridge import key_names, known_checkpoints, stated
from tinymim_jax.bridge.files import Source, printable
from tinymim_jax.bridge.known_checkpoints import Told
from tinymim_jax.bridge.layout import Layout, strings
from tinymim_jax.experiment.config import Decoder, Hiera
from tinymim_jax.models.hiera_blocks import UNIT
from tinymim_jax.runtime.codec import from_dict, to_dict
from tinymim_jax.runtime.errors import InputError

Arrays = dict[str, np.ndarray]
FIRST, FUSION, PRED = "patch_embed.proj.weight", "multi_scale_fusion_heads", "decoder_pred."
HEADS = {112: 2, 144: 2, 256: 4}  # of the first stage, by its width; 1 of others
STARTS = (  # how Meta's names begin, and transformers'; {}: what it puts before the encoder's
    ("patch_embed.proj.", "{}embeddings.patch_embeddings.projection."),
    ("pos_embed", "{}embeddings.position_embeddings"),
    ("norm.", "{}pooler.layernorm."),
    ("head.projection.", "classifier."),
    (f"{FUSION}.", f"multiscale_fusion.{FUSION}."),
    ("mask_token", "decoder.mask_token"),
    ("decoder_pos_embed", "decoder.decoder_position_embeddings"),
    ("decoder_embed.", "decoder.decoder_embeddings."),
    ("decoder_blocks.", "decoder.decoder_block.layers."),
    ("decoder_", "decoder.decoder_"),
)
PARTS = ((".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."))  # of a block
FIXED = {  # of transformers' config.json, as every published model has it
    "query_stride": [2, 2], "masked_unit_size": [UNIT, UNIT], "masked_unit_attention": [True, True, False, False],
    "embed_dim_multiplier": 2.0, "mlp_ratio": 4.0, "hidden_act": "gelu", "num_channels": 3,
}  # fmt: skip


def is_one(source: Source, arrays: Arrays) -> bool:
    """Whether these are a Hiera's weights, as far as names tell."""
    kind = str(source.settings.get("model_type", source.settings.get("architecture", "")))
    first = next((array for name, array in arrays.items() if name.endswith(FIRST)), np.empty(0))
    is_overlapping = first.ndim == 4 and first.shape[2] % 2 == 1 and first.shape[2] > 1
    return kind.startswith("hiera") or (is_overlapping and not any(name.endswith("cls_token") for name in arrays))


def understand(source: Source, arrays: Arrays, told: Told) -> Layout:
    """As `layout.understand`, of a Hiera."""
    source = dataclasses.replace(source, settings={"layer_norm_eps": 1e-6, **source.settings})
    notes: list[str] = []
    arrays, ignored = _spell(source, arrays)
    model = _model(arrays, source, told, notes)
    if not (model.num_classes or model.fusion):
        for name in [name for name in arrays if name.startswith(("norm.", "encoder_norm."))]:
            ignored[name] = "a norm that stands before a head, and there is none"
            del arrays[name]
    decoder = _decoder(arrays, source, told, notes)
    arrays = {re.sub(r"^(encoder_norm|head\.projection)\.", _own, name): array for name, array in arrays.items()}
    arrays |= {name: _channels_last(array) for name, array in arrays.items() if name.startswith(PRED)}
    norm_pix = bool(source.settings.get("normalize_pixel_loss", True)) if decoder else None
    own = source.settings if source.settings.get("made_by") == "tinymim_jax" else {}
    kind = known_checkpoints.OWN if own else _kind(source, model, decoder)
    untrained = tuple(re.escape(key) for key in strings(own, "untrained"))
    preprocessing, is_stated = stated.preprocessing(source, model.image_size, told, notes)
    return Layout(
        kind, model, decoder, norm_pix, arrays, {**source.beside, **ignored}, notes, untrained,
        known_checkpoints.licence(kind), preprocessing, is_stated, strings(own, "made_from"),
        stated.classes(source, model.num_classes, notes),
    )  # fmt: skip


def _own(match: re.Match) -> str:
    return "norm." if match[1] == "encoder_norm" else "head."


def _kind(source: Source, model: Hiera, decoder: Decoder | None) -> str:
    if source.format == "huggingface":
        named = source.settings.get("architectures")
        return printable(f"Hugging Face {named[0] if isinstance(named, list) and named else 'Hiera'}")
    if source.format == "timm":
        return printable(f"timm {source.settings['architecture']}")
    return f"Hiera, {'with decoder' if decoder else 'classifier' if model.num_classes else 'encoder only'}"


def _channels_last(array: np.ndarray) -> np.ndarray:
    """Rows of the decoder's last layer, pixels (channel, row, column), as ours, (row, column, channel)."""
    side = math.isqrt(array.size and len(array) // 3)
    if array.ndim not in (1, 2) or len(array) != 3 * side**2:
        raise InputError(f"decoder_pred has shape {list(array.shape)}, which is of no square patches in three colours")
    return np.moveaxis(array.reshape(3, side, side, *array.shape[1:]), 0, 2).reshape(array.shape)


def _channels_first(array: np.ndarray) -> np.ndarray:
    side = math.isqrt(len(array) // 3)
    return np.moveaxis(array.reshape(side, side, 3, *array.shape[1:]), 2, 0).reshape(array.shape)


def _spell(source: Source, arrays: Arrays) -> tuple[Arrays, dict[str, str]]:
    """`arrays` by Meta's names, and what is ignored, with the reason; raises InputError on names of no Hiera."""
    arrays = {key_names.WRAPPED.sub("", name): array for name, array in arrays.items()}
    ignored = {k: why for k in arrays for pattern, why in key_names.IGNORED.items() if re.fullmatch(pattern, k)}
    arrays = {name: array for name, array in arrays.items() if name not in ignored}
    if source.format == "huggingface":
        prefix = "hiera." if any(name.startswith("hiera.") for name in arrays) else ""
        found = (re.match(rf"{prefix}encoder\.stages\.(\d+)\.layers\.(\d+)\.", name) for name in arrays)
        layers = {(int(block[1]), int(block[2])) for block in found if block}
        depths = [sum(of == stage for of, _ in layers) for stage in range(1 + max((of for of, _ in layers), default=0))]
        return {_from_hf(name, depths, prefix): array for name, array in arrays.items()}, ignored
    prefixes = {name.removesuffix(FIRST) for name in arrays if name.endswith(FIRST)}
    if len(prefixes) != 1:
        raise InputError(f"these are several models, {', '.join(f'{p}*' for p in prefixes)}; save the weights of one")
    (prefix,) = prefixes
    if odd := [name for name in arrays if not name.startswith(prefix)]:
        raise InputError(f"{odd[0]} (and {len(odd) - 1} more) belongs to no Hiera, which cannot be converted")
    names = {name: name.removeprefix(prefix) for name in arrays}
    if source.format == "timm":
        names = {k: v.replace("head.norm.", "norm.").replace("head.fc.", "head.projection.") for k, v in names.items()}
    return {names[name]: array for name, array in arrays.items()}, ignored


def _from_hf(name: str, depths: list[int], prefix: str) -> str:
    start, theirs = next((pair for pair in STARTS if name.startswith(pair[1].format(prefix))), ("", ""))
    name = start + name.removeprefix(theirs.format(prefix))
    if block := re.match(rf"{prefix}encoder\.stages\.(\d+)\.layers\.(\d+)\.", name):
        name = f"blocks.{sum(depths[: int(block[1])]) + int(block[2])}.{name[block.end() :]}"
    for part, theirs in PARTS:
        name = name.replace(theirs, part)
    return name


def hf_name(name: str, model: Hiera, prefix: str) -> str:
    """Meta's name in transformers' spelling; `prefix` is what a model with a head or a decoder puts first."""
    start, theirs = next((pair for pair in STARTS if name.startswith(pair[0])), ("", ""))
    name = theirs.format(prefix) + name.removeprefix(start)
    if block := re.match(r"blocks\.(\d+)\.", name):
        stage = model.stage_of(int(block[1]) + 1)
        inside = int(block[1]) - sum(model.stages[:stage])
        name = f"{prefix}encoder.stages.{stage}.layers.{inside}.{name[block.end() :]}"
    for part, theirs in PARTS:
        name = name.replace(part, theirs)
    return name


def _model(arrays: Arrays, source: Source, told: Told, notes: list[str]) -> Hiera:
    """Sizes from shapes; what these do not tell from `source` or `told`."""
    first, positions = arrays.get(FIRST, np.empty(0)), arrays.get("pos_embed", np.empty(0))
    depth = key_names.depth(arrays, "blocks")
    if first.ndim != 4 or first.shape[1:] != (3, first.shape[2], first.shape[2]) or positions.ndim != 3 or not depth:
        raise InputError("patch_embed, pos_embed or the blocks are missing or of odd shapes: this is no whole Hiera")
    width, stride, side = first.shape[0], (first.shape[2] + 1) // 2, math.isqrt(positions.shape[1])
    starts = [0, *(i for i in range(depth) if f"blocks.{i}.proj.weight" in arrays), depth]
    stages = tuple(end - begin for begin, end in itertools.pairwise(starts))
    fused = len({name.split(".")[1] for name in arrays if name.startswith(f"{FUSION}.")})
    settings = source.settings if source.format == "huggingface" else {}
    if isinstance(args := source.settings.get("model_args"), dict):  # timm's
        settings = {"num_heads": [args.get("num_heads", 1)], "num_query_pool": args.get("q_pool", 3)}
    _check_config(settings, {"embed_dim": width, "depths": list(stages), "patch_stride": [stride] * 2})
    q_pool = fused or settings.get("num_query_pool", 3)
    if source.settings.get("made_by") == "tinymim_jax":
        return from_dict(Hiera, source.settings.get("model"), "tinymim_jax.model")
    head = arrays.get("head.projection.weight", np.empty((0, 0)))
    stated_heads = settings.get("num_heads")
    heads, who = told.num_heads, "as you say"
    if not heads:
        is_said = isinstance(stated_heads, list) and stated_heads
        heads = stated_heads[0] if is_said else HEADS.get(width, 1)
        who = "as config.json says" if is_said else f"as Meta's and MAE-Lite's of width {width} have (--num_heads)"
    notes.append(f"{heads} heads in the first stage, twice as many in each later one, {who}")
    if not fused and not len(head) and "num_query_pool" not in settings:
        notes.append("queries are pooled where each stage begins, as in a classifier")
    eps = stated.layer_norm_eps(source, None, told, notes)
    fields = {"image_size": side * stride, "stride": stride, "q_pool": q_pool, "fusion": fused > 0}
    plain = to_dict(Hiera(width, stages, heads, num_classes=len(head), layer_norm_eps=eps, **fields))
    model = from_dict(Hiera, plain, "the checkpoint")
    model.check("the checkpoint")
    return model


def _check_config(settings: dict[str, Any], sizes: dict[str, Any]) -> None:
    """Raises InputError if config.json describes another model than the weights, or one that this project has not."""
    for key, value in {**FIXED, **sizes}.items():
        if settings.get(key, value) != value:
            raise InputError(f"config.json: {key} is {settings[key]!r}, and only {value!r} can be converted here")


def _decoder(arrays: Arrays, source: Source, told: Told, notes: list[str]) -> Decoder | None:
    if "decoder_embed.weight" not in arrays:
        return None
    if source.settings.get("made_by") == "tinymim_jax":
        return from_dict(Decoder, source.settings.get("decoder"), "tinymim_jax.decoder")
    width, depth = next(iter(arrays["decoder_embed.weight"].shape), 0), key_names.depth(arrays, "decoder_blocks")
    settings = {"decoder_num_attention_heads": source.settings.get("decoder_num_heads")}
    settings = {key: value for key, value in settings.items() if value}
    own = dataclasses.replace(source, settings={**source.settings, **settings})
    heads, note = known_checkpoints.decoder_heads("Hiera", own, width, told)
    notes.append(note)
    return Decoder(width, depth, heads, posembed="trainable")


def theirs(model: Hiera, arrays: Arrays) -> Arrays:
    """What `understand` has made of Meta's arrays, as they were."""
    names = {"norm.": "encoder_norm." if model.fusion else "norm.", "head.": "head.projection."}
    return {
        re.sub(r"^(norm|head)\.", lambda m: names[m[0]], name): _channels_first(array)
        if name.startswith(PRED)
        else array
        for name, array in arrays.items()
    }
