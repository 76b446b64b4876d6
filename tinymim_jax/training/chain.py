"""A chain: its stages in order, each fed by earlier ones, and what comes out of them."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
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

ENOUGH = 0.1  # of the work, after which it can be told how long the rest takes


def run_stages(
    cfg: Config,
    names: list[str],
    work: Mapping[str, float],
    workdir: Path,
    mesh: jax.sharding.Mesh,
    stop: StopRequest,
    guard: Callable[[], object] = lambda: None,
    beside: int = 1,
) -> dict[str, Any]:
    """Runs those of the stages `names` that have `work`, in FLOPs, and writes WORKDIR/results.json, which it returns.

    Up to `beside` stages that can share, as those of a study do, run side by side.
    """
    for name in names:
        if name not in work:
            print(f"{name}: finished, skipped", flush=True)
    left, begin = dict(work), time.monotonic()
    for group in groups(cfg, multihost.run_on_primary(lambda: begins(workdir, work)), beside):
        if len(work) > 1:
            print(pace(work, left, time.monotonic() - begin), flush=True)
        left = {name: flops for name, flops in left.items() if name not in group}
        if len(group) > 1:
            print(f"side by side: {', '.join(group)}", flush=True)
        run_side_by_side({name: cfg.stages[name] for name in group}, workdir, mesh, stop, guard)
    results = collect(cfg, workdir)
    write_json(workdir / "results.json", results)
    return results


def pace(work: Mapping[str, float], left: Mapping[str, float], seconds: float) -> str:
    """Which stage comes next, and how long those that are `left` will take if they go like those before."""
    told, done = f"stage {len(work) - len(left) + 1} of {len(work)}", sum(work.values()) - sum(left.values())
    if done < ENOUGH * sum(work.values()):
        return told
    minutes = math.ceil(seconds * sum(left.values()) / done / 60)
    hours = f"{minutes // 60} h " if minutes >= 60 else ""
    return f"{told}, about {hours}{minutes % 60} min left"


def begins(workdir: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """The step that each stage goes on from, [] at its begin."""
    return {name: checkpoint.steps(workdir / name)[-1:] for name in names}


def groups(cfg: Config, steps: Mapping[str, list[int]], beside: int) -> list[list[str]]:
    """The stages of `steps` in parts of up to `beside` that can share, each behind those that it reads.

    `steps` are their `begins`; those beside each other have the same.
    """
    left, found = list(steps), []
    while left:
        group = [left.pop(0)]
        for name in left:
            sources = {init.stage for _, init in cfg.stages[name].inits()}
            is_ready = sources.isdisjoint({*left, *group}) and steps[name] == steps[group[0]]
            if len(group) < beside and is_ready and can_share(cfg.stages[group[0]], cfg.stages[name]):
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
            said = {"metric": table.metric, "counts": table.counts, "rows": found, "paper": table.paper}
            tables[title] = said | ordered(found, table.paper)
    return {"config": cfg.name, "stages": stages, "compare": tables}


def values_of(metrics: dict[str, float], metric: str) -> list[float]:
    """One value of a stage, or of several replicas that of each."""
    own = []
    while (name := replica_metric(len(own), metric)) in metrics:
        own.append(metrics[name])
    return own or [value for name, value in metrics.items() if name == metric]


def ordered(rows: dict[str, dict[str, Any]], paper: dict[str, float]) -> dict[str, Any]:
    """How far our means are in the order of the published values; {} of fewer than three, or of equal ones.

    Returns:
      rank_correlation (Spearman's); clear, how many pairs of rows that differ in the paper differ here by more than
      twice their standard error; of these agree, how many in the paper's order, and contradicted, the others: [ours is
      better, ours is worse].
    """
    both = {label: (row["mean"], paper[label]) for label, row in rows.items() if label in paper}
    if len(both) < 3 or any(len(set(side)) == 1 for side in zip(*both.values(), strict=True)):
        return {}
    from scipy.stats import spearmanr  # takes a second, which tables without published values need not wait for

    clear, contradicted = 0, []
    for one, other in itertools.permutations(both, 2):
        errors = [rows[label]["stderr"] for label in (one, other)]
        ours, theirs = (a - b for a, b in zip(both[one], both[other], strict=True))
        if theirs and None not in errors and ours > 2 * math.hypot(*errors):
            clear += 1
            contradicted += [[one, other]] if theirs < 0 else []
    found = {"clear": clear, "agree": clear - len(contradicted), "contradicted": contradicted}
    return {"rank_correlation": float(spearmanr(list(both.values())).statistic), **found}


def summary(values: list[float]) -> dict[str, Any]:
    """Mean, standard error of the mean (None for one value) and the values themselves."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "stderr": error, "values": values}
