"""What a stage needs before it can start: devices, data, weights; said before anything runs."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils.epath import Path

from tinymim_jax.bridge import convert
from tinymim_jax.data import sources
from tinymim_jax.evals.contract import Context, Other
from tinymim_jax.experiment import stage_file
from tinymim_jax.experiment.config import Config, Stage
from tinymim_jax.models.contract import Encoder
from tinymim_jax.runtime import multihost, storage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.metric_log import write_json
from tinymim_jax.runtime.sharding import check_batch
from tinymim_jax.training import start
from tinymim_jax.weights import checkpoint, handoff
from tinymim_jax.weights.handoff import Init
from tinymim_jax.weights.parameters import matches


def check_ready(cfg: Config, to_run: list[str], workdir: Path, mesh: jax.sharding.Mesh) -> None:
    """Raises InputError if one of the stages `to_run` could not start after the others."""
    for name in to_run:
        for error in lacking(cfg, name, to_run, workdir, mesh):
            raise InputError(f"stage {name}: {error}")


def lacking(cfg: Config, name: str, to_run: list[str], workdir: Path, mesh: jax.sharding.Mesh) -> Iterator[str]:
    """What stage `name` still needs on this machine, after the others of `to_run`: devices, weights, data."""
    stage = cfg.stages[name]
    for check in (
        lambda: check_batch(stage.run.batch_size, mesh, stage.optim.accum_steps),
        *(functools.partial(_check_weights, init, where, stage, to_run, workdir) for where, init in stage.inits()),
        lambda: sources.open_source(stage.data),
        *(functools.partial(_check_eval, cfg, stage, name, workdir, mesh) for name in stage.evals),
    ):
        try:
            check()
        except InputError as error:
            yield str(error)


def _check_weights(init: Init, where: str, stage: Stage, to_run: list[str], workdir: Path) -> None:
    folder = handoff.source_folder(init, workdir)
    if init.stage not in to_run and not handoff.finished(folder) and not foreign(init, workdir):
        raise InputError(f"takes weights from {folder}, which has no finished stage: run that stage first")
    for replica in range(stage.run.replicas if where == "init" else 0):
        handoff.source_folder(init, workdir, replica)  # raises where a replica has no counterpart


def _check_eval(cfg: Config, stage: Stage, name: str, workdir: Path, mesh: jax.sharding.Mesh) -> None:
    pixels = stage.data.mean, stage.data.std
    others = {field: Other(source_model(cfg, i, workdir), {}, *pixels) for field, i in stage.eval_inits(name).items()}
    stage.evals[name].build(Context(mesh, _no_model, stage.model, others, start.classes_of(stage)))


def check_data(stage: Stage, folder: Path) -> None:
    """Raises InputError if the data at hand is not for `stage`, which `folder` is to hold."""
    check_classes(stage)
    began = stage_file.read(folder).get("images") if checkpoint.steps(folder) else None
    if began not in (None, count := len(sources.open_source(stage.data))):
        raise InputError(f"{folder} was begun with {began} images, not {count}; give those, or another --workdir")


def _no_model(*_: Any) -> Any:
    raise AssertionError("an evaluator that is only looked at does not predict")


def check_source(cfg: Config, stage: Stage, where: str, init: Init, workdir: Path) -> list[str]:
    """In what the source of weights `where` differs from `stage`: pixels, heads, classes, ..., a line each.

    Raises InputError if it is a foreign checkpoint that says it saw pixels normalised in another way, or if it has the
    same classes in another order.
    """
    folder, is_stated = handoff.source_folder(init, workdir), False
    if path := foreign(init, workdir):
        found = read_foreign(path).layout
        is_stated, pixels, classes = found.is_stated, found.preprocessing, found.classes
    elif (folder / "stage.json").is_file():
        content = stage_file.read(folder)
        is_stated = content.get("converted", {}).get("preprocessing_is_stated")
        pixels, classes = stage_file.read_preprocessing(folder), content.get("classes")
    else:
        data, classes = cfg.stages[init.stage].data, _classes_at_hand(cfg.stages[init.stage])
        pixels = {"mean": data.mean, "std": data.std}
    for field in ("mean", "std") if is_stated else ():
        if list(getattr(stage.data, field)) != pixels[field]:
            raise InputError(
                f"{init.path} was trained on pixels normalised with {field} {tuple(pixels[field])}; set data.{field} to"
                " that, of the stage and of its evals"
            )
    model = source_model(cfg, init, workdir)
    is_read = where != "init" or not matches((*init.fresh, *init.skip), "encoder/head/kernel")
    own = _classes_at_hand(stage) if is_read and model.num_classes == stage.model.num_classes > 0 else None
    if own and classes and sorted(own) == sorted(classes) and list(own) != list(classes):
        raise InputError(
            f"{where} has the data's classes in another order: its first is {classes[0]!r}, the data's {own[0]!r}; name"
            " encoder/head/.* in init.fresh and init.skip, or take another source"
        )
    return start.differences(stage, where, model, pixels)


def _classes_at_hand(stage: Stage) -> tuple[str, ...] | None:
    try:
        return start.classes_of(stage)
    except InputError:  # the data is not at hand, which is said elsewhere
        return None


def check_classes(stage: Stage) -> None:
    """Raises InputError if data whose labels are compared differ in their classes, as far as these have names."""
    labelled = stage.data if stage.task.has_labels() else None
    for cfg in stage.evals.values():
        for pair in cfg.same_classes(labelled):
            sources.check_same_classes(*pair)
    if labelled is not None:
        sources.need_labels(sources.open_source(stage.data))
    names = sources.open_source(stage.data).classes or ()
    if labelled is not None and names and len(names) != stage.model.num_classes:
        raise InputError(f"data has {len(names)} classes; set model.num_classes, now {stage.model.num_classes}")


def check_workdir(cfg: Config, workdir: Path, recipe: Mapping[str, Any] | None = None) -> None:
    """Makes the folder and notes whose it is, its stages and, if given, its recipe; InputError if it is read-only."""
    storage.check_writable(workdir)
    write_json(workdir / "chain.json", {"name": cfg.name, **(recipe or {}), "stages": list(cfg.stages)})


def convert_sources(cfg: Config, to_run: list[str], workdir: Path) -> None:
    """Converts the foreign checkpoints that the stages `to_run` start from, each once, into WORKDIR/converted/.

    The first process does; every process calls it, and forgets what it has read of them.
    """

    def convert_all() -> None:
        for init in [init for name in to_run for _, init in cfg.stages[name].inits()]:
            if path := foreign(init, workdir):
                converted, folder = read_foreign(path), handoff.source_folder(init, workdir)
                print("\n  ".join([*converted.lines(), f"converted into {folder}"]), flush=True)
                Path(folder).rmtree(missing_ok=True)  # what a killed run has left
                convert.write(lambda converted=converted: converted, folder)

    multihost.run_on_primary(convert_all)
    read_foreign.cache_clear()  # gigabytes


def foreign(init: Init, workdir: Path) -> Path | None:
    """The foreign checkpoint that `init` names and that is not converted yet; None if there is none.

    Raises InputError if another file of that name was converted before.
    """
    if init.path is None or not handoff.is_foreign(storage.path(init.path)):
        return None
    path, folder = storage.path(init.path), handoff.source_folder(init, workdir)
    if not handoff.finished(folder):
        return path
    convert.check_same(path, folder)
    return None


@functools.lru_cache(maxsize=2)
def read_foreign(path: Path) -> convert.Converted:
    """The checkpoint at `path`, read once."""
    return convert.read(path)


def source_model(cfg: Config, init: Init, workdir: Path) -> Encoder:
    """The model that `init` names, as it was (or is to be) trained; a foreign checkpoint is read for it."""
    path = foreign(init, workdir)
    return read_foreign(path).layout.model if path else start.source_model(cfg, init, workdir)


def source_models(cfg: Config, name: str, workdir: Path) -> dict[str, Encoder]:
    """The models that the task of stage `name` reads, by field."""
    return {field: source_model(cfg, init, workdir) for field, init in cfg.stages[name].task_inits().items()}
