"""What a workdir holds, finished or under way; what cannot be read becomes a note."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from etils.epath import Path

from tinymim_jax.experiment import stage_file
from tinymim_jax.experiment.config import Stage
from tinymim_jax.report import tables
from tinymim_jax.runtime import metric_log, storage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.training.progress import BAD_IMAGES, SKIPPED
from tinymim_jax.weights import handoff

# Of what a hand-over says of itself, what a reader has to know.
TOLD = re.compile(r"^\s*(data|note|regrouped|resized|not trained by the source|there is no checkpoint)\b")
POSITIONS = re.compile(r"(, )?\b\w+(/\w+)*/pos_embed\b")  # fixed by design


@dataclasses.dataclass
class StageRun:
    """A stage as far as it has come."""

    name: str
    folder: Path
    stage: Stage
    content: dict[str, Any]  # stage.json
    log: list[dict[str, float]]
    done: dict[str, float] | None  # the final metrics; None: not finished

    @property
    def step(self) -> int:
        """The last one that is logged."""
        return max((int(line["step"]) for line in self.log), default=0)

    def total_steps(self) -> int | None:
        """Of the whole stage; None if that cannot be told yet."""
        if self.stage.run.steps is not None:
            return self.stage.run.steps
        line = next((line for line in self.log if line.get("epoch")), None)
        return line and round(self.stage.run.epochs * line["step"] / line["epoch"])

    def seconds(self) -> float:
        """The training behind it, as images and their speed were logged, without the last evaluation."""
        found, before = 0.0, 0
        for line in sorted((line for line in self.log if line.get("images_per_s")), key=lambda line: line["step"]):
            found += (line["step"] - before) * self.stage.run.batch_size / line["images_per_s"]
            before = line["step"]
        return found

    def sources(self) -> dict[str, str]:
        """Where its weights and teachers come from: field -> the name of a stage, or a path."""
        return {where: init.stage or str(init.path) for where, init in self.stage.inits()}

    def arrays(self) -> list[Path]:
        """The npz files of its evaluations; of several replicas, the first's."""
        first = f"{handoff.replica_name(0)}_*.npz" if self.stage.run.replicas > 1 else "*.npz"
        return storage.children(self.folder / "evals", first)


@dataclasses.dataclass
class Run:
    """A workdir. `notes` say what is missing or worth a look: (stage or "", text)."""

    title: str
    workdir: Path
    stages: dict[str, StageRun]
    waiting: list[str]  # stages that have not begun, where the run has noted its stages
    compare: dict[str, Any]
    recipe: dict[str, Any]  # chain.json
    collected: set[str]  # the stages in results.json, which is written last
    notes: list[tuple[str, str]]

    def finished(self) -> bool:
        """Whether nothing is left to do, as far as the run has noted its stages."""
        is_collected = "stages" not in self.recipe or self.stages.keys() <= self.collected
        return not self.waiting and is_collected and all(one.done is not None for one in self.stages.values())

    def results(self) -> dict[str, Any]:
        """As `results.json`, of what is finished so far."""
        done = {name: one.done for name, one in self.stages.items() if one.done is not None}
        return {"config": self.title, "stages": done, "compare": self.compare}


