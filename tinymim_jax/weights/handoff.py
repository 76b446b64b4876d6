"""From another stage's checkpoint to this stage's parameters: strict, and reported.

`match` decides from shapes alone, so a dry run finds every mismatch; `transfer` moves the arrays.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from etils.epath import Path

from tinymim_jax.experiment import config
from tinymim_jax.experiment.config import Init
from tinymim_jax.models import posembed, vit
from tinymim_jax.runtime import codec, storage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.training.optim import matches
from tinymim_jax.weights import checkpoint

FORMAT = 1  # of stage.json and of what stands beside it
WEIGHTS = (".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt")  # how names of weight files end
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a hand-over does with each key, "encoder/block1/..."."""

    target: Shapes
    source: Shapes
    moves: dict[str, str]  # this model's key -> the source's
    fresh: list[str]  # keys that keep their initial values
    skipped: list[str]  # keys of the source that are left out
    regrouped: dict[str, tuple[int, int]]  # key -> heads before and after
    resized: dict[str, tuple[int, int]]  # key -> patches a side before and after
    untrained: list[str]  # loaded keys that the source's own stage did not train

    def lines(self) -> list[str]:
        """For people: one line per kind of treatment."""
        text = [f"loaded {len(self.moves)} arrays"]
        for heads in dict.fromkeys(self.regrouped.values()):
            keys = [key for key, value in self.regrouped.items() if value == heads]
            text.append(f"regrouped {heads[0]} -> {heads[1]} heads: {fold(keys, self.target)}")
        text += [f"resized {key}: {old} x {old} -> {new} x {new} patches" for key, (old, new) in self.resized.items()]
        text += [f"not trained by the source: {fold(self.untrained, self.target)}"] if self.untrained else []
        text += [f"re-initialised: {fold(self.fresh, self.target)}"] if self.fresh else []
        return text + ([f"skipped: {fold(self.skipped, self.source)}"] if self.skipped else [])


def fold(keys: Iterable[str], among: Iterable[str]) -> str:
    """`keys` in a line: a module whose keys `among` are all in is named alone, neighbouring blocks are a range."""
    keys = list(keys)
    others = {prefix for key in set(among) - set(keys) for prefix in _prefixes(key)}
    names = dict.fromkeys(next((p for p in _prefixes(key) if p not in others), key) for key in keys)
    groups: dict[str, list[int]] = {}
    for name in names:
        block = re.search(r"block(\d+)", name)
        groups.setdefault(re.sub(r"block\d+", "block{}", name), []).extend([int(block[1])] if block else [])
    return ", ".join(template.replace("{}", _ranges(blocks)) for template, blocks in groups.items())


def _prefixes(key: str) -> list[str]:
    """Every leading part of a path: a, a/b and a/b/c of a/b/c."""
    parts = key.split("/")
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return "+".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def flatten(tree: Any) -> dict[str, Any]:
    """Nested dict -> {"a/b/c": leaf}."""
    return flax.traverse_util.flatten_dict(tree, sep="/")


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """{"a/b/c": shape} of a nested dict of arrays."""
    return {key: tuple(leaf.shape) for key, leaf in flatten(tree).items()}


def match(target: Shapes, source: Shapes, init: Init, untrained: Sequence[str] = ()) -> Report:
    """How `source` fills `target`; raises InputError naming the keys that neither fit nor are excused by `init`.

    `untrained` are the source's keys that its own stage did not train; the report says which were loaded.
    """
    renamed: dict[str, str] = {}
    for key in source:
        other = renamed.setdefault(_rename(key, init.rename), key)
        if other != key:
            raise InputError(f"init.rename gives {other} and {key} of the source one name; make them differ")
    report = Report(target, source, {}, [], [], {}, {}, [])
    problems = []
    for key, shape in target.items():
        if _is_beyond(key, init.keep_blocks) or (
            matches(init.fresh, key) and not _fits(key, shape, renamed, report, init)
        ):
            report.fresh.append(key)
            continue
        if key not in renamed:
            problems.append(key)
            continue
        report.moves[key] = renamed[key]
        if renamed[key] in untrained:
            report.untrained.append(key)
        if source[renamed[key]] != shape:
            _fit(key, source[renamed[key]], shape, init, report)
    if problems:
        raise InputError(
            f"the source lacks {fold(problems, target)}; name what may start from its initial values in init.fresh"
        )
    unused = [key for new, key in renamed.items() if new not in target]
    unused += [renamed[key] for key in report.fresh if key in renamed]
    surplus = [key for key in unused if not matches(init.skip, key) and not _is_beyond(key, init.keep_blocks)]
    if surplus:
        raise InputError(f"this model has no {fold(surplus, source)}; name what may be left out in init.skip")
    report.skipped.extend(unused)
    return report


