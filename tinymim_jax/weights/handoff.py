"""From another stage's checkpoint to this stage's parameters: strict, and reported.

`match` decides from shapes alone, so a dry run finds every mismatch; `transfer` moves the arrays.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils.epath import Path

from tinymim_jax.runtime import storage
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.weights import checkpoint, resize
from tinymim_jax.weights.parameters import flatten, fold, matches, shapes_of, unflatten

WEIGHTS = (".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt")  # how names of weight files end
RELATIVE = "/relative_position/kernel"  # how names of tables of distances end
PRETEXT = "pretext/"  # parameters that no later stage reads
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass
class Init:
    """Where weights come from. Exactly one of `stage` and `path`."""

    stage: str | None = None  # an earlier stage of this chain
    path: str | None = None  # a stage's folder, of any run
    replica: int | None = ranged(None, at_least=0)  # of a stage with run.replicas; None: the one of the same number
    # regex -> replacement, on the source's keys; the only way into pretext/, whose parameters start anew elsewhere
    rename: dict[str, str] = dataclasses.field(default_factory=dict)
    skip: tuple[str, ...] = ()  # regexes: keys of the source that may be left out
    fresh: tuple[str, ...] = ()  # regexes: keys that keep their initial values, whatever the source has
    keep_blocks: int | None = ranged(None, at_least=0)  # take over the embeddings and so many blocks only; None: all
    regroup_heads: bool = False  # re-read fused qkv channels with another number of heads
    resize_posembed: bool = False  # to this model's grid: bicubic; distances by splines

    def check(self, where: str) -> None:
        """Raises InputError, naming fields by `where`, on values that do not fit together."""
        if (self.stage is None) == (self.path is None):
            raise InputError(f"{where} needs exactly one of stage and path; set the other to none")
        for pattern in (*self.skip, *self.fresh):
            check_regex(where, pattern)
        for pattern, replacement in self.rename.items():
            check_regex(where, pattern, replacement)


def check_regex(where: str, pattern: str, replacement: str = "") -> None:
    """Raises InputError if `pattern` is no regular expression, or `replacement` names groups that it has not."""
    try:
        re.sub(f"{pattern}|", replacement, "")
    except (re.error, IndexError) as error:
        raise InputError(f"{where}: {pattern!r} is not a regular expression ({error})") from None


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
        for old, new in dict.fromkeys(self.resized.values()):
            keys = [key for key, sides in self.resized.items() if sides == (old, new)]
            text.append(f"resized {old} x {old} -> {new} x {new} patches: {fold(keys, self.target)}")
        text += [f"not trained by the source: {fold(self.untrained, self.target)}"] if self.untrained else []
        text += [f"re-initialised: {fold(self.fresh, self.target)}"] if self.fresh else []
        return text + ([f"skipped: {fold(self.skipped, self.source)}"] if self.skipped else [])


def match(
    target: Shapes,
    source: Shapes,
    init: Init,
    untrained: Sequence[str] = (),
    layer_id: Callable[[str], int] | None = None,
) -> Report:
    """How `source` fills `target`; raises InputError naming the keys that neither fit nor are excused by `init`.

    What lies under pretext/ is not missed, and taken only where `init.rename` leads there. The report says which of the
    source's `untrained` keys were loaded. `layer_id` is the encoder's, which `init.keep_blocks` counts by.
    """

    def is_beyond(key: str) -> bool:
        return init.keep_blocks is not None and key.startswith("encoder/") and layer_id(key) > init.keep_blocks

    renamed: dict[str, str] = {}
    for key in source:
        other = renamed.setdefault(_rename(key, init.rename), key)
        if other != key:
            raise InputError(f"init.rename gives {other} and {key} of the source one name; make them differ")
    report = Report(target, source, {}, [], [], {}, {}, [])
    problems = []
    for key, shape in target.items():
        if (key.startswith(PRETEXT) and renamed.get(key, key) == key) or is_beyond(key) or matches(init.fresh, key):
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
    unused = {new: key for new, key in renamed.items() if new not in report.moves}
    fresh = (*init.fresh, f"{PRETEXT}.*")
    surplus = [
        key
        for new, key in unused.items()
        if not matches(init.skip, key) and not matches(fresh, new) and not is_beyond(new)
    ]
    if surplus:
        raise InputError(f"this model has no {fold(surplus, source)}; name what may be left out in init.skip")
    report.skipped.extend(unused.values())
    return report


def _fit(key: str, old: tuple[int, ...], new: tuple[int, ...], init: Init, report: Report) -> None:
    """Notes how an array of shape `old` becomes `new`; raises InputError if it cannot, or `init` does not allow it."""
    # The same fused qkv channels, [..., 3, H, E], split into other heads.
    if "/qkv/" in key and old[:-2] == new[:-2] and old[-2] * old[-1] == new[-2] * new[-1]:
        report.regrouped[key] = (old[-2], new[-2])
        if not init.regroup_heads:
            raise InputError(
                f"{key} has {old[-2]} heads in the source and {new[-2]} here; use the same number of heads,"
                " or set init.regroup_heads=True to re-read the channels"
            )
    elif (sides := _resizing(key, old, new)) is not None:
        there, here = sides
        report.resized[key] = (there, here)
        if not init.resize_posembed:
            raise InputError(
                f"{key} is for {there} x {there} patches in the source and {here} x {here} here; use the same image"
                " and patch size, or set init.resize_posembed=True"
            )
    else:
        raise InputError(f"{key} is {old} in the source and {new} here: the two models differ in size")


def _rename(key: str, rename: Mapping[str, str]) -> str:
    for pattern, replacement in rename.items():
        key = re.sub(pattern, replacement, key)
    return key


def _resizing(key: str, old: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...] | None:
    """Patches a side, there and here, of positions of as many channels and tokens in front; None if they are not."""
    if len(old) != len(new) or old[-1] != new[-1]:
        return None
    if key.endswith(RELATIVE):
        in_front = [resize.relative_front(shape[0]) for shape in (old, new)]
        sides = tuple(resize.relative_side(shape[0]) for shape in (old, new))
        return sides if in_front[0] == in_front[1] else None
    in_front = [shape[1] - resize.side(shape[1]) ** 2 for shape in (old, new)]
    if key.endswith("pos_embed") and in_front[0] == in_front[1]:
        return tuple(resize.side(shape[1]) for shape in (old, new))
    return None


def transfer(target: Any, source: Any, report: Report) -> Any:
    """`target`, a nested dict of arrays, with the arrays of `source` that `report` moves, in its dtypes."""
    filled, arrays = flatten(target), flatten(source)
    for key, source_key in report.moves.items():
        array, shape = np.asarray(arrays[source_key]), filled[key].shape
        if key in report.resized:
            resized = resize.resize_relative if key.endswith(RELATIVE) else resize.resize
            array = resized(array, report.resized[key][1])
        filled[key] = array.reshape(shape).astype(filled[key].dtype)
    return unflatten(filled)


def for_teacher(init: Init) -> Init:
    """`init` for a teacher: it is cut off after its target block, and what that leaves over is skipped."""
    return dataclasses.replace(init, skip=(".*",), fresh=(), keep_blocks=None)


def source_folder(init: Init, workdir: Path, replica: int | None = None) -> Path:
    """Where `init` points: a stage of this workdir, any stage's folder, or where a foreign file is converted to.

    Replica `replica` of a stage takes, where `init` does not say otherwise, that of its source.
    """
    if init.stage is not None:
        return _replica(workdir / init.stage, init.replica, replica)
    path = storage.path(init.path)
    storage.check(path)
    if (path / "stage.json").is_file():
        return _replica(path, init.replica, replica)
    # Two files of one name are two checkpoints.
    digest = hashlib.sha256(init.path.encode()).hexdigest()[:6]
    converted = workdir / "converted" / f"{path.stem if path.suffix in WEIGHTS else path.name}-{digest}"
    return converted if is_foreign(path) or finished(converted) else path


def _replica(folder: Path, asked: int | None, own: int | None) -> Path:
    """`folder`, or of a stage of several replicas that of the one that is `asked` for, else the `own` one."""
    names, chosen = replicas(folder), own if asked is None else asked
    is_single = not names and finished(folder)
    if (is_single and asked is not None) or (names and chosen is not None and chosen >= len(names)):
        raise InputError(f"{folder} has {len(names) or 'no'} replicas, and so no replica {chosen}; see init.replica")
    return folder / replica_name(chosen) if names and chosen is not None else folder


def replica_name(number: int) -> str:
    """The folder of a replica, in that of its stage."""
    return f"{checkpoint.REPLICA}{number}"


def replicas(folder: Path) -> list[str]:
    """The folders of the replicas of the finished stage in `folder`; [] if it has none."""
    found = storage.children(folder, f"{checkpoint.REPLICA}*") if finished(folder) else []
    names = [replica.name for replica in found if finished(replica)]
    return sorted(names, key=lambda name: int(name.removeprefix(checkpoint.REPLICA)))


def is_foreign(path: Path) -> bool:
    """Whether `path` is somebody else's checkpoint (`bridge.convert` reads it), not a stage's folder."""
    if (path / "stage.json").is_file():
        return False
    return path.suffix in WEIGHTS or path.is_file() or (path / "config.json").is_file()


def finished(folder: Path) -> bool:
    """Whether the stage in `folder` ran to its end."""
    return (folder / "DONE").is_file()


def read_variables(folder: Path) -> dict[str, Any]:
    """A finished stage's collections as numpy arrays; `params` are the averaged ones if it kept an average."""
    if not finished(folder):
        raise InputError(f"{folder} has no finished stage: run that stage first")
    check_one(folder)
    model = checkpoint.read_model(folder)
    return {"params": grouped(model["ema"] or model["params"]), **model["model_state"]}


def check_one(folder: Path) -> None:
    """Raises InputError if the stage in `folder` has several replicas."""
    if names := replicas(folder):
        raise InputError(f"{folder} has {len(names)} replicas; choose one, e.g. {folder / names[0]} (init.replica=0)")


def read_shapes(folder: Path) -> Shapes:
    """The shapes of a finished stage's parameters, by name."""
    check_one(folder)
    return shapes_of(grouped(checkpoint.model_shapes(folder)["params"]))


def grouped(params: dict[str, Any]) -> dict[str, Any]:
    """`params` under encoder/ and pretext/; the first format had MAE's decoder beside the encoder."""
    if "decoder" not in params:
        return params
    return {"encoder": params["encoder"], "pretext": {"decoder": params["decoder"]}}