def read(workdir: Path) -> Run:
    """All that a workdir holds; raises InputError if it is none."""
    storage.check(workdir)
    if (workdir / "stage.json").is_file():
        raise InputError(f"{workdir} is the folder of a stage; give the folder above, {workdir.parent}")
    if not workdir.is_dir():
        raise InputError(f"{workdir}: there is no such folder; give the --workdir of a run")
    folders = [folder for folder in storage.children(workdir) if (folder / "stage.json").is_file()]
    known = [name for name in ("chain.json", "results.json") if (workdir / name).is_file()]
    if not folders and not known:
        raise InputError(f"{workdir} holds no run: neither stages nor chain.json; give the --workdir of a run")
    notes: list[tuple[str, str]] = []
    recipe = _json(workdir / "chain.json", _check_recipe, notes)
    results = _json(workdir / "results.json", _check_results, notes)
    stages = {folder.name: one for folder in folders if (one := _stage(folder, notes))}
    named, collected = recipe.get("stages", []), results.get("stages", {})
    stages = {name: stages[name] for name in dict.fromkeys([*(named or collected), *stages]) if name in stages}
    waiting = [name for name in named if name not in stages]
    title = str(recipe.get("name") or results.get("config") or workdir.name)
    run = Run(title, workdir, stages, waiting, results.get("compare", {}), recipe, set(collected), notes)
    for one in stages.values():
        notes += [(one.name, text) for text in _warnings(one)]
    if not any(one.done is not None for one in stages.values()):
        notes.append(("", "no stage is finished yet: results, pictures and analyses come with the first that is"))
    return run


def _json(file: Path, check: Callable[[dict], object], notes: list[tuple[str, str]]) -> dict[str, Any]:
    """What a file holds; {} if there is none, or `check` raises as it reads the fields."""
    try:
        content = json.loads(file.read_text()) if file.is_file() else {}
        check(content)
        return content
    except (ValueError, TypeError, KeyError, AttributeError):
        notes.append(("", f"{file.name} is damaged; the run command makes it anew"))
        return {}


def _check_recipe(content: dict[str, Any]) -> None:
    "".join([*content.get("stages", []), *content.get("changed", [])])


def _check_results(content: dict[str, Any]) -> None:
    dict.fromkeys(content.get("stages", {}))
    for compared in content.get("compare", {}).values():
        list(tables.cells(compared)), tables.agreement(compared), compared["metric"].strip()


def _stage(folder: Path, notes: list[tuple[str, str]]) -> StageRun | None:
    try:
        content, stage = stage_file.read(folder), stage_file.read_stage(folder)
    except InputError as error:
        notes.append((folder.name, str(error)))
        return None
    try:
        done = metric_log.read_done(folder / "DONE") if (folder / "DONE").is_file() else None
    except InputError as error:
        notes.append((folder.name, str(error)))
        done = None
    file = folder / "metrics.jsonl"
    lines = len(file.read_bytes().splitlines()) if file.exists() else 0  # first, as a run under way adds some
    log = [line for line in map(numbers, metric_log.read(file)) if "step" in line]
    if lines > len(log):
        notes.append((folder.name, f"metrics.jsonl is damaged in line {len(log) + 1} of {lines}: curves end there"))
    if not lines and stage.run.epochs != 0 and stage.run.steps != 0:
        notes.append((folder.name, "there is no metrics.jsonl, or it is empty: there are no curves yet"))
    return StageRun(folder.name, folder, stage, content, log, done and numbers(done))


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """What of a line is a finite number."""
    return {
        name: value
        for name, value in line.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _warnings(one: StageRun) -> Iterator[str]:
    """What a reader has to know of a stage."""
    lines = filter(TOLD.search, one.content.get("handover", ()))
    told = [POSITIONS.sub("", line).strip().removeprefix("note: ") for line in lines]
    yield from (line for line in told if not line.endswith(":"))
    names = [name for name in one.content["untrained"] if not POSITIONS.fullmatch(name)]
    untrained = ["/".join(name.split("/")[:2]) for name in names]
    if untrained:
        parts = [f"{name} ({untrained.count(name)} arrays)" for name in dict.fromkeys(untrained)]
        yield f"not trained, as the loss does not read it or it is fixed: {', '.join(parts)}"
    last = one.done or next((line for line in reversed(one.log) if "epoch" in line), {})
    if bad := last.get(BAD_IMAGES):
        yield f"{bad:.0f} images could not be read and were left out, all epochs together"
    if skipped := last.get(SKIPPED):
        yield f"{skipped:.0f} updates were left out because loss or gradient was not finite (see bad_steps.jsonl)"
    if one.done is None:
        total = one.total_steps()
        yield f"not finished: step {one.step}" + (f" of {total}" if total else "")
