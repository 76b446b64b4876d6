"""A chain: its stages in order, each fed by earlier ones."""

import contextlib
import math
import statistics
from typing import Any

from etils.epath import Path

from tinymim_jax.experiment.config import Config
from tinymim_jax.planning.dry_run import describe_chain
from tinymim_jax.planning.preflight import check_ready, convert_sources
from tinymim_jax.runtime import multihost, storage
from tinymim_jax.runtime.metric_log import read_done, write_json
from tinymim_jax.runtime.preemption import StopRequest
from tinymim_jax.runtime.sharding import make_mesh
from tinymim_jax.runtime.workdir_lock import WorkdirLock
from tinymim_jax.training.loop import run_stage
from tinymim_jax.weights import handoff


def run_chain(cfg: Config, workdir: Path, only: str | None = None, stop: StopRequest | None = None) -> dict[str, Any]:
    """Runs the stages that are not finished (or just `only`) and writes WORKDIR/results.json, which it returns.

    Raises InputError for bad input, a finished stage whose config was edited among it, before any stage runs, and
    Interrupted when `stop` asks for it.
    """
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopRequest())
        mesh = make_mesh(cfg.mesh.data, cfg.mesh.fsdp)
        multihost.raise_everywhere(
            lambda: describe_chain(cfg, workdir, only)
        )  # what is wrong with a later stage is said now
        multihost.check_stop(stop, "before anything ran")
        names = list(cfg.stages) if only is None else [only]
        to_run = multihost.run_on_primary(lambda: [name for name in names if not handoff.finished(workdir / name)])
        multihost.raise_everywhere(lambda: check_ready(cfg, to_run, workdir, mesh))
        multihost.run_on_primary(lambda: check_workdir(cfg, workdir))
        lock = WorkdirLock(workdir)
        token = multihost.run_on_primary(lambda: stack.enter_context(lock).token)
        multihost.raise_everywhere(lambda: lock.see(token))
        multihost.check_stop(stop, "before anything ran")
        multihost.run_on_primary(lambda: convert_sources(cfg, to_run, workdir))
        for name in names:
            if name in to_run:
                run_stage(cfg.stages[name], name, workdir, mesh, stop, lock.check)
            else:
                print(f"{name}: finished, skipped", flush=True)
    results = collect(cfg, workdir)
    write_json(workdir / "results.json", results)
    return results


def check_workdir(cfg: Config, workdir: Path) -> None:
    """Makes the folder and notes whose it is; raises InputError if it is read-only."""
    storage.check_writable(workdir)
    if not (workdir / "chain.json").is_file():
        write_json(workdir / "chain.json", {"name": cfg.name})


def collect(cfg: Config, workdir: Path) -> dict[str, Any]:
    """The metrics of every finished stage in `workdir`, and each of `cfg.compare`'s tables that is complete."""
    others = sorted(done.parent.name for done in workdir.glob("*/DONE"))
    stages = {
        name: read_done(workdir / name / "DONE")
        for name in dict.fromkeys([*cfg.stages, *others])
        if handoff.finished(workdir / name)
    }
    tables = {}
    for title, table in cfg.compare.items():
        if all(table.metric in stages.get(name, {}) for row in table.rows.values() for name in row):
            rows = {label: summary([stages[name][table.metric] for name in row]) for label, row in table.rows.items()}
            tables[title] = {"metric": table.metric, "rows": rows}
    return {"config": cfg.name, "stages": stages, "compare": tables}


def summary(values: list[float]) -> dict[str, Any]:
    """Mean, standard error of the mean (None for one value) and the values themselves."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "stderr": error, "values": values}
