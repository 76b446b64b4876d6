"""What shapes do not show of the checkpoints that are about: heads, normalised pixels, licences."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from tinymim_jax.bridge import formats
from tinymim_jax.bridge.files import Source
from tinymim_jax.experiment.config import ViT
from tinymim_jax.runtime.errors import InputError

OWN = "tinymim_jax's own export"
LITE = "MAE-Lite"
TINYMIM = {  # args.model of the released code: heads, and heads of the last block (models_tinymim.py)
    "tinymim_vit_tiny_patch16": (6, 12),
    "tinymim_vit_small_patch16": (6, 12),
    "tinymim_vit_base_patch16": (12, 16),
}
HEADS_OF_KIND = {LITE: "MAE-Lite's models have", "TinyMIM*-T": "TinyMIM*-T has"}  # 12, whatever the width
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # by width, of MAE, DeiT and timm
DECODER_HEADS = {512: 16, 96: 3, 192: 6}  # by width, of MAE and MAE-Lite
MAE_LITE = {(192, 96), (384, 192)}  # widths of encoder and decoder
LICENCES = {  # by how the kind begins, the first that fits
    LITE: "Apache-2.0 if these are the weights of wangsr126/MAE-Lite",
    "MAE or TinyMIM": "CC-BY-NC 4.0 if the weights come from facebookresearch/mae; OliverRensu/TinyMIM states none",
    "MAE": "CC-BY-NC 4.0 if these are the weights of facebookresearch/mae",
    "TinyMIM": "the repository OliverRensu/TinyMIM states none; its code derives from MAE, CC-BY-NC 4.0",
    "Hiera": "CC-BY-NC 4.0 if these are the weights of facebookresearch/hiera, Apache-2.0 if wangsr126/MAE-Lite's",
    "DeiT": "Apache-2.0 if these are the weights of facebookresearch/deit",
    "": "not stated in the file; see where it came from",
}


@dataclasses.dataclass
class Told:
    """What the user says of a checkpoint, where its shapes cannot."""

    num_heads: int | None = None
    last_block_heads: int | None = None
    decoder_heads: int | None = None
    norm_pix: bool | None = None
    ema: bool = False  # the averaged weights
    layer_norm_eps: float | None = None
    mean: list[float] | None = None  # of the pixels that it was trained on, RGB in [0, 1]
    std: list[float] | None = None
    half: bool = False
    taps: list[int] | None = None  # of a model that segments: the blocks that its heads read
    zero_is_ignored: bool | None = None  # in masks


def licence(kind: str) -> str:
    """What is known of the licence of a kind of checkpoint."""
    return next(text for name, text in LICENCES.items() if kind.startswith(name))


def kind(arrays: dict[str, np.ndarray], source: Source, is_mae_lite: bool) -> str:
    """A name for the checkpoint; `arrays` by MAE's names."""
    settings = source.settings
    if source.format == "huggingface":
        named = settings.get("architectures")
        return f"Hugging Face {named[0] if isinstance(named, list) and named else settings.get('model_type', 'ViT')}"
    if source.format == "timm":
        return f"timm {settings['architecture']}"
    if settings.get("made_by") == "tinymim_jax":
        return OWN
    is_star = "conv1x1.1.weight" in arrays
    if formats.CLASSIFIER in arrays:
        return f"{'TinyMIM*-T, ' if is_star else ''}UPerNet in mmseg's layout"
    if is_star:
        return "TinyMIM*-T, fine-tuned"
    if "dist_token" in arrays:
        return "DeiT, distilled"
    if _tinymim(settings):
        return "TinyMIM, pre-trained"
    if "head.0.running_mean" in arrays:
        return f"{LITE if is_mae_lite else 'MAE'}, linear probe"
    if "decoder_embed.weight" in arrays:
        return f"{LITE if is_mae_lite else 'MAE'}, with decoder"
    if "head.weight" in arrays and not is_mae_lite:
        return "MAE or TinyMIM, fine-tuned" if "fc_norm.weight" in arrays else "DeiT or timm classifier"
    return f"{LITE if is_mae_lite else 'MAE or TinyMIM'}, encoder only"


