"""Charts as PNG and SVG, in one style, for papers and slides."""

import io
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib
import matplotlib.figure
import matplotlib.patches
import numpy as np
from etils.epath import Path
from matplotlib.axes import Axes

from tinymim_jax.report.charts import COLOURS, Bars, Boxes, Chart, Heatmap, Lines, Pictures, Points
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.metric_log import write_whole
from tinymim_jax.tasks.contract import Panels

NAMED = 50  # so many classes have room for their names ...
LONGEST = 36  # ... of so many characters
DASHES = ("-", "--", ":", "-.")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "image.cmap": "viridis",
    "text.parse_math": False,  # names may have a $
    "svg.hashsalt": "tinymim_jax",  # the same chart is the same file
}


def save(charts: Iterable[Chart], folder: Path) -> list[Path]:
    """Writes FOLDER/<key>.png and .svg of each chart, of pictures a .png of the first choice; returns the files."""
    storage.make(folder)
    paths = []
    for chart in charts:
        drawn = draw(chart)
        for kind in ("png",) if isinstance(chart, Pictures) else ("png", "svg"):
            buffer = io.BytesIO()
            with matplotlib.rc_context(STYLE):
                drawn.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
            paths.append(folder / f"{chart.key}.{kind}")
            write_whole(paths[-1], buffer.getvalue())
    return paths


def draw(chart: Chart) -> matplotlib.figure.Figure:
    """A chart as a figure."""
    with matplotlib.rc_context(STYLE):
        if isinstance(chart, Pictures):
            return pictures(next(iter(chart.grids.values())), chart.title)
        figure = matplotlib.figure.Figure(figsize=(5, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.set_title(chart.title)
        DRAWN[type(chart)](axes, chart)
    return figure


def short(name: str) -> str:
    """A name as long as there is room for."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."


def lines(axes: Axes, chart: Lines) -> None:
    for line, colour, dash, is_named in chart.looks():
        style = {"linewidth": 0.4, "alpha": 0.5} if line.is_thin else {"linewidth": 1.2}
        style["marker"] = "." if len(line.x) < 20 and not line.is_thin else ""
        style |= {"color": colour, "linestyle": DASHES[dash % len(DASHES)], "label": line.name if is_named else None}
        axes.errorbar(line.x, line.y, yerr=line.error, capsize=2, **style)
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
    if names := axes.get_legend_handles_labels()[1]:  # stages of no steps have none
        axes.legend(ncols=1 + len(names) // 8)


def points(axes: Axes, chart: Points) -> None:
    for i, (name, x, y, error) in enumerate(zip(chart.names, chart.x, chart.y, chart.error, strict=True)):
        side, shift = (("left", (5, 5)), ("right", (-5, -9)))[i % 2]  # so that neighbours do not overlap
        axes.errorbar(x, y, yerr=error, fmt="o", markersize=4, capsize=3, color=COLOURS[0])
        axes.annotate(name, (x, y), xytext=shift, ha=side, textcoords="offset points", fontsize=7)
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
    axes.margins(0.35, 0.15)


def bars(axes: Axes, chart: Bars) -> None:
    count = len(chart.names)
    axes.figure.set_size_inches(5, min(max(2.0, 0.22 * count + 1), 9.0))
    errors = [np.nan if error is None else error for error in chart.error] or None
    axes.barh(range(count), chart.values, xerr=errors, height=0.8 if count <= NAMED else 1, color=COLOURS[0])
    axes.set(xlabel=chart.label, xlim=chart.limits)
    axes.set_ylim(count - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    if count <= NAMED:
        axes.set_yticks(range(count), map(short, chart.names))


def heatmap(axes: Axes, chart: Heatmap) -> None:
    rows, columns = chart.values.shape
    height, width = min(max(2.0, 0.25 * rows + 1), 9.0), min(max(3.6, 0.25 * columns + 1), 9.0)
    axes.figure.set_size_inches(width + 1, width if rows == columns else height)
    image = axes.imshow(
        chart.values, cmap="magma", vmin=0, vmax=chart.high, interpolation="nearest",
        origin="lower" if chart.bottom_up else "upper", aspect="auto",
    )  # fmt: skip
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
    axes.grid(visible=False)
    axes.figure.colorbar(image, ax=axes, label=chart.unit)
    if len(chart.columns) <= NAMED:
        axes.set_xticks(range(len(chart.columns)), map(short, chart.columns), rotation=90)
    if len(chart.rows) <= NAMED:
        axes.set_yticks(range(len(chart.rows)), map(short, chart.rows))


def boxes(axes: Axes, chart: Boxes) -> None:
    axes.boxplot(chart.values, tick_labels=chart.names, patch_artist=True, boxprops={"facecolor": COLOURS[0] + "80"},
                 medianprops={"color": "black"})  # fmt: skip
    if chart.level is not None:
        axes.axhline(chart.level, linestyle="--", color=COLOURS[1], linewidth=1, label=chart.level_name)
        axes.legend()
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label)


def pictures(panels: Panels, name: str) -> matplotlib.figure.Figure:
    """Rows of images as a grid; two maps side by side share a scale, with a colour bar."""
    rows, columns = len(panels.rows), max(map(len, panels.rows))
    figure = matplotlib.figure.Figure(figsize=(1.7 * columns, 1.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes_row, images in zip(grid, panels.rows, strict=True):
        for axes, image in zip(axes_row, images, strict=False):
            axes.imshow(image, interpolation="nearest")
        for axes in axes_row:
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
        for pair, limits in panels.scales(images):
            for column in pair:
                axes_row[column].images[0].set_clim(limits)
            figure.colorbar(axes_row[pair[-1]].images[0], ax=[axes_row[column] for column in pair])
        if panels.box:
            left, upper, side = panels.box
            corner = (left - 0.5, upper - 0.5)
            axes_row[0].add_patch(matplotlib.patches.Rectangle(corner, side, side, fill=False, color="red"))
    for axes, label in zip(grid[:, 0], panels.row_labels, strict=False):
        axes.set_ylabel(label)
    for axes, label in zip(grid[0], panels.column_labels, strict=False):
        axes.set_title(label, fontsize=8)
    for axes, caption in zip(grid.flat, itertools.chain(*panels.captions), strict=False):
        axes.set_xlabel(caption, fontsize=8)
    figure.suptitle(f"{name}: {panels.title}" if panels.title else name)
    return figure


DRAWN: dict[type[Chart], Callable[[Axes, Any], None]] = {
    Lines: lines, Points: points, Bars: bars, Heatmap: heatmap, Boxes: boxes,
}  # fmt: skip
