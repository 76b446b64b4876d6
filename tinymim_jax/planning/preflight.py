"""What a stage needs before it can start: devices, data, weights; said before anything runs."""

import functools
from collections.abc import Iterator

import jax
from etils.epath import Path

from tinymim_jax.bridge import convert
from tinymim_jax.data import sources
from tinymim_jax.evals import make_evaluator
from tinymim_jax.experiment import config
from tinymim_jax.experiment.config import Config, Stage
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.sharding import check_batch
from tinymim_jax.weights import handoff

PROBES = (config.Knn, config.Logistic)  # evals that compare the labels of two sets


def check_ready(cfg: Config, to_run: list[str], workdir: Path, mesh: jax.sharding.Mesh) -> None:
    """Raises InputError if one of the stages `to_run` could not start after the others: devices, data, weights."""
    for name in to_run:
        try:
            _check_stage(cfg.stages[name], to_run, workdir, mesh)
        except InputError as error:
            raise InputError(f"stage {name}: {error}") from None


def _check_stage(stage: Stage, to_run: list[str], workdir: Path, mesh: jax.sharding.Mesh) -> None:
    check_batch(stage.run.batch_size, mesh, stage.optim.accum_steps)
    for init in config.sources(stage):
        folder = handoff.source_folder(init, workdir)
        if init.stage not in to_run and not handoff.finished(folder) and not foreign(init, workdir):
            raise InputError(f"takes weights from {folder}, which has no finished stage: run that stage first")
        check_pixels(stage, init, workdir)
    sources.open_source(stage.data)
    for cfg_eval in stage.evals.values():
        make_evaluator(cfg_eval, mesh)
    check_classes(stage)


def check_pixels(stage: Stage, init: config.Init, workdir: Path) -> None:
    """Raises InputError if `init` is a foreign checkpoint that says it saw pixels normalised in another way."""
    if path := foreign(init, workdir):
        found = read_foreign(path).layout
        stated, pixels = found.is_stated, found.preprocessing
    else:
        folder = handoff.source_folder(init, workdir)
        converted = handoff.read_converted(folder) if handoff.finished(folder) else None
        stated, pixels = (converted or {}).get("preprocessing_is_stated"), (converted or {}).get("preprocessing")
    for field in ("mean", "std") if stated else ():
        if list(getattr(stage.data, field)) != pixels[field]:
            raise InputError(
                f"{init.path} was trained on pixels normalised with {field} {tuple(pixels[field])}; set data.{field} to"
                " that, of the stage and of its evals"
            )


def check_classes(stage: Stage) -> None:
    """Raises InputError if data whose labels are compared differ in their classes, as far as these have names."""
    pairs = [(cfg.bank, cfg.data) for cfg in stage.evals.values() if isinstance(cfg, PROBES)]
    if isinstance(stage.task, config.Classify):
        pairs += [(stage.data, cfg.data) for cfg in stage.evals.values() if _has_the_same_classes(cfg)]
        names = sources.open_source(stage.data).classes or ()
        if names and len(names) != stage.model.num_classes:
            raise InputError(f"data has {len(names)} classes; set model.num_classes, now {stage.model.num_classes}")
    for pair in pairs:
        check_same_classes(*pair)


def check_same_classes(*pair: config.Data) -> None:
    """Raises InputError if two sets differ in the names of their classes, as far as they have any."""
    first, second = (sources.open_source(data).classes for data in pair)
    if first is not None and second is not None and (odd := sorted(set(first) ^ set(second))):
        where = " and ".join(f"{data.path}/{data.split}" for data in pair)
        raise InputError(f"data: {where} differ in their classes ({odd[0]}); both need the same")


def _has_the_same_classes(cfg: config.Eval) -> bool:
    """Whether an eval's labels are those of the training data."""
    if isinstance(cfg, config.Classification):
        return not cfg.subset
    return isinstance(cfg, config.Corruptions) and not cfg.stored


def convert_sources(cfg: Config, to_run: list[str], workdir: Path) -> None:
    """Converts the foreign checkpoints that the stages `to_run` start from, each once, into WORKDIR/converted/."""
    for init in [init for name in to_run for init in config.sources(cfg.stages[name])]:
        folder = handoff.source_folder(init, workdir)
        if path := foreign(init, workdir):
            converted = read_foreign(path)
            print("\n  ".join([*converted.lines(), f"converted into {folder}"]), flush=True)
            convert.write(converted, folder)
    read_foreign.cache_clear()  # gigabytes


def foreign(init: config.Init, workdir: Path) -> Path | None:
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


def data_sets(stage: Stage) -> Iterator[config.Data]:
    """Everything that `stage` reads: its training data, then that of its evals."""
    yield stage.data
    for cfg in stage.evals.values():
        if not isinstance(cfg, config.Corruptions) or not cfg.stored:  # which is no tree, and checked by its evaluator
            yield cfg.data
        if isinstance(cfg, PROBES):
            yield cfg.bank
