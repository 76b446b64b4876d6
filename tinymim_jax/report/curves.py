"""Charts of what runs have logged and measured."""

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tinymim_jax.report.charts import Bars, Chart, Heatmap, Lines, Points, Series, key
from tinymim_jax.report.workdir import Run, StageRun

UNITS = {"images_per_s": "images/s", "data_wait": "share of the time", "lr": "learning rate"}
FIRST = ("loss", "lr", "grad_norm", "images_per_s", "data_wait")  # of what is logged; the rest follows by name
PERCENT = re.compile(r"/(top\d|mIoU|mAcc|aAcc|.*error)")
LEFT_OUT = re.compile(r"step|epoch|first_step_s|labels_beyond_head|replica\d+/.*|.*/images")


def curves(runs: Sequence[Run], most: int = 100_000) -> list[Lines]:
    """A chart for each metric that was logged at least twice, and losses, for each kind of task apart.

    With more than about `most` points in all, each line has some of its own.
    """
    parts: dict[tuple[str, str], dict[tuple[int, str], dict]] = {}
    for number, run in enumerate(runs):
        for name, one in run.stages.items():
            for metric in logged(one):
                part = one.stage.task.kind if metric == "loss" else ""
                whole, _, head = metric.partition("_head")  # all heads in one chart
                label = f"{name} head {head}" if head else name
                parts.setdefault((f"{whole} by head" if head else metric, part), {})[number, label] = points(
                    one, metric
                )
    parts = {what: found for what, found in parts.items() if what[1] or any(len(xy) > 1 for xy in _each(found))}
    count = sum(len(list(_each(found))) for found in parts.values())
    limit = max(most // max(count, 1), 20)
    order = {name: i for i, name in enumerate(FIRST)}
    charts = []
    for metric, part in sorted(parts, key=lambda what: (order.get(what[0], 9 if "/" in what[0] else 10), what[0])):
        series = [
            _series(runs, number, name, which, thinned(xy, limit))
            for (number, name), found in parts[metric, part].items()
            for which, xy in sorted(found.items(), key=lambda item: not item[0].startswith("replica"))
        ]
        label = UNITS.get(metric, f"{metric.rpartition('/')[2]}{', %' * bool(PERCENT.search(metric))}")
        title = f"{metric}, {part}" if part else metric
        charts.append(Lines(key(metric, part) if part else key(metric), title, "epoch", label, series))
    return charts


def of_papers(charts: Sequence[Lines]) -> list[Lines]:
    """Those that papers show: losses, and what was measured on data that was held out."""
    return [chart for chart in charts if chart.title.startswith("loss,") or "/" in chart.title]


def _each(found: Mapping) -> Iterator[list]:
    return (xy for one in found.values() for xy in one.values())


def _series(runs: Sequence[Run], number: int, name: str, which: str, xy: list) -> Series:
    group = re.sub(r"_\d+$", "", name)  # stages that differ by seed
    label = f"{group} · {runs[number].title}" if len(runs) > 1 else group
    x, y = zip(*xy, strict=True)
    return Series(label, x, y, None, group, number, which.startswith("replica"))


def logged(one: StageRun) -> list[str]:
    """The names of the metrics of a stage, those of replicas under that of their mean."""
    return list(dict.fromkeys(name for line in one.log for name in line if not LEFT_OUT.fullmatch(name)))


def points(one: StageRun, metric: str) -> dict[str, list[tuple[float, float]]]:
    """(epoch, value) of `metric`, and of each replica's, by their keys in the log."""
    scale = next((line["epoch"] / line["step"] for line in one.log if line.get("epoch") and line["step"]), 0.0)
    own = re.compile(rf"(replica\d+/)?{re.escape(metric)}")
    found: dict[str, list[tuple[float, float]]] = {}
    for line in sorted(one.log, key=lambda line: line["step"]):
        for name in filter(own.fullmatch, line):
            found.setdefault(name, []).append((line["step"] * scale, line[name]))
    return found


def thinned(xy: list, limit: int) -> list:
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
            paper, rows = compared.get("paper", {}), compared["rows"]
            shown = title if len(runs) == 1 else f"{title} · {run.title}"
            name = key("compare", shown).lower()
            if both := sorted((label for label in rows if label in paper), key=lambda n: (paper[n], rows[n]["mean"])):
                ranks = compared.get("rank_correlation")
                shown += "" if ranks is None else f", rank correlation {ranks:.2f}"
                means, errors = ([rows[label][what] for label in both] for what in ("mean", "stderr"))
                published = f"published {compared['metric'].rpartition('/')[2]}, %"
                here = f"{compared['metric']} here, %"
                charts.append(Points(name, shown, published, here, both, [paper[n] for n in both], means, errors))
            else:
                means, errors = ([row[what] for row in rows.values()] for what in ("mean", "stderr"))
                charts.append(Bars(name, shown, f"{compared['metric']}, %", list(rows), means, errors))
    return charts


def _counted(runs: Sequence[Run]) -> list[Chart]:
    """Comparisons whose rows are numbers of something: a curve each, those of one metric in one chart."""
    found: dict[tuple[str, str], list[Series]] = {}
    for number, run in enumerate(runs):
        for title, compared in run.compare.items():
            if counts := compared.get("counts"):
                rows = compared["rows"]
                errors = [row["stderr"] or 0.0 for row in rows.values()]
                name = title if len(runs) == 1 else f"{title} · {run.title}"
                line = Series(name, [float(n) for n in rows], [r["mean"] for r in rows.values()], errors, title, number)
                found.setdefault((compared["metric"], counts), []).append(line)
    return [Lines(key("compare", metric, counts).lower(), f"{metric} by {counts}", counts, f"{metric}, %", lines)
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
    mean, known = f"mean {np.nanmean(values):.1f} %", np.nan_to_num(values)
    return [
        Bars(f"{name}_classes", f"{title}: {measure} by class, {mean}", "%", names, known, (), (0, 100)),
        Heatmap(f"{name}_confusion", f"{title}: what each class was taken for", "predicted class", "class", names,
                names, shares, "% of the class", 0, 100, colours="viridis"),
    ]  # fmt: skip
