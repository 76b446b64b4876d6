"""What a chain would do, worked out from shapes alone, and what keeps it from that."""

import json
import math
import os
from typing import Any

import jax
from etils.epath import Path

from tinymim_jax.data import sources
from tinymim_jax.experiment import stage_file
from tinymim_jax.experiment.config import Config, Stage
from tinymim_jax.models.contract import Encoder
from tinymim_jax.planning import preflight
from tinymim_jax.planning.preflight import check_source, foreign, read_foreign, source_models
from tinymim_jax.runtime import metric_log
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.sharding import make_mesh
from tinymim_jax.runtime.workdir_lock import WorkdirLock
from tinymim_jax.training import chain, optim
from tinymim_jax.training.setup import StageSetup, make_setup
from tinymim_jax.weights import checkpoint, handoff
from tinymim_jax.weights.handoff import Init
from tinymim_jax.weights.parameters import flatten, shapes_of

# What an unfinished stage may be given anew: the ways out that error messages name.
MENDABLE_FIELDS = (
    "optim.lr",
    "optim.clip_norm",
    "model.remat",
    "model.attention",
    "run.eval_every",
    "run.on_nan",
    "run.max_skipped",
    "run.steps_per_call",
)


def describe_chain(cfg: Config, workdir: Path, only: str | None = None, beside: int = 1) -> str:
    """`work_out`, as text, and which stages would run side by side."""
    text, setups = work_out(cfg, workdir, only)
    names = [name for name in setups if only in (None, name) and not handoff.finished(workdir / name)]
    shared = [group for group in chain.groups(cfg, chain.begins(workdir, names), beside) if len(group) > 1]
    return "\n".join([text, *(f"side by side: {', '.join(group)}" for group in shared)])


def work_out(cfg: Config, workdir: Path, only: str | None = None) -> tuple[str, dict[str, StageSetup]]:
    """What `run_chain` would do, worked out from shapes alone; reads no data but its size, writes nothing.

    Returns it for people, and the setups of the stages. Raises InputError if it could not on any machine; what this one
    lacks for it is said at the end.
    """
    setups: dict[str, StageSetup] = {}
    check_stage_name(cfg, only)
    check_owner(cfg, workdir)
    metric_log.tracker()
    mesh, line, missing = _devices(cfg)
    text, to_run = [line], [n for n in cfg.stages if only in (None, n) and not handoff.finished(workdir / n)]
    for name in cfg.stages if only is None else needed(cfg, only):
        try:
            check_unedited(cfg.stages[name], workdir / name)
            data, has_data = _data(cfg.stages[name])
            setups[name], lines = _describe_stage(cfg, name, workdir, setups, data)
            if name in to_run and has_data:
                preflight.check_data(cfg.stages[name], workdir / name)
        except InputError as error:
            raise InputError(f"stage {name}: {error}") from None
        if only in (None, name):
            text += [f"{name}: {lines[0]}", *(f"  {line}" for line in lines[1:])]
        if name in to_run:
            for error in preflight.lacking(cfg, name, to_run, workdir, mesh):
                missing.setdefault(error, name)
    text += [f"before stage {name} can run: {error}" for error, name in missing.items()]
    return "\n".join(text), setups


def check_owner(cfg: Config, workdir: Path) -> None:
    """Raises InputError if `workdir` is another experiment's."""
    file = workdir / "chain.json"
    try:
        owner = json.loads(file.read_text())["name"] if file.is_file() else cfg.name
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{file} is damaged: it does not say whose folder this is; delete it if that is {cfg.name!r}, or choose"
            " another --workdir"
        ) from None
    if owner != cfg.name:
        raise InputError(
            f"{workdir} belongs to the experiment {owner!r}, and this is {cfg.name!r}; choose another --workdir"
        )


def check_workdir(workdir: Path, is_primary: bool = True) -> None:
    """Raises InputError if nothing can be written to `workdir` or, as the primary process sees, a run is in it."""
    at = next(path for path in (workdir, *workdir.parents) if path.exists())
    if "://" not in str(at) and not os.access(at, os.W_OK):
        raise InputError(f"{at} cannot be written to; choose another --workdir, or mend its rights or mount")
    if is_primary and workdir.exists():
        WorkdirLock(workdir).check_free()