def _fit(key: str, old: tuple[int, ...], new: tuple[int, ...], init: Init, report: Report) -> None:
    """Notes how an array of shape `old` becomes `new`; raises InputError if it cannot, or `init` does not allow it."""
    if _is_regrouping(key, old, new):
        report.regrouped[key] = (old[-2], new[-2])
        if not init.regroup_heads:
            raise InputError(
                f"{key} has {old[-2]} heads in the source and {new[-2]} here; use the same number of heads,"
                " or set init.regroup_heads=True to re-read the channels"
            )
    elif key.endswith("pos_embed") and _is_resizing(old, new):
        there, here = (posembed.side(s[1]) for s in (old, new))
        report.resized[key] = (there, here)
        if not init.resize_posembed:
            raise InputError(
                f"{key} is for {there} x {there} patches in the source and {here} x {here} here; use the same image"
                " and patch size, or set init.resize_posembed=True"
            )
    else:
        raise InputError(f"{key} is {old} in the source and {new} here: the two models differ in size")


def _fits(key: str, shape: tuple[int, ...], renamed: Mapping[str, str], report: Report, init: Init) -> bool:
    """Whether the source has a value for `key`; one of another size that may be left out (init.skip) is none."""
    if key not in renamed:
        return False
    old = report.source[renamed[key]]
    usable = old == shape or _is_regrouping(key, old, shape) or (key.endswith("pos_embed") and _is_resizing(old, shape))
    return usable or not matches(init.skip, renamed[key])


def _rename(key: str, rename: Mapping[str, str]) -> str:
    for pattern, replacement in rename.items():
        key = re.sub(pattern, replacement, key)
    return key


def _is_beyond(key: str, keep_blocks: int | None) -> bool:
    """Whether `key` lies behind the blocks that are taken over."""
    block = re.match(r"encoder/block(\d+)/", key)
    behind = int(block[1]) > keep_blocks if block and keep_blocks is not None else False
    return behind or (keep_blocks is not None and bool(re.match(r"encoder/(norm|fc_norm|head|neck)", key)))


