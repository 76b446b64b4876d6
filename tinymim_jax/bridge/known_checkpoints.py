"""What shapes do not show of the checkpoints that are about: heads, normalised pixels, licences."""

from typing import Any

import numpy as np

from tinymim_jax.bridge.files import Source
from tinymim_jax.experiment.config import ViT
from tinymim_jax.runtime.errors import InputError

TINYMIM = {  # args.model of the released code: heads, and heads of the last block (models_tinymim.py)
    "tinymim_vit_tiny_patch16": (6, 12),
    "tinymim_vit_small_patch16": (6, 12),
    "tinymim_vit_base_patch16": (12, 16),
}
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # by width, of MAE, DeiT and timm
DECODER_HEADS = {512: 16, 96: 3, 192: 6}  # by width, of MAE and MAE-Lite
MAE_LITE = {(192, 96), (384, 192)}  # widths of encoder and decoder
MAE_LITE_HEADS = 12
LICENCES = {  # by how the kind begins, the first that fits
    "MAE-Lite": "Apache-2.0 if these are the weights of wangsr126/MAE-Lite",
    "MAE or TinyMIM": "CC-BY-NC 4.0 if the weights come from facebookresearch/mae; OliverRensu/TinyMIM states none",
    "MAE": "CC-BY-NC 4.0 if these are the weights of facebookresearch/mae",
    "TinyMIM": "the repository OliverRensu/TinyMIM states none; its code derives from MAE, CC-BY-NC 4.0",
    "DeiT": "Apache-2.0 if these are the weights of facebookresearch/deit",
}
ASK_THE_SOURCE = "not stated in the file; see where it came from"


def licence(kind: str) -> str:
    """What is known of the licence of a kind of checkpoint."""
    return next((text for name, text in LICENCES.items() if kind.startswith(name)), ASK_THE_SOURCE)


def kind(arrays: dict[str, np.ndarray], source: Source, is_mae_lite: bool) -> str:
    """A name for the checkpoint; `arrays` by MAE's names."""
    settings = source.settings
    if source.format == "huggingface":
        named = settings.get("architectures")
        return f"Hugging Face {named[0] if isinstance(named, list) and named else settings.get('model_type', 'ViT')}"
    if source.format == "timm":
        return f"timm {settings['architecture']}"
    if settings.get("made_by") == "tinymim_jax":
        return "tinymim_jax's own export"
    if "conv1x1.1.weight" in arrays:
        return "TinyMIM*-T, fine-tuned"
    if "dist_token" in arrays:
        return "DeiT, distilled"
    if isinstance(settings.get("model"), str) and settings["model"] in TINYMIM:
        return "TinyMIM, pre-trained"
    decoder = "decoder_embed.weight" in arrays
    if is_mae_lite:
        return "MAE-Lite, with decoder" if decoder else "MAE-Lite, encoder only"
    if decoder:
        return "MAE, with decoder"
    if "head.weight" in arrays:
        return "MAE or TinyMIM, fine-tuned" if "fc_norm.weight" in arrays else "DeiT or timm classifier"
    return "MAE or TinyMIM, encoder only"


def heads(
    source: Source, ours: ViT | None, width: int, is_mae_lite: bool, has_neck: bool, num_heads: int | None
) -> tuple[int, int | None, str]:
    """Heads of the blocks, heads of the last one where they may differ, and who says so.

    `num_heads` is what the user says. Raises InputError if nobody does.
    """
    settings = source.settings
    name, args = settings.get("model"), settings.get("model_args")
    last = TINYMIM[name][1] if isinstance(name, str) and name in TINYMIM else ours.last_block_heads if ours else None
    if num_heads is not None:
        return num_heads, last, "as you say"
    if ours is not None:
        return ours.num_heads, last, "as the file says"
    if last is not None:
        return TINYMIM[name][0], last, f"as its arguments name {name}"
    if "num_attention_heads" in settings:
        return whole(settings, "num_attention_heads"), None, "as config.json says"
    if isinstance(args, dict) and "num_heads" in args:
        return whole(args, "num_heads"), None, "as config.json says"
    if is_mae_lite:
        return MAE_LITE_HEADS, None, "as MAE-Lite's models have"
    if has_neck:
        return 12, None, "as TinyMIM*-T has"
    if width in HEADS:
        others = "; MAE-Lite's have 12, TinyMIM's 6 to 16" if width < 1024 else ""
        return HEADS[width], None, f"as MAE's, DeiT's and timm's models of width {width} have{others} (--num_heads)"
    raise InputError(
        f"how many heads a model of width {width} has cannot be seen in its weights; give them:"
        f" python -m tinymim_jax convert {source.path} DST --num_heads=N"
    )


def decoder_heads(source: Source, width: int, decoder_heads: int | None) -> tuple[int, str]:
    """Heads of MAE's decoder, and who says so; raises InputError if nobody does."""
    settings = source.settings
    if decoder_heads is not None:
        return decoder_heads, "as you say"
    if "decoder_num_attention_heads" in settings:
        return whole(settings, "decoder_num_attention_heads"), "as config.json says"
    if isinstance(settings.get("decoder"), dict) and settings.get("made_by") == "tinymim_jax":
        return whole(settings["decoder"], "num_heads"), "as the file says"
    if width in DECODER_HEADS:
        return DECODER_HEADS[width], f"as MAE's decoders of width {width} have"
    raise InputError(
        f"how many heads a decoder of width {width} has cannot be seen in its weights; give them:"
        f" python -m tinymim_jax convert {source.path} DST --decoder_heads=N"
    )


def norm_pix(settings: dict[str, Any], is_mae_lite: bool, told: bool | None) -> tuple[bool, str]:
    """Whether a decoder gives normalised pixels, and who says so."""
    if told is not None:
        return told, "as you say"
    if isinstance(settings.get("norm_pix_loss"), bool):
        return settings["norm_pix_loss"], "as its settings say"
    if is_mae_lite:
        return True, "as MAE-Lite's models do"
    return False, "which the file does not say (--norm_pix if it does)"


def whole(settings: dict[str, Any], key: str) -> int:
    """settings[key]; raises InputError if it is no whole number of at least 1."""
    value = settings.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"config.json: {key} is {value!r}; it must be a whole number of at least 1")
    return value
