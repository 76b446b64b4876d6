"""Finished models looked into: similarity of layers, attention, relations, spectra, neighbours; files of arrays."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils.epath import Path

from tinymim_jax.data.config import Data
from tinymim_jax.evals import AttentionSpan, Cka, NearestImages, RelationAgreement, Spectrum, suite
from tinymim_jax.evals.analysis import Analysis, Layers
from tinymim_jax.evals.contract import Context, Measurement, Other, save_arrays
from tinymim_jax.evals.suite import Subject
from tinymim_jax.runtime import codec, storage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.metric_log import write_json
from tinymim_jax.runtime.sharding import replicated
from tinymim_jax.weights.handoff import Init

KINDS = ("cka", "attention", "spectrum", "neighbours", "relation")


@dataclasses.dataclass
class Asked:
    """What to look at, and how; fields that several analyses share are theirs."""

    what: tuple[str, ...] = ()  # of KINDS; (): all that these checkpoints allow
    data: str = ""  # a folder of images, in any sub-folders; "": the first checkpoint's evaluation set
    images: int = 1152
    spread: bool = True
    batch_size: int = 128
    layers: Layers = "norm1"
    cls: bool = False
    patch_px: float | None = None
    mask_ratio: float = 0.0
    student_block: int | None = None
    teacher_block: int | None = None
    heads: int | None = None
    on_bad_image: str | None = None


@dataclasses.dataclass
class Look:
    """One analysis: what it is called, of which checkpoint, and which others it reads, by the field of its config."""

    name: str
    subject: int
    cfg: Analysis
    others: dict[str, int] = dataclasses.field(default_factory=dict)


def analyze(subjects: Sequence[Subject], asked: Asked, mesh: jax.sharding.Mesh, out: Path) -> dict[str, Any]:
    """Looks into the models and writes OUT/<analysis>.npz and OUT/analysis.json; returns what the latter holds.

    That is {"checkpoints": {name: folder}, "notes": [...], "results": {analysis: {metric: value}}}. Raises InputError
    if there is nothing to look at, or a model lacks what is asked for.
    """
    names = short_names([subject.name for subject in subjects])
    data = images_of(subjects, asked)
    seen = [suite.pixels(subject) for subject in subjects]
    variables = [jax.device_put(subject.variables, replicated(mesh)) for subject in subjects]
    evaluators = {}
    for look in looks(names, data, asked):
        others = {
            field: Other(subjects[i].model, variables[i], seen[i].mean, seen[i].std) for field, i in look.others.items()
        }
        subject = subjects[look.subject]
        own = dataclasses.replace(data, mean=seen[look.subject].mean, std=seen[look.subject].std)
        fields = codec.to_dict(dataclasses.replace(look.cfg, data=own))
        look.cfg = codec.from_dict(type(look.cfg), fields, look.name)  # which checks them
        evaluators[look.name] = (
            look,
            look.cfg.build(Context(mesh, suite.predict_of(subject, own), subject.model, others)),
        )
    storage.check_writable(out)
    notes = [note for name, subject in zip(names, subjects, strict=True) for note in _notes(name, subject, data)]
    print("".join(f"note: {note}\n" for note in notes), end="", flush=True)
    report = {"checkpoints": dict(zip(names, [s.name for s in subjects], strict=True)), "notes": notes, "results": {}}
    for name, (look, evaluator) in evaluators.items():
        found = Measurement({name: evaluator}).run(variables[look.subject], {}, title=name)()[name]
        found.arrays["models"] = np.array([names[i] for i in (look.subject, *look.others.values())])
        save_arrays(found, out / f"{name}.npz")
        report["results"][name] = found.scalars
        write_json(out / "analysis.json", report)
    return report


def short_names(folders: Sequence[str]) -> list[str]:
    """As little of each path as tells them apart; equal ones are numbered."""
    parts = [folder.rstrip("/").split("/") for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["_".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(folders)):
            break
    return [name if names.count(name) == 1 else f"{name}_{1 + names[:i].count(name)}" for i, name in enumerate(names)]


def images_of(subjects: Sequence[Subject], asked: Asked) -> Data:
    """What all models look at, in the largest of their sizes; raises InputError if no data is named."""
    if asked.data:
        data = dataclasses.replace(suite.in_folder(suite.pixels(subjects[0]), asked.data), masks=None)
    else:
        data = suite.data_sets(subjects[0], suite.Sets(), probes=False)[0]
    if data.masks is not None:
        raise InputError(f"{subjects[0].name} was trained on images with masks; give --data=FOLDER of images")
    size = max(subject.model.image_size for subject in subjects)
    return dataclasses.replace(data, image_size=size, on_bad_image=asked.on_bad_image or data.on_bad_image)


def looks(names: Sequence[str], data: Data, asked: Asked) -> Iterator[Look]:
    """The analyses that `asked` names, or all that go with so many checkpoints."""
    if unknown := set(asked.what) - set(KINDS):
        raise InputError(f"--what={min(unknown)}: unknown; choose from {', '.join(KINDS)}")
    blocks = {"student_block": asked.student_block, "teacher_block": asked.teacher_block}
    if "relation" in asked.what and (len(names) < 2 or None in blocks.values()):
        raise InputError(
            "--what=relation compares two checkpoints, the student first: give them, --student_block, --teacher_block"
        )
    what = asked.what or KINDS[: None if len(names) > 1 and None not in blocks.values() else -1]
    shared = {"images": asked.images, "spread": asked.spread, "batch_size": asked.batch_size}
    if "cka" in what:
        layers = {"layers": asked.layers, "cls": asked.cls}
        for i, j in itertools.combinations(range(len(names)), 2):
            other = Init(path=names[j])
            yield Look(f"cka_{names[i]}_{names[j]}", i, Cka(data, other=other, **layers, **shared), {"other": j})
        if len(names) == 1:
            yield Look(f"cka_{names[0]}", 0, Cka(data, **layers, **shared))
    for i, name in enumerate(names):
        if "attention" in what:
            span = AttentionSpan(data, patch_px=asked.patch_px, mask_ratio=asked.mask_ratio, **shared)
            yield Look(f"attention_{name}", i, span)
        if "spectrum" in what:
            pool = "cls" if asked.cls else "mean"
            yield Look(f"spectrum_{name}", i, Spectrum(data, layers=asked.layers, pool=pool, **shared))
        if "neighbours" in what:
            yield Look(f"neighbours_{name}", i, NearestImages(data, **shared))
    if "relation" in what:
        cfg = RelationAgreement(data=data, teacher=Init(path=names[1]), heads=asked.heads, **blocks, **shared)
        yield Look(f"relation_{names[0]}_{names[1]}", 0, cfg, {"teacher": 1})


def _notes(name: str, subject: Subject, data: Data) -> Iterator[str]:
    """What the reader of a result has to know of this model."""
    own = suite.pixels(subject)
    if own.image_size != data.image_size:
        yield f"{name} sees the images of {data.image_size} px resized to its {own.image_size} px"
    if (own.mean, own.std) != (data.mean, data.std):
        yield f"{name} sees pixels normalised with its own mean {own.mean} and std {own.std}"
    block = suite.features_block(subject)
    if block is not None:
        yield f"{name}: behind block {block} not all was trained; what those layers put out means little"
