"""What is known of a checkpoint, for people: model cards and `inspect`."""

import json
import re
from collections.abc import Iterable
from typing import Any

from etils.epath import Path

from tinymim_jax.bridge import convert
from tinymim_jax.experiment import config, stage_file
from tinymim_jax.models.contract import Encoder
from tinymim_jax.runtime import markdown, storage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.metric_log import read_done
from tinymim_jax.weights import checkpoint, handoff
from tinymim_jax.weights.parameters import fold

GONE = "not at hand any more"
NAMED = 10  # classes that `inspect` names


def provenance(folder: Path, depth: int = 0) -> list[str]:
    """One line for the checkpoint in `folder`, then those of what it was trained from, indented."""
    folder, indent = storage.absolute(folder), "  " * depth
    try:
        if converted := stage_file.read(folder).get("converted"):
            source = converted["source"]
            what = f"converted from {Path(source['file']).name} ({source['kind']}), sha256 {source['sha256']}"
            own = [f"{indent}  {line}" for line in source["made_from"]]
            return [f"{indent}- {folder.name}: {what}; licence: {source['licence']}", *own]
        stage = stage_file.read_stage(folder)
    except InputError:
        return [f"{indent}- {folder.name}: {GONE}"]
    lines = [f"{indent}- {folder.name}: {_task(stage)}"]
    for _, init in stage.inits():
        lines += provenance(handoff.source_folder(init, checkpoint.stage_folder(folder).parent), depth + 1)
    return lines


def _task(stage: config.Stage) -> str:
    run, data = stage.run, stage.data
    length = f"{run.epochs:g} epochs" if run.epochs is not None else f"{run.steps} steps"
    where = f"{data.source} {data.title()}" if data.title() != data.source else data.source
    return f"{stage.task.summary()}, {length} of {where}, batch {run.batch_size}"


PARTS_SAID = {  # of a block up to which it was trained: what was, and what was not
    "norm1": ("norm1 was", "attention and MLP"),
    "qkv": ("norm1 and q, k, v were", "projection and MLP"),
    "attention": ("norm1 and attention were", "norm2 and MLP"),
}


def last_block(model: Encoder, names: Iterable[str], untrained: list[str]) -> str:
    """What the last block is good for, given all parameters and those that were not trained."""
    names = list(names)
    i = model.half_trained(names, untrained)
    if i is None:
        is_frozen = any(name.startswith("encoder/") and model.block_of(name) == model.depth for name in untrained)
        return f"block {model.depth}: {'not trained in this stage' if is_frozen else 'trained like the others'}"
    behind = f"; nothing behind block {i} was" if i < model.depth else ""
    use = f"take features from the output of block {i - 1}, or fine-tune" if i > 1 else "fine-tune before use"
    own = [name for name in names if name.startswith("encoder/") and model.block_of(name) == i]
    trained, others = PARTS_SAID[model.trained_part(own, untrained)]
    norm = " (and the final norm)" if any(model.is_norm(name) for name in untrained) else ""
    return f"block {i}: only its {trained} trained; its {others}{norm} were not{behind}: {use}"


def lines(folder: Path) -> list[str]:
    """A stage or converted checkpoint in `folder`, for `inspect`; raises InputError if it is neither."""
    content, model = stage_file.read(folder), stage_file.read_model(folder)
    untrained = content["untrained"]
    if converted := content.get("converted"):
        kind, decoder = f"converted checkpoint, {converted['source']['kind']}", converted["decoder"]
    else:
        stage = stage_file.read_stage(folder)
        kind, decoder = _task(stage), stage.task.reconstruction()
    state = "finished" if handoff.finished(folder) else "not finished"
    names = list(handoff.read_shapes(folder)) if state == "finished" else convert.names(model)
    text = [f"{folder}: {kind}, {state}", f"model: {model.summary()}"]
    segmentation = stage_file.read_segmentation(folder)
    text.append(segmentation[0].summary() if segmentation else "with a decoder" if decoder else "no decoder to export")
    if untrained:
        text.append(f"not trained: {fold(untrained, {*names, *untrained})}")
    pixels = stage_file.read_preprocessing(folder)
    text.append(f"images: {model.image_size} px, " + ", ".join(f"{key} {value}" for key, value in pixels.items()))
    if classes := content.get("classes"):
        text.append(f"classes: {', '.join(classes[:NAMED])}{', ...' if len(classes) > NAMED else ''}")
    text += [f"measured: {name} {value:.2f}" for name, value in accuracy(folder).items()] if state == "finished" else []
    return [*text, last_block(model, names, untrained), "made from:", *(f"  {line}" for line in provenance(folder))]


