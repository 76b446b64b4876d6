"""index.html: a run, or several side by side, as one file that needs no network."""

import dataclasses
import html
import importlib.resources
import json
import string
from collections.abc import Mapping, Sequence

import plotly.offline
from etils.epath import Path

from tinymim_jax.report import analyses, curves, figures, images, pictures, sections, tables, workdir
from tinymim_jax.report.charts import Chart, Pictures, key
from tinymim_jax.report.plots import fits, plot
from tinymim_jax.report.workdir import Run
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.metric_log import write_whole
from tinymim_jax.tasks.contract import Panels

LIMIT = 8_000_000  # bytes of the page
BUDGETS = (1_400_000, 400_000, 0)  # bytes of its pictures: the largest that keeps to the limit
Made = dict[Path, Panels | str]  # a stage's folder -> its panels, or why there are none


@dataclasses.dataclass
class Found:
    """All charts of some runs."""

    curves: list[Chart]
    comparisons: list[Chart]
    classes: list[Chart]
    analyses: list[Chart]
    pictures: list[Pictures]  # of the stages' tasks, on disk each of its own
    shown: Pictures | None  # and on the page with a choice of the stage


def write(
    folder: Path, others: Sequence[Path] = (), refresh: float | None = None, made: Made | None = None
) -> list[Run]:
    """Writes FOLDER/report/: tables.md, every chart as PNG and SVG, and index.html; with `others`, compare.html alone.

    `refresh`: seconds after which the page loads itself again, unless the run is finished, and says nothing here.
    `made` keeps pictures of stages from one call to the next. Returns what was read, with all notes; raises InputError
    if a folder is no workdir.
    """
    runs = [workdir.read(one) for one in (folder, *others)]
    _tell_apart(runs)
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


def _tell_apart(runs: list[Run]) -> None:
    """Runs of one title are called by their folders."""
    titles = [run.title for run in runs]
    for run in runs:
        if titles.count(run.title) > 1:
            same = [other for other in runs if other.workdir.name == run.workdir.name]
            run.title = run.workdir.name if len(same) == 1 else str(run.workdir)


def find(runs: Sequence[Run], made: Made) -> Found:
    """Every chart that some runs give; what cannot be drawn becomes one of their notes."""
    found = Found(curves.curves(runs, 60_000), curves.comparisons(runs), [], [], [], None)
    panels: dict[str, Panels] = {}
    seen = {"pictures"}
    for run in runs:
        for name, one in run.stages.items():
            title = f"{run.title} · {name}" if len(runs) > 1 else name
            for file in one.arrays():
                try:
                    arrays = analyses.read(file)
                    charts = analyses.analysis_charts(arrays, f"{title} {file.stem}")
                    (found.analyses if "kind" in arrays else found.classes).extend(charts)
                except InputError as error:
                    run.notes.append((name, str(error)))
            if one.done is None:
                continue
            if one.folder not in made:
                made[one.folder] = _panels(run, name)
            if isinstance(drawn := made[one.folder], Panels):
                panels[title] = drawn
                whole = key(title, one.stage.task.kind)
                found.pictures.append(Pictures(whole, title, {}, {(): drawn}))
            elif drawn:
                run.notes.append((name, f"no picture: {drawn}"))
    found.shown = _chosen(panels) if panels else None
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


def _chosen(panels: Mapping[str, Panels]) -> Pictures:
    """The panels of stages, whole or image by image."""
    each = [pictures.choices(one) for one in panels.values()]
    grids = {(i, j): grid for i, grids in enumerate(each) for j, grid in enumerate(grids)}
    count = max(map(len, each)) - 1
    axes = {"stage": list(panels), "image": ["all", *(f"{i + 1} of {count}" for i in range(count))]}
    return Pictures("pictures", "What each stage does", axes, grids)


def page(runs: Sequence[Run], found: Found, refresh: float | None = None) -> str:
    """The page as text."""
    asset = {name: _asset(f"page.{name}") for name in ("html", "css", "js")}
    title = " and ".join(run.title for run in runs)
    body, nav = sections.body(runs, found), sections.nav(runs)
    charts = {c.key: plot(c) for c in _all(found) if fits(c) and not isinstance(c, Pictures)}
    for budget in BUDGETS:
        stock = images.Stock(budget)
        shown = [c for c in [found.shown, *found.analyses] if isinstance(c, Pictures)]
        data = {"charts": charts, "pictures": {c.key: stock.pictures(c) for c in shown}}
        text = string.Template(asset["html"]).substitute(
            title=html.escape(title), summary=sections.summary(runs), nav=nav, body=body, css=asset["css"],
            data=script_json(data), plotly=plotly.offline.get_plotlyjs(), js=asset["js"],
            footer=sections.footer(runs),
            refresh=f'<meta http-equiv="refresh" content="{refresh:g}">\n' if refresh else "",
        )  # fmt: skip
        if len(text.encode()) <= LIMIT:
            break
    return text


def script_json(data: object) -> str:
    """JSON that cannot end the script element that it stands in."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _all(found: Found) -> list[Chart]:
    return [*found.curves, *found.comparisons, *found.classes, *found.analyses]


def _asset(name: str) -> str:
    return importlib.resources.files("tinymim_jax.report").joinpath(name).read_text(encoding="utf-8")