def _tinymim(settings: dict[str, Any]) -> tuple[int, int] | None:
    """Heads of the blocks and of the last one, where the training's arguments name one of TinyMIM's models."""
    name = settings.get("model")
    return TINYMIM.get(name) if isinstance(name, str) else None


def heads(
    kind: str, source: Source, ours: ViT | None, width: int, told: Told, seen: int | None = None
) -> tuple[int, int | None, str]:
    """Heads of the blocks, heads of the last one if they differ, and who says so.

    `ours` is the model that a file of our own `export` names, `seen` what other weights show. Raises InputError if
    nobody says, or if they do not divide the width.
    """
    settings, tinymim = source.settings, _tinymim(source.settings)
    others = "; MAE-Lite's have 12, TinyMIM's 6 to 16" if width < 1024 else ""
    candidates = [
        (told.num_heads, "you say"),
        (ours and ours.num_heads, "the file says"),
        (seen, "its biases by distance have"),
        (tinymim and tinymim[0], f"its arguments name {settings.get('model') if tinymim else ''}"),
        (_whole(settings, "num_attention_heads"), "config.json says"),
        (_whole(settings.get("model_args"), "num_heads"), "config.json says"),
        *((12, who) for start, who in HEADS_OF_KIND.items() if kind.startswith(start)),
        (HEADS.get(width), f"MAE's, DeiT's and timm's models of width {width} have{others} (--num_heads)"),
    ]
    number, who = _first(candidates, f"a model of width {width}", source, "num_heads")
    last = next((n for n in (told.last_block_heads, ours and ours.last_block_heads, tinymim and tinymim[1]) if n), None)
    for n in (number, last):
        if n is not None and (n < 1 or width % n):
            raise InputError(f"{n} heads do not divide width {width}; give --num_heads and --last_block_heads that do")
    last = None if last == number else last
    return number, last, f"{number} heads, as {who}" + (f"; {last} in the last block" if last else "")


def decoder_heads(kind: str, source: Source, width: int, told: Told) -> tuple[int, str]:
    """Heads of MAE's decoder, and who says so; raises InputError if nobody does."""
    candidates = [
        (told.decoder_heads, "you say"),
        (_whole(source.settings, "decoder_num_attention_heads"), "config.json says"),
        (_whole(source.settings.get("decoder"), "num_heads") if kind == OWN else None, "the file says"),
        (DECODER_HEADS.get(width), f"MAE's decoders of width {width} have"),
    ]
    number, who = _first(candidates, f"a decoder of width {width}", source, "decoder_heads")
    return number, f"decoder: {number} heads, as {who}"


def norm_pix(kind: str, settings: dict[str, Any], told: Told) -> tuple[bool, str]:
    """Whether a decoder gives normalised pixels, and who says so."""
    if told.norm_pix is not None:
        return told.norm_pix, "as you say"
    if isinstance(settings.get("norm_pix_loss"), bool):
        return settings["norm_pix_loss"], "as its settings say"
    if kind.startswith(LITE):
        return True, "as MAE-Lite's models do"
    return False, "which the file does not say (--norm_pix if it does)"


def _first(candidates: Iterable[tuple[int | None, str]], what: str, source: Source, flag: str) -> tuple[int, str]:
    """The first number that somebody says, and who; raises InputError if nobody does."""
    for number, who in candidates:
        if number is not None:
            return number, who
    raise InputError(
        f"how many heads {what} has cannot be seen in its weights; give them:"
        f" python -m tinymim_jax convert {source.path} DST --{flag}=N"
    )


def _whole(settings: Any, key: str) -> int | None:
    """settings[key], None if there is none; raises InputError if it is no whole number of at least 1."""
    if not isinstance(settings, dict) or key not in settings:
        return None
    value = settings[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"config.json: {key} is {value!r}; it must be a whole number of at least 1")
    return value
