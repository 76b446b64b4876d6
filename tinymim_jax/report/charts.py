"""Charts as data: described once, drawn by `figures` for papers and by `plots` for the page."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tinymim_jax.tasks.contract import Panels

# Paul Tol's bright scheme, which people who confuse red and green can tell apart.
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#888888")
SAID = 20  # of so many values the sentence about a chart tells


@dataclasses.dataclass(frozen=True)
class Chart:
    """What every chart has: the name of its files, without a suffix, and a title."""

    key: str
    title: str


@dataclasses.dataclass(frozen=True)
class Series:
    """A line. Those of one `group`, as of stages that differ by seed, have one colour, those of one `run` one dash."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None  # standard errors of y
    group: str = ""
    run: int = 0
    is_thin: bool = False  # of one replica, behind their mean


@dataclasses.dataclass(frozen=True)
class Lines(Chart):
    """Lines over a common axis, which is labelled with its unit."""

    x_label: str
    y_label: str
    series: Sequence[Series]

    def looks(self) -> Iterator[tuple[Series, str, int, bool]]:
        """Each line with its colour, the number of its dash, and whether the legend names it."""
        groups, named = list(dict.fromkeys(line.group for line in self.series)), set()
        for line in self.series:
            number, what = groups.index(line.group), (line.group, line.run)
            is_named = not line.is_thin and what not in named
            yield line, COLOURS[number % len(COLOURS)], line.run + number // len(COLOURS), is_named
            named |= {what} if is_named else set()


@dataclasses.dataclass(frozen=True)
class Points(Chart):
    """Named points, with the standard errors of y where they are known: ours against those of a paper."""

    x_label: str
    y_label: str
    names: Sequence[str]
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float | None]


@dataclasses.dataclass(frozen=True)
class Bars(Chart):
    """A horizontal bar for each name, the first at the top; `error` as of `Points`."""

    label: str  # of the values, with their unit
    names: Sequence[str]
    values: Sequence[float]
    error: Sequence[float | None] = ()
    limits: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Heatmap(Chart):
    """Values [rows, columns] as colours from 0 to `high`; None: to their largest."""

    x_label: str
    y_label: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: np.ndarray
    unit: str
    high: float | None = None
    error: np.ndarray | None = None  # standard errors, NaN where not known
    bottom_up: bool = False  # the first row is the lowest


@dataclasses.dataclass(frozen=True)
class Boxes(Chart):
    """A box plot of `values[i]` at `names[i]`, and a dashed line at `level`, which `level_name` explains."""

    x_label: str
    y_label: str
    names: Sequence[str]
    values: Sequence[Sequence[float]]
    level: float | None = None
    level_name: str = ""


@dataclasses.dataclass(frozen=True)
class Pictures(Chart):
    """Grids of images of which one is chosen: `axes` are the choices by name, `grids` what each choice shows."""

    axes: Mapping[str, Sequence[str]]
    grids: Mapping[tuple[int, ...], Panels]


@dataclasses.dataclass
class Found:
    """All charts of some runs, by the section of the page that shows them."""

    curves: list[Chart]
    comparisons: list[Chart]
    classes: list[Chart]
    analyses: list[Chart]
    pictures: list[Pictures]  # of the stages' tasks, on disk each of its own
    shown: Pictures | None  # and on the page with a choice of the stage


def key(*parts: str) -> str:
    """The parts as the name of a file."""
    return "_".join(re.sub(r"\W+", "_", part).strip("_") for part in parts)


def said(chart: Chart) -> str:
    """The chart in a sentence, for those who do not see it."""
    match chart:
        case Lines():
            ends = [f"{line.name} {line.y[-1]:.4g}" for line in chart.series if len(line.y) and not line.is_thin]
            return f"{chart.title}, {chart.y_label} by {chart.x_label}. At the end: {_few(ends)}."
        case Points():
            each = [f"{n} {y:.4g} against {x:.4g}" for n, x, y in zip(chart.names, chart.x, chart.y, strict=True)]
            return f"{chart.title}, {chart.y_label} against {chart.x_label}: {_few(each)}."
        case Bars():
            each = [f"{name} {value:.4g}" for name, value in zip(chart.names, chart.values, strict=True)]
            return f"{chart.title}, {chart.label}: {_few(each)}."
        case Boxes():
            each = [f"{name} {np.median(of):.4g}" for name, of in zip(chart.names, chart.values, strict=True)]
            return f"{chart.title}, medians of {chart.y_label} by {chart.x_label}: {_few(each)}."
        case Heatmap():
            known = chart.values[np.isfinite(chart.values)]
            span = f", from {known.min():.3g} to {known.max():.3g} {chart.unit}" if known.size else ""
            return f"{chart.title}, {chart.y_label} by {chart.x_label}{span}."
    return chart.title


def _few(parts: list[str]) -> str:
    more = [f"and {len(parts) - SAID} more"] if len(parts) > SAID else []
    return ", ".join(parts[:SAID] + more)
