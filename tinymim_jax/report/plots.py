"""Charts as plotly's JSON, for the page; its script gives them the colours of the light or the dark theme."""

import html
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from tinymim_jax.report.charts import COLOURS, Bars, Boxes, Chart, Heatmap, Lines, Points

DASHES = ("solid", "dash", "dot", "dashdot")
LONG = 50  # so many names have room


def plot(chart: Chart) -> dict[str, Any]:
    """{"data": traces, "layout": ...} with plain numbers, None for those that are not finite, and escaped names."""
    traces, layout = PLOTS[type(chart)](chart)
    return escaped({"data": traces, "layout": layout})


def escaped(value: Any) -> Any:
    """A tree whose texts plotly shows as they stand; it takes tags for its own, links among them."""
    if isinstance(value, str):
        return html.escape(value, quote=False)
    if isinstance(value, list):
        return [escaped(one) for one in value]
    if isinstance(value, dict):
        return {name: one if name == "hovertemplate" else escaped(one) for name, one in value.items()}
    return value


def plain(values: Iterable[Any], digits: int = 5) -> list[Any]:
    """Numbers as JSON takes them, of so many significant digits."""
    return [float(f"{v:.{digits}g}") if v is not None and np.isfinite(v) else None for v in values]


def errors(values: Iterable[float | None] | None, axis: str) -> dict[str, Any]:
    values = plain(values or ())
    is_known = any(value is not None for value in values)
    return {f"error_{axis}": {"array": values, "thickness": 1, "width": 3}} if is_known else {}


def lines(chart: Lines) -> tuple[list[dict], dict]:
    traces = []
    for line, colour, dash, is_named in chart.looks():
        style = {"color": colour, "width": 0.7 if line.is_thin else 1.8, "dash": DASHES[dash % len(DASHES)]}
        traces.append({
            "type": "scatter", "x": plain(line.x), "y": plain(line.y), **errors(line.error, "y"), "name": line.name,
            "mode": "lines+markers" if len(line.x) < 20 and not line.is_thin else "lines",
            "line": style, "opacity": 0.45 if line.is_thin else 1, "marker": {"size": 5},
            "legendgroup": f"{line.group} {line.run}", "showlegend": is_named,
            "hovertemplate": f"%{{y:.4g}} at {escaped(chart.x_label)} %{{x:.4g}}",
        })  # fmt: skip
    return traces, axes(chart.x_label, chart.y_label)


def points(chart: Points) -> tuple[list[dict], dict]:
    sides = [("top right", "bottom left")[i % 2] for i in range(len(chart.x))]  # so that neighbours do not overlap
    trace = {
        "type": "scatter", "mode": "markers+text", "x": plain(chart.x), "y": plain(chart.y), **errors(chart.error, "y"),
        "text": list(chart.names), "textposition": sides, "textfont": {"size": 11}, "cliponaxis": False,
        "marker": {"size": 8, "color": COLOURS[0]},
        "hovertemplate": "%{text}<br>here %{y:.2f}, published %{x:.1f}<extra></extra>",
    }  # fmt: skip
    layout = axes(chart.x_label, chart.y_label)
    for name, values in (("xaxis", chart.x), ("yaxis", chart.y)):
        margin = 0.35 * max(max(values) - min(values), 1)
        layout[name]["range"] = plain([min(values) - margin, max(values) + margin])
    return [trace], layout


def bars(chart: Bars) -> tuple[list[dict], dict]:
    trace = {
        "type": "bar", "orientation": "h", "x": plain(chart.values), **errors(chart.error, "x"),
        "y": list(range(len(chart.names))), "customdata": list(chart.names), "marker": {"color": COLOURS[0]},
        "hovertemplate": "%{customdata}: %{x:.2f}<extra></extra>",
    }  # fmt: skip
    layout = axes(chart.label, "", y=ticks(chart.names), height=24 * min(len(chart.names), LONG) + 100)
    layout |= {"bargap": 0.35, "hovermode": "y"}  # a bar of no length answers, too
    layout["yaxis"]["range"] = [len(chart.names) - 0.5, -0.5]
    if chart.limits:
        layout["xaxis"]["range"] = list(chart.limits)
    return [trace], layout


def heatmap(chart: Heatmap) -> tuple[list[dict], dict]:
    error = np.full(chart.values.shape, np.nan) if chart.error is None else chart.error
    highest = np.fmax.reduce(chart.values, axis=None) if chart.high is None else chart.high
    trace = {
        "type": "heatmap", "zmin": 0, "zmax": plain([highest])[0],
        "z": [plain(row, 4) for row in chart.values],
        "colorscale": [[i / 10, to_hex(colormaps["magma"](i / 10))] for i in range(11)],
        "colorbar": {"title": {"text": chart.unit, "side": "right"}, "thickness": 12, "outlinewidth": 0},
        "hovertemplate": f"{escaped(chart.y_label)} %{{customdata[0]}}<br>{escaped(chart.x_label)} %{{customdata[1]}}"
        "<br>%{z:.3f}%{customdata[2]}<extra></extra>",
        "customdata": [
            [[row, column, "" if np.isnan(error[i, j]) else f" ± {error[i, j]:.3f}"]
             for j, column in enumerate(chart.columns)]
            for i, row in enumerate(chart.rows)
        ],
    }  # fmt: skip
    is_square = len(chart.rows) == len(chart.columns)
    height = 460 if is_square else min(460, 130 + 30 * len(chart.rows))
    layout = axes(chart.x_label, chart.y_label, ticks(chart.columns), ticks(chart.rows), height)
    layout["yaxis"] |= {"autorange": True if chart.bottom_up else "reversed", "showgrid": False}
    layout["xaxis"] |= {"constrain": "domain", "showgrid": False}
    if is_square:
        layout["yaxis"] |= {"scaleanchor": "x", "constrain": "domain"}
    return [trace], layout


def boxes(chart: Boxes) -> tuple[list[dict], dict]:
    style = {
        "boxpoints": "all", "jitter": 0.4, "pointpos": 0, "showlegend": False,
        "marker": {"size": 4, "color": COLOURS[0], "opacity": 0.6}, "line": {"width": 1.2, "color": COLOURS[0]},
    }  # fmt: skip
    each = zip(chart.names, chart.values, strict=True)
    traces = [{"type": "box", "name": name, "y": plain(values), **style} for name, values in each]
    layout = axes(chart.x_label, chart.y_label)
    layout["xaxis"]["type"] = "category"
    if chart.level is not None:
        ends = {"x": [chart.names[0], chart.names[-1]], "y": [chart.level] * 2, "name": chart.level_name}
        traces.append({"type": "scatter", "mode": "lines", **ends, "line": {"dash": "dash", "color": COLOURS[1]}})
    return traces, layout


def axes(x_label: str, y_label: str, x: dict | None = None, y: dict | None = None, height: int = 380) -> dict:
    both = {"xaxis": (x_label, x), "yaxis": (y_label, y)}
    titled = {axis: {"title": {"text": text}, "automargin": True, **(of or {})} for axis, (text, of) in both.items()}
    return {**titled, "height": height}


def ticks(names: Iterable[str]) -> dict[str, Any]:
    """Names at 0, 1, ...; of many, some."""
    names = list(names)
    every = -(-len(names) // LONG)
    return {"tickvals": list(range(0, len(names), every)), "ticktext": names[::every]}


PLOTS: dict[type[Chart], Callable[[Any], tuple[list[dict], dict]]] = {
    Lines: lines, Points: points, Bars: bars, Heatmap: heatmap, Boxes: boxes,
}  # fmt: skip
