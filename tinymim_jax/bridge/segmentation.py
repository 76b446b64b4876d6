"""What a checkpoint that segments has behind its encoder: UPerNet in mmseg's layout, or in transformers' classes."""

from typing import Any

import numpy as np

from tinymim_jax.bridge import formats, key_names
from tinymim_jax.bridge.files import Source
from tinymim_jax.bridge.known_checkpoints import Told
from tinymim_jax.experiment.config import Fcn, Masks, Pyramid, Segment, Task, UPer, ViT
from tinymim_jax.runtime.codec import from_dict, to_dict
from tinymim_jax.runtime.errors import InputError

DECODE, AUXILIARY = formats.HEADS
ADE20K = 150  # classes; 0 in its masks is none
SHARES = (1 / 3, 1 / 2, 2 / 3, 1)  # of the depth: the blocks that BEiT, MAE and TinyMIM read
BEIT = "BeitForSemanticSegmentation"


def with_backbone(settings: dict[str, Any]) -> dict[str, Any]:
    """config.json with what UperNet's says of its backbone beside the rest, whose width is the head's."""
    backbone = settings.get("backbone_config")
    if not isinstance(backbone, dict):
        return settings
    width = {"hidden_size": backbone["hidden_size"]} if "hidden_size" in backbone else {}
    return {**backbone, **settings, **width}


def read_task(arrays: key_names.Arrays, source: Source, model: ViT, told: Told, notes: list[str]) -> Task | None:
    """The task whose pyramid and heads `arrays`, by MAE's names, are; None: it does not segment.

    Raises InputError if it is no UPerNet, or if nobody says which blocks are read.
    """
    if formats.CLASSIFIER not in arrays:
        return None
    if isinstance(own := source.settings.get("task"), dict):  # of our own export
        return from_dict(Task, own, "tinymim_jax.task")

    def shape(name: str) -> tuple[int, ...]:
        if name not in arrays or arrays[name].ndim != 4:
            raise InputError(f"there is no {name} of four dimensions: only UPerNet behind a ViT can be converted")
        return arrays[name].shape

    num_classes, width = shape(formats.CLASSIFIER)[:2]
    pyramid = Pyramid()
    if "fpn3.weight" in arrays:
        fc = next(iter(arrays.get("conv1x1.1.weight", np.empty(0)).shape), 0)
        pyramid = Pyramid(width=shape("fpn3.weight")[0], hidden=shape("fpn1.0.weight")[1], fc=fc)
    shape(f"{DECODE}psp_modules.0.1.conv.weight")
    bins = source.settings.get("pool_scales", formats.BINS)
    aux = None
    if f"{AUXILIARY}conv_seg.weight" in arrays:
        aux = Fcn(shape(f"{AUXILIARY}convs.0.conv.weight")[0])
    head, taps = from_dict(UPer, {"width": width, "bins": bins}, "config.json"), _taps(source, model.depth, told, notes)
    task = Segment(num_classes, head, taps=taps, pyramid=pyramid, aux=aux)
    task.check("the checkpoint (--taps)", model)
    return from_dict(Task, to_dict(task), "the checkpoint")  # whose numbers are in their ranges


def _taps(source: Source, depth: int, told: Told, notes: list[str]) -> tuple[int, ...]:
    """The blocks whose tokens are read, from 1."""
    stated = source.settings.get("out_indices", source.settings.get("segmentation_indices"))
    if told.taps:
        taps, who = tuple(told.taps), "as you say"
    elif source.format != "huggingface":
        taps, who = tuple(round(depth * share) for share in SHARES), "as BEiT, MAE and TinyMIM have it (--taps)"
    else:
        if not isinstance(stated, list) or not stated or any(type(index) is not int for index in stated):
            raise InputError(f"config.json: out_indices is {stated!r}; give the blocks that are read: --taps=4,6,8,12")
        taps, who = tuple(stated), "as config.json says"
        if source.settings.get("architectures") == [BEIT]:
            taps, who = tuple(index - 1 for index in stated), "as transformers counts its out_indices"
            if stated[-1] == depth - 1:
                meant = ",".join(str(index + 1) for index in stated)
                who += (
                    f"; Microsoft's weights were trained on {meant}, which transformers does not read (--taps={meant})"
                )
    notes.append(f"the heads read the tokens behind blocks {', '.join(map(str, taps))}, {who}")
    return taps


def read_masks(task: Any, source: Source, image_size: int, told: Told, notes: list[str]) -> Masks:
    """How masks are read to be compared with what `task` gives, and how large images are."""
    if isinstance(own := source.settings.get("masks"), dict):  # of our own export
        return from_dict(Masks, own, "tinymim_jax.masks")
    processor = source.settings.get("preprocessor") or {}
    stated = processor.get("do_reduce_labels", processor.get("reduce_labels"))
    candidates = [
        (told.zero_is_ignored, "as you say"),
        (stated, "as the file says"),
        (task.num_classes == ADE20K, "as of ADE20K's 150 classes and no others (--zero_is_ignored)"),
    ]
    is_ignored, who = next((bool(value), who) for value, who in candidates if value is not None)
    notes.append(f"0 in masks is {'no class' if is_ignored else 'the first class'}, {who}")
    scale = (4 * image_size, image_size)
    return from_dict(Masks, to_dict(Masks(task.num_classes, is_ignored, scale=scale)), "the checkpoint's masks")


def unread(arrays: key_names.Arrays) -> dict[str, str]:
    """Takes the norm that stands behind the blocks out of `arrays`, of a model that segments."""
    found = [name for name in arrays if name.startswith(("norm.", "fc_norm.")) and formats.CLASSIFIER in arrays]
    for name in found:
        del arrays[name]
    return dict.fromkeys(found, "a norm behind the blocks, which no head for pixels reads")


def relative_heads(arrays: key_names.Arrays) -> int | None:
    """Heads of the blocks, where a bias by distance shows them."""
    table = arrays.get(formats.TABLE, np.empty(0))
    return table.shape[1] if table.ndim == 2 and table.size else None