def accuracy(folder: Path) -> dict[str, float]:
    """Top-1, top-5 and mIoU that were measured of the stage or converted checkpoint in `folder`, in percent."""
    found = dict(read_done(folder / "DONE"))
    if (folder / "eval" / "eval.json").is_file():
        found |= json.loads((folder / "eval" / "eval.json").read_text())["results"]
    return {name: value for name, value in found.items() if re.fullmatch(r"[^/]+/(top[15]|mIoU)", name)}


def _measured_on(folder: Path, name: str) -> str:
    """The data set of an accuracy, as far as the stage says."""
    evals = {} if "converted" in stage_file.read(folder) else stage_file.read_stage(folder).evals
    data = evals[name].data if name in evals else None
    return f"{name}, {data.title()}, split {data.split}" if data else name


def front_matter(weights: Any, library: str | None) -> str:
    """What the hub reads."""
    task = "image-classification" if weights.model.num_classes else "image-feature-extraction"
    task = "image-segmentation" if weights.task else task
    lines = ["license: other", f"pipeline_tag: {task}", f"tags: [{task}, vit, tinymim_jax]"]
    return "\n".join(["---", *lines, *([f"library_name: {library}"] if library else []), "---"])


def _images(weights: Any, library: str | None) -> str:
    """How an image becomes the model's input."""
    pixels, size = weights.pixels, weights.model.image_size
    normalised = f"normalised with mean {pixels['mean']} and std {pixels['std']}."
    if weights.task:
        how = "to one window" if weights.data.masks.squash else f"to fit into {weights.data.masks.scale}"
        beside = " Hugging Face's processor here squashes it into one window." if library == "transformers" else ""
        return f"Images: RGB in [0, 1], resized {how} (bilinear), seen in windows of {size} px, {normalised}{beside}"
    edge = int(size / pixels["crop_pct"])
    what = "both sides" if pixels["crop_mode"] == "squash" else "the shorter side"
    crop = "" if edge == size and pixels["crop_mode"] == "squash" else f", then the central {size} px"
    return f"Images: RGB in [0, 1], {what} resized to {edge} px ({pixels['interpolation']}, PIL){crop}, {normalised}"


def text(weights: Any, usage: str, library: str | None = None) -> str:
    """README.md of an exported folder; `usage` is code that loads it, with `library`, by the hub's name."""
    model = weights.model
    untrained = stage_file.read_untrained(weights.folder)
    heads = ""
    if weights.regrouped:
        was, now = model.last_block_heads, model.num_heads
        heads = f"\nBlock {model.depth} was trained with {was} heads and is read with {now} here.\n"
    origin = "\n".join(provenance(weights.folder))
    left_out = f"\n{weights.left_out}\n" if weights.left_out else ""
    measured = {} if weights.regrouped else accuracy(weights.folder)  # with other heads it is another model
    rows = [(_measured_on(weights.folder, k.split("/")[0]), k.split("/")[1], f"{v:.2f} %") for k, v in measured.items()]
    table = f"## Accuracy\n\n{markdown.table(('data set', 'measure', 'value'), rows)}\n\n" if rows else ""
    beside = ""
    if library == "transformers" and weights.pixels["crop_mode"] != "squash" and not weights.task:
        beside = " The processor here cuts the centre one pixel beside that where the margin is odd."
    names = f"\nClasses, in the order of the outputs: {', '.join(weights.classes)}.\n" if weights.classes else ""
    unknown = "\nPart of what they were made from is not at hand, and its licence is not known here.\n"
    task = f" {weights.task.summary().capitalize()}." if weights.task else ""
    return f"""{front_matter(weights, library)}

# {weights.folder.name}

{model.summary()}.{task}
{heads}{left_out}
{last_block(model, convert.names(model), untrained)}.

{_images(weights, library)}{beside} LayerNorm eps {model.layer_norm_eps:g}, exact GELU.
{names}
{table}## Use

```python
{usage}
```

## Provenance

{origin}

## Licence

Weights keep the licence of those that they were made from (above), and of the data. tinymim_jax, which wrote this
folder, is Apache-2.0.
{unknown if GONE in origin else ""}"""