def check_stage_name(cfg: Config, name: str | None) -> None:
    """Raises InputError if `name` is given and is not a stage."""
    if name is not None and name not in cfg.stages:
        raise InputError(f"--stage={name}: no such stage; choose one of {', '.join(cfg.stages)}")


def needed(cfg: Config, name: str) -> list[str]:
    """Stage `name` and the stages that its weights come from, directly or not, in the chain's order."""
    names = {name}
    for other in reversed(cfg.stages):
        if other in names:
            names |= {init.stage for _, init in cfg.stages[other].inits() if init.stage is not None}
    return [other for other in cfg.stages if other in names]


def check_unedited(stage: Stage, folder: Path) -> None:
    """Raises InputError with the differences if `folder` holds this stage with another config.

    A stage without a checkpoint may be edited freely, one with a checkpoint but unfinished in `MENDABLE_FIELDS`.
    """
    if not (handoff.finished(folder) or checkpoint.steps(folder)):
        return
    if not (folder / "stage.json").exists():
        raise InputError(
            f"{folder} has lost its stage.json, without which nobody knows what its checkpoints are of; put it back, or"
            f" delete {folder} to run the stage again"
        )
    if not handoff.finished(folder):
        stage_file.check_resumable(folder)
    changes = stage_file.changes(folder, stage)
    mendable = not handoff.finished(folder) and all(_is_mendable(change.split(":")[0]) for change in changes)
    if changes and not mendable:
        raise InputError(
            f"{folder} was run with another config ({'; '.join(changes)}); repeat the same --config overrides,"
            f" undo the edit, choose another --workdir, or delete {folder} to run it again"
        )


def _is_mendable(field: str) -> bool:
    return field in MENDABLE_FIELDS or field.endswith(".on_bad_image")


def _describe_stage(
    cfg: Config, name: str, workdir: Path, setups: dict[str, StageSetup], data: list[str]
) -> tuple[StageSetup, list[str]]:
    stage, models = cfg.stages[name], source_models(cfg, name, workdir)
    setup = make_setup(stage, name, models, stage.data.num_examples or len(sources.open_source(stage.data)))
    lines = [_length(setup), _model(setup), _optimizer(setup), *data, *_evals(stage)]
    for field, init in stage.task_inits().items():
        report = _match(setup.frozen[field], handoff.for_teacher(init), models[field], workdir, setups, None)
        lines.append(f"{field} {init.stage or init.path}: {setup.task.describe_source(field)}")
        lines += [*(f"  {line}" for line in report.lines()), *_source_lines(cfg, name, field, init, workdir)]
    if stage.init:
        first = 0 if stage.run.replicas > 1 else None
        report = _match(setup.params, stage.init, stage.model, workdir, setups, first)
        lines += [f"init from {stage.init.stage or stage.init.path}", *(f"  {line}" for line in report.lines())]
        lines += _source_lines(cfg, name, "init", stage.init, workdir)
    else:
        lines.append("init: scratch")
    compared = [
        f"compared in {title} as {label}"
        for title, table in cfg.compare.items()
        for label, names in table.rows.items()
        if name in names
    ]
    return setup, [*lines, *setup.untrained_line(), *compared, _status(workdir / name)]


def _match(
    target: Any, init: Init, model: Encoder, workdir: Path, setups: dict[str, StageSetup], replica: int | None
) -> handoff.Report:
    source, untrained = _source(init, workdir, setups, replica)
    return handoff.match(shapes_of(target), source, init, untrained, model.layer_id)


def _source(
    init: Init, workdir: Path, setups: dict[str, StageSetup], replica: int | None
) -> tuple[handoff.Shapes, list[str]]:
    """Shapes of what `init` loads for `replica`, and which of it was not trained."""
    if init.stage is not None:
        return shapes_of(setups[init.stage].params), setups[init.stage].untrained()
    if path := foreign(init, workdir):
        converted = read_foreign(path)
        return shapes_of(converted.params), converted.untrained
    folder = handoff.source_folder(init, workdir, replica)
    untrained = stage_file.read_untrained(folder)  # says best what is wrong with the folder
    if not handoff.finished(folder):
        raise InputError(f"{folder} has no finished stage: run that stage to its end first")
    return handoff.read_shapes(folder), untrained


