"""The sections of the page as HTML; every name in them is escaped."""

import html
import json
import time
from collections.abc import Iterable, Sequence

from tinymim_jax.report import tables
from tinymim_jax.report.charts import Chart, Found, Pictures, said
from tinymim_jax.report.workdir import Run, StageRun

TITLES = {
    "chain": "The chain",
    "results": "Results",
    "curves": "Curves",
    "pictures": "Pictures",
    "analyses": "Analyses",
    "details": "Machine and configs",
    "notes": "Notes",
}
SCALES = "Maps side by side share a scale: dark is 0 or less, bright their largest value."


def e(text: object) -> str:
    """Text for HTML, in content and in attributes."""
    return html.escape(str(text))


def _name(text: str) -> str:
    """A name that may break behind its underscores."""
    return e(text).replace("_", "_<wbr>")


def summary(runs: Sequence[Run]) -> str:
    """The head of the page: how far each run has come."""
    facts = []
    for run in runs:
        done = sum(one.done is not None for one in run.stages.values())
        every = len(run.stages) + len(run.waiting)
        seconds = sum(one.seconds() for one in run.stages.values())
        state = "finished" if run.finished() else "not finished"
        name = f"{e(run.title)}: " if len(runs) > 1 else ""
        facts += [f"<li>{name}<b>{state}</b></li>", f"<li><b>{done}</b> of {every} stages finished</li>"]
        facts += [f"<li><b>{duration(seconds)}</b> of training</li>"] if seconds else []
    return f'<ul class="facts">{"".join(facts)}<li>page of {time.strftime("%Y-%m-%d %H:%M")}</li></ul>'


def footer(runs: Sequence[Run]) -> str:
    """Where it comes from."""
    return "Made by <code>tinymim_jax report</code> from " + ", ".join(f"<code>{e(run.workdir)}</code>" for run in runs)


def nav(runs: Sequence[Run]) -> str:
    """Links to the sections."""
    count = len({text for run in runs for _, text in run.notes})
    more = {"notes": f" ({count})" if count else ""}
    return "".join(f'<li><a href="#{name}">{title}{more.get(name, "")}</a></li>' for name, title in TITLES.items())


def body(runs: Sequence[Run], found: Found) -> str:
    """All sections; one without content says why."""
    content = {
        "chain": _chain(runs),
        "results": _results(runs, found),
        "curves": chooser("curve", "metric", found.curves)
        or note("Nothing has been logged twice yet, so there are no curves."),
        "pictures": viewer(found.shown) if found.shown else note("No finished stage has pictures."),
        "analyses": _analyses(found),
        "details": "".join(_details(run, len(runs) > 1) for run in runs),
        "notes": _noted(runs),
    }
    return "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{TITLES[name]}</h2>{text}</section>'
        for name, text in content.items()
    )


def note(text: str) -> str:
    return f'<p class="note">{e(text)}</p>'