def _is_regrouping(key: str, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """The same fused qkv channels, [..., 3, H, E], split into other heads."""
    return "/attn/qkv/" in key and old[:-2] == new[:-2] and old[-2] * old[-1] == new[-2] * new[-1]


def _is_resizing(old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Positions of as many channels and as many tokens in front of the patches."""
    in_front = [shape[1] - posembed.side(shape[1]) ** 2 for shape in (old, new)]
    return old[-1] == new[-1] and in_front[0] == in_front[1]


def transfer(target: Any, source: Any, report: Report) -> Any:
    """`target`, a nested dict of arrays, with the arrays of `source` that `report` moves, in its dtypes."""
    filled, arrays = flatten(target), flatten(source)
    for key, source_key in report.moves.items():
        array, shape = np.asarray(arrays[source_key]), filled[key].shape
        if key in report.resized:
            array = posembed.resize(array, report.resized[key][1])
        filled[key] = array.reshape(shape).astype(filled[key].dtype)
    return flax.traverse_util.unflatten_dict(filled, sep="/")


def for_teacher(init: Init) -> Init:
    """`init` for a teacher: it is cut off after its target block, and what that leaves over is skipped."""
    return dataclasses.replace(init, skip=(".*",), fresh=())


def source_folder(init: Init, workdir: Path) -> Path:
    """Where `init` points: a stage of this workdir, any stage's folder, or where a foreign file is converted to."""
    if init.stage is not None:
        return workdir / init.stage
    path = storage.path(init.path)
    storage.check(path)
    if (path / "stage.json").is_file():
        return path
    # Two files of one name are two checkpoints.
    digest = hashlib.sha256(init.path.encode()).hexdigest()[:6]
    converted = workdir / "converted" / f"{path.stem if path.suffix in WEIGHTS else path.name}-{digest}"
    return converted if is_foreign(path) or finished(converted) else path


def is_foreign(path: Path) -> bool:
    """Whether `path` is somebody else's checkpoint (`bridge.convert` reads it), not a stage's folder."""
    if (path / "stage.json").is_file():
        return False
    return path.suffix in WEIGHTS or path.is_file() or (path / "config.json").is_file()


def read_stage(folder: Path) -> config.Stage:
    """The stage that was run in `folder`, from its own `stage.json`; raises InputError if it is not one."""
    content = _stage_json(folder)
    if "stage" not in content:
        raise InputError(f"{folder} is a converted checkpoint, not a stage that was run")
    return codec.from_dict(config.Stage, content["stage"], str(folder / "stage.json"))


def read_model(folder: Path) -> config.ViT:
    """The model of the stage or converted checkpoint in `folder`; raises InputError if it is neither."""
    if converted := read_converted(folder):
        return codec.from_dict(config.ViT, converted["model"], str(folder / "stage.json"))
    return read_stage(folder).model


def read_converted(folder: Path) -> dict[str, Any] | None:
    """What is known of a converted checkpoint; None if `folder` holds a stage that was run here."""
    content = _stage_json(folder)
    return content.get("converted")


def read_untrained(folder: Path) -> list[str]:
    """The parameters that the stage in `folder` did not train; raises InputError if it is not a stage's folder."""
    return _stage_json(folder)["untrained"]


def _stage_json(folder: Path) -> dict[str, Any]:
    file = folder / "stage.json"
    if not folder.exists():
        raise InputError(f"{folder} does not exist; run that stage first, or name the folder of a stage that was run")
    if is_foreign(folder):
        raise InputError(
            f"{folder} is not a stage's folder but another project's checkpoint; convert it first:"
            f" python -m tinymim_jax convert {folder} DST"
        )
    if not file.is_file():
        stages = sorted(f.parent.name for f in folder.glob("*/stage.json"))
        advice = f"name one of the stages in it: {', '.join(stages)}" if stages else "it has no stage.json"
        raise InputError(f"{folder} is not the folder of a stage: {advice}")
    try:
        content = json.loads(file.read_text())
        if content.get("format", FORMAT) > FORMAT:
            raise InputError(
                f"{folder} was written by a newer tinymim_jax (format {content['format']}, this one reads {FORMAT});"
                " update it"
            )
        if ("stage" in content or "converted" in content) and isinstance(content["untrained"], list):
            return content
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"{file} is damaged; delete {folder} and make it again, as it was made")


def finished(folder: Path) -> bool:
    """Whether the stage in `folder` ran to its end."""
    return (folder / "DONE").is_file()


def read_variables(folder: Path) -> dict[str, Any]:
    """A finished stage's collections as numpy arrays; `params` are the averaged ones if it kept an average."""
    if not finished(folder):
        raise InputError(f"{folder} has no finished stage: run that stage first")
    model = checkpoint.read_model(folder)
    return {"params": model["ema"] or model["params"], **model["model_state"]}


def read_params(folder: Path) -> Any:
    """A finished stage's parameters, as `read_variables`."""
    return read_variables(folder)["params"]


def load(path: str | Path) -> tuple[vit.VisionTransformer, dict[str, Any]]:
    """The encoder of the stage in folder `path`: (model, variables); see `tinymim_jax.load`."""
    folder = storage.path(path)
    storage.check(folder)
    model = vit.build(read_model(folder))
    variables = read_variables(folder)
    return model, jax.tree.map(jax.numpy.asarray, {**variables, "params": variables["params"]["encoder"]})
