"""Charts as data: described once, drawn by `figures` for papers and by `plots` for the page."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from tinymim_jax.tasks.contract import Panels

# Paul Tol's bright scheme, which people who confuse red and green can tell apart.
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#888888")


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

    def groups(self) -> list[str]:
        """Those of its lines, in order: the n-th has the n-th colour."""
        return list(dict.fromkeys(line.group for line in self.series))


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
    """Values [rows, columns] as colours from `low` to `high`; None: of the values."""

    x_label: str
    y_label: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: np.ndarray
    unit: str
    low: float | None = 0.0
    high: float | None = None
    error: np.ndarray | None = None  # standard errors, NaN where not known
    bottom_up: bool = False  # the first row is the lowest
    colours: str = "magma"


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


def key(*parts: str) -> str:
    """The parts as the name of a file."""
    return "_".join(re.sub(r"\W+", "_", part).strip("_") for part in parts)


def said(chart: Chart) -> str:
    """The chart in a sentence, for those who do not see it."""
    match chart:
        case Lines():
            ends = [f"{line.name} {line.y[-1]:.4g}" for line in chart.series if len(line.y) and not line.is_thin]
            return f"{chart.title}, {chart.y_label} by {chart.x_label}. At the end: {', '.join(ends)}."
        case Points():
            each = [f"{n} {y:.4g} against {x:.4g}" for n, x, y in zip(chart.names, chart.x, chart.y, strict=True)]
            return f"{chart.title}, {chart.y_label} against {chart.x_label}: {', '.join(each)}."
        case Bars():
            each = [f"{name} {value:.4g}" for name, value in zip(chart.names, chart.values, strict=True)]
            return f"{chart.title}, {chart.label}: {', '.join(each)}."
        case Boxes():
            each = [f"{name} {np.median(of):.4g}" for name, of in zip(chart.names, chart.values, strict=True)]
            return f"{chart.title}, medians of {chart.y_label} by {chart.x_label}: {', '.join(each)}."
        case Heatmap():
            low, high = np.nanmin(chart.values), np.nanmax(chart.values)
            return f"{chart.title}, {chart.y_label} by {chart.x_label}, from {low:.3g} to {high:.3g} {chart.unit}."
    return chart.title
