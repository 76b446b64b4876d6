"""Charts of what runs have logged and measured."""

import collections
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence

import numpy as np

from tinymim_jax.evals.relation_agreement import HEAD
from tinymim_jax.report.charts import Bars, Chart, Heatmap, Lines, Points, Series, key
from tinymim_jax.report.workdir import Run, StageRun

UNITS = {"images_per_s": "images/s", "data_wait": "share of the time", "lr": "learning rate"}
FIRST = ("loss", "lr", "grad_norm", "images_per_s", "data_wait")  # of what is logged; the rest follows by name
PERCENT = re.compile(r"/(top\d|mIoU|mAcc|aAcc|.*error)")
REPLICA = re.compile(r"replica\d+/")
LEFT_OUT = re.compile(r"(replica\d+/)?(step|epoch|first_step_s|labels_beyond_head|.*/images)")
SEED = re.compile(r'"\w*seed": [^,}]*')


def curves(runs: Sequence[Run], most: int = 100_000) -> list[Lines]:
    """A chart for each metric that was logged at least twice, and losses, for each kind of task apart.

    With more than about `most` points in all, each line has some of its own.
    """
    parts: dict[tuple[str, str], list[Series]] = {}
    for number, run in enumerate(runs):
        names = without_seed(run)
        for name, one in run.stages.items():
            for logged, xy in points(one).items():
                metric, group = REPLICA.sub("", logged, count=1), names[name]
                if of_head := HEAD.fullmatch(metric):  # all heads in one chart
                    metric, group = f"{of_head[1]} by head", f"{group} head {of_head[2]}"
                label = f"{group} · {run.title}" if len(runs) > 1 else group
                line = Series(label, *zip(*xy, strict=True), None, group, number, logged.startswith("replica"))
                parts.setdefault((metric, one.stage.task.kind if metric == "loss" else ""), []).append(line)
    parts = {what: lines for what, lines in parts.items() if what[1] or any(len(line.x) > 1 for line in lines)}
    limit = max(most // max(sum(map(len, parts.values())), 1), 20)
    order = {name: i for i, name in enumerate(FIRST)}
    charts = []
    for metric, kind in sorted(parts, key=lambda what: (order.get(what[0], 9 if "/" in what[0] else 10), what[0])):
        lines = [
            dataclasses.replace(line, x=thinned(line.x, limit), y=thinned(line.y, limit))
            for line in parts[metric, kind]
        ]
        what, label = [metric, kind][: 1 + bool(kind)], UNITS.get(metric, with_unit(metric).rpartition("/")[2])
        charts.append(Lines(key(*what), ", ".join(what), "epoch", label, lines))
    return charts


def of_papers(charts: Sequence[Lines]) -> list[Lines]:
    """Those that papers show: losses, and what was measured on data that was held out."""
    return [chart for chart in charts if chart.title.startswith("loss,") or "/" in chart.title]


def with_unit(metric: str) -> str:
    """A metric as the label of an axis."""
    return f"{metric}, %" if PERCENT.search(metric) else metric


def without_seed(run: Run) -> dict[str, str]:
    """What each stage is called: where several differ by nothing but seeds, their name without its number."""
    alike = {
        name: (re.sub(r"_\d+$", "", name), SEED.sub("", json.dumps(one.content["stage"])))
        for name, one in run.stages.items()
    }
    count = collections.Counter(alike.values())
    return {name: what[0] if count[what] > 1 else name for name, what in alike.items()}


def points(one: StageRun) -> dict[str, list[tuple[float, float]]]:
    """(epoch, value) of all that is logged, by its name in the log, replicas before their mean."""
    scale = next((line["epoch"] / line["step"] for line in one.log if line.get("epoch") and line["step"]), 0.0)
    found: dict[str, list[tuple[float, float]]] = {}
    for line in sorted(one.log, key=lambda line: line["step"]):
        for name, value in line.items():
            found.setdefault(name, []).append((line["step"] * scale, value))
    names = sorted(found, key=lambda name: not name.startswith("replica"))
    return {name: found[name] for name in names if not LEFT_OUT.fullmatch(name)}


def thinned(xy: Sequence[float], limit: int) -> Sequence[float]:
    """At most about `limit` points, evenly, with the last one."""
    every = -(-len(xy) // limit)
    return xy[(len(xy) - 1) % every :: every]


def comparisons(runs: Sequence[Run]) -> list[Chart]:
    """Each comparison: ours against published values, where it has some, else a bar for each row."""
    charts: list[Chart] = _counted(runs)
    for run in runs:
        for title, compared in run.compare.items():
            if compared.get("counts"):
                continue
            paper, rows, measured = compared.get("paper", {}), compared["rows"], with_unit(compared["metric"])
            shown = title if len(runs) == 1 else f"{title} · {run.title}"
            name = key("compare", shown).lower()
            if both := sorted((label for label in rows if label in paper), key=lambda n: (paper[n], rows[n]["mean"])):
                ranks = compared.get("rank_correlation")
                shown += "" if ranks is None else f", rank correlation {ranks:.2f}"
                means, errors = ([rows[label][what] for label in both] for what in ("mean", "stderr"))
                labels = f"published, {measured.rpartition('/')[2]}", f"here, {measured}"
                charts.append(Points(name, shown, *labels, both, [paper[n] for n in both], means, errors))
            else:
                means, errors = ([row[what] for row in rows.values()] for what in ("mean", "stderr"))
                charts.append(Bars(name, shown, measured, list(rows), means, errors))
    return charts


def _counted(runs: Sequence[Run]) -> list[Chart]:
    """Comparisons whose rows are numbers of something: a curve each, those of one metric in one chart."""
    found: dict[tuple[str, str], list[Series]] = {}
    for number, run in enumerate(runs):
        for title, compared in run.compare.items():
            if counts := compared.get("counts"):
                rows = compared["rows"]
                errors = [np.nan if row["stderr"] is None else row["stderr"] for row in rows.values()]
                name = title if len(runs) == 1 else f"{title} · {run.title}"
                line = Series(name, [float(n) for n in rows], [r["mean"] for r in rows.values()], errors, title, number)
                found.setdefault((compared["metric"], counts), []).append(line)
    return [Lines(key("compare", metric, counts).lower(), f"{metric} by {counts}", counts, with_unit(metric), lines)
            for (metric, counts), lines in found.items()]  # fmt: skip


def by_class(arrays: Mapping[str, np.ndarray], name: str, title: str) -> list[Chart]:
    """Accuracy or IoU by class, and what each class was taken for; [] if an evaluation has no such arrays.

    `arrays`: per_class or iou [C] in percent, confusion [C, C] in images or pixels, classes: names [C], or [0] if not
    known.
    """
    if not {"confusion", "classes"} <= arrays.keys() or not {"iou", "per_class"} & arrays.keys():
        return []
    which, measure = ("iou", "IoU") if "iou" in arrays else ("per_class", "accuracy")
    values, confusion, classes = arrays[which], arrays["confusion"], arrays["classes"]
    names = [str(c) for c in classes] if len(classes) == len(values) else [str(i) for i in range(len(values))]
    shares = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    mean = f"mean {np.nanmean(values):.1f} %"
    return [
        Bars(f"{name}_classes", f"{title}: {measure} by class, {mean}", "%", names, values, (), (0, 100)),
        Heatmap(f"{name}_confusion", f"{title}: what each class was taken for", "predicted class", "class", names,
                names, shares, "% of the class", 100),
    ]  # fmt: skip
