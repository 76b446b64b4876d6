"""A chain: its stages in order, each fed by earlier ones, and what comes out of them."""

import math
import statistics
from collections.abc import Callable
from typing import Any

import jax
from etils.epath import Path

from tinymim_jax.experiment.config import Config, Stage
from tinymim_jax.runtime import multihost, storage
from tinymim_jax.runtime.metric_log import read_done, write_json
from tinymim_jax.runtime.preemption import StopRequest
from tinymim_jax.training.loop import run_side_by_side
from tinymim_jax.training.progress import replica_metric
from tinymim_jax.weights import checkpoint, handoff


def run_stages(
    cfg: Config,
    names: list[str],
    to_run: list[str],
    workdir: Path,
    mesh: jax.sharding.Mesh,
    stop: StopRequest,
    guard: Callable[[], object] = lambda: None,
    beside: int = 1,
) -> dict[str, Any]:
    """Runs those of the stages `names` that are `to_run`, and writes WORKDIR/results.json, which it returns.

    Up to `beside` stages that can share, as those of a study do, run side by side.
    """
    for name in names:
        if name not in to_run:
            print(f"{name}: finished, skipped", flush=True)
    for group in groups(cfg, to_run, beside):
        steps = multihost.run_on_primary(lambda group=group: {tuple(newest(workdir / name)) for name in group})
        for part in [group] if len(steps) == 1 else [[name] for name in group]:
            if len(part) > 1:
                print(f"side by side: {', '.join(part)}", flush=True)
            run_side_by_side({name: cfg.stages[name] for name in part}, workdir, mesh, stop, guard)
    results = collect(cfg, workdir)
    write_json(workdir / "results.json", results)
    return results


def newest(folder: Path) -> list[int]:
    """The step that the stage in `folder` would go on from; [] if it has none."""
    return checkpoint.steps(folder)[-1:]


def groups(cfg: Config, to_run: list[str], beside: int) -> list[list[str]]:
    """`to_run` in parts of up to `beside` stages that can share, each behind those that it reads."""
    left, found = list(to_run), []
    while left:
        group = [left.pop(0)]
        for name in left:
            sources = {init.stage for _, init in cfg.stages[name].inits()}
            if len(group) < beside and sources.isdisjoint(left) and can_share(cfg.stages[group[0]], cfg.stages[name]):
                group.append(name)
        left = [name for name in left if name not in group]
        found.append(group)
    return found


def can_share(one: Stage, other: Stage) -> bool:
    """Whether both see the same batches, in one run length, and their tasks can share what they make of these."""
    models = [(stage.model.image_size, stage.model.dtype, stage.model.attention) for stage in (one, other)]
    return (
        one.run == other.run
        and one.run.data_name is not None
        and one.run.replicas == 1
        and (one.data, models[0]) == (other.data, models[1])
        and one.optim.accum_steps == other.optim.accum_steps == 1
        and one.task.can_share(other.task)
    )


def collect(cfg: Config, workdir: Path) -> dict[str, Any]:
    """The metrics of every finished stage in `workdir`, and each of `cfg.compare`'s tables that is complete."""
    others = [folder.name for folder in storage.children(workdir)]
    stages = {
        name: read_done(workdir / name / "DONE")
        for name in dict.fromkeys([*cfg.stages, *others])
        if handoff.finished(workdir / name)
    }
    tables = {}
    for title, table in cfg.compare.items():
        rows = {
            label: [value for name in row for value in values_of(stages.get(name, {}), table.metric)]
            for label, row in table.rows.items()
        }
        if all(table.metric in stages.get(name, {}) for row in table.rows.values() for name in row):
            found = {label: summary(row) for label, row in rows.items()}
            tables[title] = {"metric": table.metric, "rows": found, "paper": table.paper, **ranked(found, table.paper)}
    return {"config": cfg.name, "stages": stages, "compare": tables}


def values_of(metrics: dict[str, float], metric: str) -> list[float]:
    """One value of a stage, or of several replicas that of each."""
    own = []
    while (name := replica_metric(len(own), metric)) in metrics:
        own.append(metrics[name])
    return own or [value for name, value in metrics.items() if name == metric]


def ranked(rows: dict[str, dict[str, Any]], paper: dict[str, float]) -> dict[str, float]:
    """Spearman's rank correlation of our means with the published values; {} of fewer than three, or of equal ones."""
    both = [(row["mean"], paper[label]) for label, row in rows.items() if label in paper]
    if len(both) < 3 or any(len(set(side)) == 1 for side in zip(*both, strict=True)):
        return {}
    from scipy.stats import spearmanr  # takes a second, which tables without published values need not wait for

    return {"rank_correlation": float(spearmanr(both).statistic)}


def summary(values: list[float]) -> dict[str, Any]:
    """Mean, standard error of the mean (None for one value) and the values themselves."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "stderr": error, "values": values}
