"""`stage.json`: what a folder of weights says of itself, so that a teacher is rebuilt from its own words."""

import json
import platform
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path as LocalPath
from typing import Any

import jax
from etils.epath import Path

from tinymim_jax.evals.inference import TrainedModel
from tinymim_jax.evals.suite import Subject
from tinymim_jax.experiment.config import Data, Masks, Model, Stage, Task
from tinymim_jax.models.contract import Encoder
from tinymim_jax.runtime import codec, storage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import Context, TaskConfig
from tinymim_jax.weights import handoff

FORMAT = 2  # of stage.json and of what stands beside it
PIXELS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")
MADE_BY = {1: "tinymim_jax 0.1"}  # older formats, which are read and not gone on with


def describe(
    stage: Stage, untrained: Iterable[str], classes: Iterable[str] | None = None, images: int | None = None,
    handover: Iterable[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """The contents of `stage.json`: everything needed to build the stage again, and what it ran on.

    `classes` are the names of the head's outputs, None where there is no head or nobody names them; `images` are as
    many as it was begun with; `handover` is what was said of data and weights then.
    """
    facts = {"stage": codec.to_dict(stage), "untrained": list(untrained), "classes": list(classes) if classes else None}
    versions = {name: version(name) for name in PACKAGES}
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    machine = {"devices": devices, "processes": jax.process_count(), "system": platform.platform()}
    machine["python"] = platform.python_version()
    begun = {"images": images, "handover": list(handover)}
    return {"format": FORMAT, **facts, **begun, "versions": versions, "machine": machine}


def read_stage(folder: Path) -> Stage:
    """The stage that was run in `folder`, from its own `stage.json`; raises InputError if it is not one."""
    content = read(folder)
    if "stage" not in content:
        raise InputError(f"{folder} is a converted checkpoint, not a stage that was run")
    return codec.from_dict(Stage, content["stage"], str(folder / "stage.json"))


def read_model(folder: Path) -> Encoder:
    """The model of the stage or converted checkpoint in `folder`; raises InputError if it is neither."""
    content = read(folder)
    model = content["converted"]["model"] if "converted" in content else content["stage"]["model"]
    return codec.from_dict(Model, model, f"{folder / 'stage.json'}.model")


def read_untrained(folder: Path) -> list[str]:
    """The parameters that the stage in `folder` did not train; raises InputError if it is not a stage's folder."""
    return read(folder)["untrained"]


def read_segmentation(folder: Path) -> tuple[TaskConfig, Data] | None:
    """The task whose head gives each pixel a class, and the data that it was trained on, of a converted checkpoint
    without a path; None: the model in `folder` has no such head.
    """
    if (converted := read(folder).get("converted")) is None:
        stage = read_stage(folder)
        return (stage.task, stage.data) if stage.task.gives_pixels else None
    if not converted.get("task"):
        return None
    stated = {key: tuple(converted["preprocessing"][key]) for key in ("mean", "std")}
    masks = codec.from_dict(Masks, converted["masks"], f"{folder / 'stage.json'}.masks")
    size = converted["model"]["image_size"]
    data = Data("pairs", split="val", transform="eval", image_size=size, masks=masks, **stated)
    return codec.from_dict(Task, converted["task"], f"{folder / 'stage.json'}.task"), data


def read_preprocessing(folder: Path) -> dict[str, Any]:
    """How evaluation makes images the model's input: the fields `PIXELS` of `Data`, as JSON has them."""
    if (converted := read(folder).get("converted")) is not None:
        stated = converted["preprocessing"]
        data = Data("folder", **{key: stated[key] for key in PIXELS if key in stated})
    else:
        stage = read_stage(folder)
        opened = [data for cfg in stage.evals.values() for data in cfg.opened()]
        data = next((data for data in opened if not data.corruption), stage.data)
    return {key: codec.to_dict(getattr(data, key)) for key in PIXELS}


def check_resumable(folder: Path) -> None:
    """Raises InputError if an older version has begun the stage in `folder` and not finished it."""
    if older := MADE_BY.get(_parsed(folder)[0]):
        raise InputError(
            f"{folder} was begun by {older}, whose checkpoints this version does not go on from; finish it with"
            f" that, or delete {folder} to run the stage again"
        )


def changes(folder: Path, stage: Stage) -> list[str]:
    """Lines "field: old -> new" between the stage that was run in `folder` and `stage`.

    Where its data lies, and how many images an evaluation takes at once, is not what a stage is.
    """
    found = codec.differences(codec.to_dict(read_stage(folder)), codec.to_dict(stage))
    free = {f"{where}.path" for where, _ in codec.walk(stage, Data)} | {f"evals.{n}.batch_size" for n in stage.evals}
    found = [line for line in found if line.partition(": ")[0] not in free]
    if _parsed(folder)[0] == FORMAT:
        return found
    # What a hand-over leaves out was said in other words, and of a stage that is finished it is past.
    return [line for line in found if not re.match(r"(.*\.)?(init|teacher)\.(skip|fresh|regroup_heads): ", line)]


def read(folder: Path) -> dict[str, Any]:
    """The contents of `stage.json` in today's format; raises InputError that says what `folder` is instead.

    "stage" is a stage that was run here, "converted" what is known of a converted checkpoint; "classes" are the names
    of the head's outputs in their order, None or missing where they are not known or there is no head.
    """
    return _parsed(folder)[1]


def _parsed(folder: Path) -> tuple[int, dict[str, Any]]:
    """The format that `stage.json` has, and its contents in today's."""
    file = folder / "stage.json"
    if not folder.exists():
        raise InputError(f"{folder} does not exist; run that stage first, or name the folder of a stage that was run")
    if handoff.is_foreign(folder):
        raise InputError(
            f"{folder} is not a stage's folder but another project's checkpoint; convert it first:"
            f" python -m tinymim_jax convert {folder} DST"
        )
    if not file.is_file():
        stages = [f.name for f in storage.children(folder) if (f / "stage.json").is_file()]
        advice = f"name one of the stages in it: {', '.join(stages)}" if stages else "it has no stage.json"
        raise InputError(f"{folder} is not the folder of a stage: {advice}")
    try:
        content = json.loads(file.read_text())
        for holder in (content.get("stage"), content.get("converted")):
            if holder is not None:
                holder["model"].setdefault("kind", "vit")  # once there were no others
        made = content.get("format", FORMAT if "converted" in content else 1)
        if made > FORMAT:
            raise InputError(
                f"{folder} was written by a newer tinymim_jax (format {made}, this one reads {FORMAT}); update it"
            )
        if ("stage" in content or "converted" in content) and isinstance(content["untrained"], list):
            return made, _upgraded(content) if made < FORMAT else content
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"{file} is damaged; bring back a copy of it: the weights beside it may be whole")


def _upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """Format 1 as format 2: a distillation had one target, and MAE's decoder lay beside the encoder."""
    task, untrained = content["stage"]["task"], content["untrained"]
    if task["kind"] == "distill":
        teacher, kept = task["teacher"], {key: task[key] for key in ("kind", "color_jitter") if key in task}
        target = {"kind": "relation", "teacher_block": teacher["block"], "heads": teacher.get("heads")}
        names = {"student_block": "student_block", "relations": "relations", "relation_kernel": "kernel"}
        target |= {new: task[old] for old, new in names.items() if old in task}
        task = {**kept, "teacher": teacher["init"], "targets": {"relation": target}}
    untrained = [
        name.replace("decoder/", "pretext/decoder/", 1) if name[:8] == "decoder/" else name for name in untrained
    ]
    return {**content, "stage": {**content["stage"], "task": task}, "untrained": untrained}


def read_subject(folder: Path) -> Subject:
    """What is evaluated, from the folder of a finished stage or a converted checkpoint; raises InputError."""
    content, model = read(folder), read_model(folder)
    told = str(folder), model, handoff.read_variables(folder), content["untrained"]
    facts = read_preprocessing(folder), content.get("classes")
    task, data = read_segmentation(folder) or (None, None)
    of_pixels = (task.build(Context(model, data)).predict, data.masks) if task else ()
    if "stage" not in content:
        return Subject(*told, None, {}, *facts, None, *of_pixels)
    stage = read_stage(folder)
    return Subject(*told, stage.data, stage.evals, *facts, stage.task.features_pool(), *of_pixels)


def load(path: str | LocalPath) -> TrainedModel:
    """The encoder of the stage in folder `path`; see `tinymim_jax.load`."""
    folder = storage.path(path)
    storage.check(folder)
    return TrainedModel(read_subject(folder))