def duration(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s" if minutes else f"{left} s"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _chain(runs: Sequence[Run]) -> str:
    parts = ['<p class="soft">A solid line hands over weights, a dashed one a teacher.</p>']
    for run in runs:
        parents = {name: _parent(one, run) for name, one in run.stages.items()}
        roots = [name for name, parent in parents.items() if parent is None]
        parts += [f"<h3>{e(run.title)}</h3>"] if len(runs) > 1 else []
        nodes = [_node(name, run, parents) for name in roots] + [
            _item("", "", "not begun", name) for name in run.waiting
        ]
        parts.append(f'<ul class="tree">{"".join(nodes)}</ul>' if nodes else note("No stage has begun."))
    return "".join(parts)


def _parent(one: StageRun, run: Run) -> str | None:
    """The stage that a stage hangs below: of its weights, else of a teacher."""
    sources = one.sources()
    order = [sources[field] for field in sorted(sources, key=lambda field: (field != "init", field))]
    return next((name for name in order if name in run.stages and name != one.name), None)


def _node(name: str, run: Run, parents: dict[str, str | None]) -> str:
    one, below = run.stages[name], [child for child, parent in parents.items() if parent == name]
    sources, total = one.sources(), one.total_steps()
    kind = "weights" if sources.get("init") == parents[name] else "teacher"
    steps = f"{one.step} of {total} steps" if total and one.done is None else f"{one.step} steps"
    facts = [e(one.stage.model.summary()), steps, f"batch {one.stage.run.batch_size}"]
    facts += [f"{one.stage.run.replicas} seeds"] if one.stage.run.replicas > 1 else []
    facts += [duration(seconds)] if (seconds := one.seconds()) else []
    origin = "; ".join(f"{_field(field)} from <b>{_name(source)}</b>" for field, source in sources.items())
    state = ("done", "finished") if one.done is not None else ("open", "not finished")
    more = f'<span class="kind">{e(one.stage.task.summary())}</span><p>{" · ".join(facts)}</p>'
    more += f'<p class="from">{origin}</p>' if origin else ""
    return _item(kind, *state, name, more, "".join(_node(child, run, parents) for child in below))


def _item(kind: str, state: str, said: str, name: str, more: str = "", below: str = "") -> str:
    return (
        f'<li class="{kind}"><span class="node"><span class="state {state}">{said}</span>'
        f'<span class="name">{_name(name)}</span>{more}</span>{f"<ul>{below}</ul>" if below else ""}</li>'
    )


def _field(field: str) -> str:
    return "weights" if field == "init" else e(field.removeprefix("task."))


def _results(runs: Sequence[Run], found: Found) -> str:
    parts = [_stage_table(runs)]
    for run in runs:
        for title, compared in run.compare.items():
            heading, *rows = tables.cells(compared)
            more = f" · {run.title}" if len(runs) > 1 else ""
            parts.append(table(f"{title} ({compared['metric']}){more}", heading, rows))
            if verdict := tables.agreement(compared):
                parts.append(f"<p>{e(verdict[0].upper() + verdict[1:])}.</p>")
    parts.append(side_by_side(found.comparisons))
    if found.classes:
        parts += ["<h3>Class by class</h3>", chooser("by-class", "evaluation", found.classes)]
    return "".join(parts)


def _stage_table(runs: Sequence[Run]) -> str:
    """Stages as rows, and a column for each metric and run."""
    measured = {run.title: {name: tables.measured(one.done) for name, one in run.stages.items() if one.done is not None}
                for run in runs}  # fmt: skip
    metrics = list(dict.fromkeys(m for stages in measured.values() for one in stages.values() for m in one))
    names = list(dict.fromkeys(name for stages in measured.values() for name in stages))
    if not names:
        return note("No stage is finished yet, so there are no results.")
    columns = [(metric, title) for metric in metrics for title in measured]
    heading = ["stage", *(metric if len(runs) == 1 else f"{metric} · {title}" for metric, title in columns)]
    rows = [[name, *(measured[title].get(name, {}).get(m, "") for m, title in columns)] for name in names]
    return table("Finished stages; mean ± standard error of several seeds", heading, rows)


def table(title: str, heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{e(cell)}</th>' for cell in heading)
    cells = [[f'<th scope="row">{_name(row[0])}</th>', *(f"<td>{e(cell)}</td>" for cell in row[1:])] for row in rows]
    lines = [f"<tr>{''.join(row)}</tr>" for row in cells]
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{e(title)}"><table><caption>{e(title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def side_by_side(charts: Sequence[Chart]) -> str:
    return f'<div class="charts">{"".join(_figure(chart) for chart in charts)}</div>' if charts else ""


def _figure(chart: Chart) -> str:
    if isinstance(chart, Pictures):
        return f"<figure><figcaption>{e(chart.title)}</figcaption>{viewer(chart)}</figure>"
    plot = f'<div class="plot" role="img" data-chart="{e(chart.key)}" aria-label="{e(said(chart))}"></div>'
    return f"<figure><figcaption>{e(chart.title)}</figcaption>{plot}</figure>"


def chooser(name: str, label: str, charts: Sequence[Chart]) -> str:
    """One chart at a time, with a choice; "" if there are none."""
    if not charts:
        return ""
    options = "".join(
        f'<option value="{i}" data-chart="{e(chart.key)}" data-said="{e(said(chart))}">{e(chart.title)}</option>'
        for i, chart in enumerate(charts)
    )
    return (
        f'<div class="controls"><label for="{name}-choice">{label}<select id="{name}-choice" data-metric="{name}">'
        f'{options}</select></label></div><figure><div class="plot" id="{name}" role="img"'
        f' data-chart="{e(charts[0].key)}" aria-label="{e(said(charts[0]))}"></div></figure>'
    )


def viewer(chart: Pictures) -> str:
    """A grid of images with its choices: a slider where they are numbered, else a select."""
    controls = []
    for i, (name, labels) in enumerate(chart.axes.items()):
        own, label = f"{e(chart.key)}-{i}", e(name)
        if name == "image":
            slider = f'<input type="range" id="{own}" data-axis="{i}" min="0" max="{len(labels) - 1}" value="0">'
            label, control = f"<span>{label} <output>{e(labels[0])}</output></span>", slider
        else:
            options = "".join(f'<option value="{j}">{e(text)}</option>' for j, text in enumerate(labels))
            control = f'<select id="{own}" data-axis="{i}">{options}</select>'
        controls.append(f'<label for="{own}">{label} {control}</label>')
    has_maps = any(image.ndim == 2 for grid in chart.grids.values() for row in grid.rows for image in row)
    scales = f'<p class="soft">{SCALES}</p>' if has_maps else ""
    return (
        f'<div data-pictures="{e(chart.key)}"><div class="controls">{"".join(controls)}</div>'
        f'<p class="said soft" aria-live="polite"></p><div class="grid"></div>{scales}</div>'
    )


def _analyses(found: Found) -> str:
    if not found.analyses:
        return note("No stage has stored analyses (similarity of layers, attention, relations, spectrum, neighbours).")
    charts = [chart for chart in found.analyses if not isinstance(chart, Pictures)]
    pictures = [_figure(chart) for chart in found.analyses if isinstance(chart, Pictures)]
    return side_by_side(charts) + "".join(pictures)


def _details(run: Run, is_one_of_many: bool) -> str:
    parts = [f"<h3>{e(run.title)}</h3>"] if is_one_of_many else []
    if "config" in run.recipe:
        lines = e("\n".join(run.recipe.get("changed", ())) or "none")
        parts.append(f"<p>Recipe: <code>{e(run.recipe['config'])}</code></p>")
        parts.append(f"<details open><summary>Fields changed by flags</summary><pre>{lines}</pre></details>")
    else:
        parts.append(note("The version that ran it did not note the recipe, and what flags changed."))
    for facts, names in _alike(run).items():
        stages = "all stages" if len(names) == len(run.stages) else ", ".join(names)
        parts.append(f"<p>{e(stages)}: {e(facts)}</p>")
    for name, one in run.stages.items():
        text = json.dumps(one.content["stage"], indent=2)
        parts.append(f"<details><summary>Config of {e(name)}</summary><pre>{e(text)}</pre></details>")
    return "".join(parts)


def _alike(run: Run) -> dict[str, list[str]]:
    """Machine and versions, with the stages that they are those of."""
    found: dict[str, list[str]] = {}
    for name, one in run.stages.items():
        facts = {**one.content.get("machine", {}), **one.content.get("versions", {})}
        found.setdefault(", ".join(f"{what} {value}" for what, value in facts.items()) or "not noted", []).append(name)
    return found


def _noted(runs: Sequence[Run]) -> str:
    stages: dict[str, list[str]] = {}  # by what is said of them
    for run in runs:
        for name, text in run.notes:
            where = f"{run.title} · {name}".strip(" ·") if len(runs) > 1 else name
            stages.setdefault(text, []).extend([where] if where else [])
    items = "".join(f"<li><b>{_name(', '.join(names))}</b> {e(text)}</li>" for text, names in stages.items())
    return f'<ul class="notes">{items}</ul>' if items else note("Nothing is missing, and the run gave no warning.")
