"""index.html: a run, or several side by side, as one file that needs no network."""

import dataclasses
import html
import importlib.resources
import json
import string
from collections.abc import Sequence
from typing import Any

import plotly.offline
from etils.epath import Path

from tinymim_jax.evals.analyze import short_names
from tinymim_jax.report import analyses, curves, figures, images, pictures, sections, tables, workdir
from tinymim_jax.report.charts import Chart, Found, Heatmap, Pictures, key
from tinymim_jax.report.plots import plot
from tinymim_jax.report.workdir import Run
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.metric_log import write_whole
from tinymim_jax.tasks.contract import Panels

LIMIT = 8_000_000  # bytes of the page
SPARE = 50_000  # bytes of it for its head, and for what stands around charts and pictures in its data
CELLS = 10_000  # of the largest heatmap on the page
Made = dict[Path, Panels | str]  # a stage's folder -> its panels, or why there are none


def write(
    folder: Path, others: Sequence[Path] = (), refresh: float | None = None, made: Made | None = None
) -> list[Run]:
    """Writes FOLDER/report/: index.html, tables.md, what papers show as PNG, SVG; with `others`, compare.html alone.

    With `refresh`, of a run that is not finished: index.html alone, which loads itself again after so many seconds.
    `made` keeps pictures of stages from one call to the next. Returns what was read, with all notes; raises InputError
    if a folder is no workdir.
    """
    runs = [workdir.read(one) for one in (folder, *others)]
    if others:
        for run, name in zip(runs, short_names([str(run.workdir) for run in runs]), strict=True):
            run.title = name
    found = find(runs, {} if made is None else made)
    out, files = folder / "report", []
    is_open = refresh is not None and not all(run.finished() for run in runs)
    if not others and not is_open:
        files += tables.write(folder, runs[0].results())
        shown = [*curves.of_papers(found.curves), *found.comparisons, *found.classes, *found.analyses, *found.pictures]
        files += figures.save(shown, out)
    storage.make(out)
    file = out / ("compare.html" if others else "index.html")
    write_whole(file, page(runs, found, refresh if is_open else None))
    for path in [] if is_open else [*files, file]:
        print(f"wrote {path}")
    return runs


def find(runs: Sequence[Run], made: Made) -> Found:
    """Every chart that some runs give; what cannot be drawn becomes one of their notes."""
    found = Found(curves.curves(runs, 60_000), curves.comparisons(runs), [], [], [], None)
    for run in runs:
        for name, one in run.stages.items():
            title = f"{run.title} · {name}" if len(runs) > 1 else name
            for file in one.arrays():
                try:
                    arrays = analyses.read(file)
                except InputError as error:
                    run.notes.append((name, str(error)))
                    continue
                charts = analyses.analysis_charts(arrays, f"{title} {file.stem}")
                (found.analyses if "kind" in arrays else found.classes).extend(charts)
            if one.done is None:
                continue
            if one.folder not in made:
                made[one.folder] = _panels(run, name)
            if isinstance(drawn := made[one.folder], Panels):
                found.pictures.append(Pictures(key(title, one.stage.task.kind), title, {}, {(): drawn}))
            elif drawn:
                run.notes.append((name, f"no picture: {drawn}"))
    found.shown = _chosen(found.pictures) if found.pictures else None
    seen = {"pictures"}
    for charts in (found.curves, found.comparisons, found.classes, found.analyses, found.pictures):
        _tell_keys_apart(charts, seen)
    return found


def _tell_keys_apart(charts: list[Chart], seen: set[str]) -> None:
    """Charts of one key, as names that differ in punctuation give, are numbered."""
    for i, chart in enumerate(charts):
        number, name = 1, chart.key
        while name.lower() in seen:  # some disks do not tell case apart
            number, name = number + 1, f"{chart.key}_{number + 1}"
        seen.add(name.lower())
        charts[i] = dataclasses.replace(chart, key=name)


def _panels(run: Run, name: str) -> Panels | str:
    try:
        return pictures.panels_of(run.stages[name].stage, name, run.workdir) or ""
    except InputError as error:  # a picture is no reason for a finished run to fail
        return str(error)


def _chosen(stages: Sequence[Pictures]) -> Pictures:
    """The panels of stages, whole or image by image."""
    each = [pictures.choices(stage.grids[()]) for stage in stages]
    grids = {(i, j): grid for i, grids in enumerate(each) for j, grid in enumerate(grids)}
    count = max(map(len, each)) - 1
    axes = {"stage": [one.title for one in stages], "image": ["all", *(f"{i + 1} of {count}" for i in range(count))]}
    return Pictures("pictures", "What each stage does", axes, grids)


def page(runs: Sequence[Run], found: Found, refresh: float | None = None) -> str:
    """The page as text; charts that it has no room for leave `found`."""
    parts = {name: _asset(f"page.{name}") for name in ("html", "css", "js")} | {"plotly": plotly.offline.get_plotlyjs()}
    taken = sum(len(text.encode()) for text in [*parts.values(), sections.body(runs, found)])
    data = _data(runs, found, (LIMIT - SPARE - taken) // 2)
    return string.Template(parts.pop("html")).substitute(
        parts, title=html.escape(" and ".join(run.title for run in runs)), summary=sections.summary(runs),
        nav=sections.nav(runs), body=sections.body(runs, found), data=script_json(data), footer=sections.footer(runs),
        refresh=f'<meta http-equiv="refresh" content="{refresh:g}">\n' if refresh else "",
    )  # fmt: skip


def _data(runs: Sequence[Run], found: Found, half: int) -> dict[str, Any]:
    """What the page's script draws, `half` the room for charts and for pictures; charts without leave `found`."""
    of_charts, of_pictures, left_out = images.Room(half), images.Room(half), []
    plots: dict[str, Any] = {}
    shown = {found.shown.key: images.pictures(found.shown, of_pictures)} if found.shown else {}
    for charts in (found.curves, found.comparisons, found.analyses, found.classes):
        for chart in charts:
            is_small = not isinstance(chart, Heatmap) or chart.values.size <= CELLS
            if isinstance(chart, Pictures):
                shown[chart.key] = images.pictures(chart, of_pictures)
            elif is_small and of_charts.admits(script_json(drawn := plot(chart))):
                plots[chart.key] = drawn
            else:
                left_out.append(chart.title)
        charts[:] = [chart for chart in charts if chart.key in plots or chart.key in shown]
    if left_out:
        runs[0].notes.append(("", f"left out, as a page is at most {LIMIT / 1e6:g} MB: {'; '.join(left_out)}"))
    return {"charts": plots, "pictures": shown}


def script_json(data: object) -> str:
    """JSON that cannot end the script element that it stands in."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return importlib.resources.files("tinymim_jax.report").joinpath(name).read_text(encoding="utf-8")