def _source_lines(cfg: Config, name: str, field: str, init: Init, workdir: Path) -> list[str]:
    """In what a source differs from stage `name`, if that is to run; if it is to be converted, what that would say."""
    is_to_run, lines = not handoff.finished(workdir / name), []
    if path := foreign(init, workdir):
        found, folder = read_foreign(path).layout, handoff.source_folder(init, workdir)
        lines = [f"would be converted into {folder}: {found.kind}", f"licence: {found.licence}"]
        lines += [f"note: {note}" for note in found.notes]
    lines += check_source(cfg, cfg.stages[name], field, init, workdir) if is_to_run else []
    return [f"  {line}" for line in lines]


def _length(setup: StageSetup) -> str:
    run, task = setup.stage.run, setup.stage.task.summary()
    epochs = f"{run.epochs:g} epochs x {setup.steps_per_epoch} steps = " if run.epochs is not None else ""
    accum = setup.stage.optim.accum_steps
    parts = f" in {accum} micro-batches" if accum > 1 else ""
    seeds = f", {run.replicas} replicas (seeds {run.seed} to {run.seed + run.replicas - 1})" if run.replicas > 1 else ""
    return f"{task}, {epochs}{setup.total_steps} steps of {run.batch_size} images{parts}{seeds}"


def _devices(cfg: Config) -> tuple[jax.sharding.Mesh, str, dict[str, str]]:
    """The mesh that is asked for, or that of all devices and why it is not; a line that says so."""
    missing = {}
    try:
        mesh = make_mesh(cfg.mesh.data, cfg.mesh.fsdp)
    except InputError as error:
        mesh, missing = make_mesh(), {str(error): next(iter(cfg.stages))}
    grid = "not the mesh's" if missing else f"data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}"
    return mesh, f"devices: {jax.device_count()} x {jax.devices()[0].device_kind}, {grid}", missing


def _data(stage: Stage) -> tuple[list[str], bool]:
    """A line for each set of records that the stage reads, then what is said of them; and whether all are at hand."""
    lines, notes = {}, {}
    for data in stage.data_sets():
        what = f"data: {data.source} {data.path or data.name}".rstrip() + f", split {data.split}"
        try:
            source = sources.open_source(data)
            lines[f"{what}: {len(source):,} images"] = True
            notes |= dict.fromkeys(f"note: {note}" for note in source.notes)
        except InputError:
            lines[f"{what}: not at hand, the end says why"] = False
    return [*lines, *notes], all(lines.values())


def _evals(stage: Stage) -> list[str]:
    """What is measured, and when."""
    kinds = ", ".join(f"{name} ({cfg.kind})" for name, cfg in stage.evals.items())
    when = f"every {stage.run.eval_every} steps and at the end" if stage.run.eval_every else "at the end"
    return [f"evals, {when}: {kinds}"] if kinds else []


def _model(setup: StageSetup) -> str:
    model = setup.stage.model
    sizes = {key: math.prod(leaf.shape) for key, leaf in flatten(setup.params).items()}
    trained = sum(sizes.values()) - sum(sizes[key] for key in setup.untrained())
    drop = f", drop path {model.drop_path:g}" if model.drop_path else ""
    return f"model: {model.summary()}{drop}, {model.dtype}; {sum(sizes.values()):,} parameters, {trained:,} trained"


def _optimizer(setup: StageSetup) -> str:
    o, batch = setup.stage.optim, setup.stage.run.batch_size
    scaling = f" ({o.lr:g} x {batch} / {o.lr_batch})" if o.lr_batch else ""
    layers = f", layer decay {o.layer_decay:g}" if o.layer_decay != 1 else ""
    own = f"betas {o.b1:g} {o.b2:g}" if o.name == "adamw" else f"{'Nesterov ' * o.nesterov}momentum {o.momentum:g}"
    warmup = f"{o.warmup_steps} steps" if o.warmup_steps else f"{o.warmup_epochs:g} epochs"
    shape = "" if o.schedule == "cosine" else f" {o.schedule} schedule,"
    return (
        f"optimiser: {o.name}, lr {optim.peak_lr(o, batch):g}{scaling}, warm-up {warmup},{shape}"
        f" min lr {o.min_lr:g}, weight decay {o.weight_decay:g}, {own}{layers}"
    )


def _status(folder: Path) -> str:
    if handoff.finished(folder):
        metric_log.read_done(folder / "DONE")  # of one that is damaged later stages would not learn
        return "status: finished, would be skipped"
    steps = checkpoint.steps(folder)
    return f"status: would go on from step {max(steps)}" if steps else "status: would start"
