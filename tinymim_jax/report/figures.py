"""Pictures of a workdir: curves, confusions of classes, and what each task has to show."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import matplotlib.patches
import numpy as np
from etils.epath import Path

from tinymim_jax.data import sources
from tinymim_jax.data.config import Data
from tinymim_jax.data.fields import Example, Fields
from tinymim_jax.experiment import stage_file
from tinymim_jax.experiment.config import Stage
from tinymim_jax.runtime import metric_log, sharding, storage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import STREAMS, Batch, Panels
from tinymim_jax.training import start
from tinymim_jax.weights import handoff

NUM_PICTURES = 6
NAMED = 50  # so many classes have room for their names
Points = dict[str, list[tuple[float, float]]]


def write(workdir: Path, results: dict[str, Any]) -> list[Path]:
    """Draws a run's results and finished stages into WORKDIR/report/, of replicas the first; returns the files."""
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    stages = {name: stage_file.read_stage(workdir / name) for name in results["stages"]}
    figures = {"loss": loss_curves(workdir, stages)}
    if curves := evaluation_curves(workdir, stages):
        figures["evaluations"] = curves
    figures |= compared_with_papers(results)
    for name, stage in stages.items():
        first = f"{handoff.replica_name(0)}_*.npz" if stage.run.replicas > 1 else "*.npz"
        arrays = storage.children(workdir / name / "evals", first)
        figures |= {f"{name}_{key}": figure for key, figure in confusions(arrays, name).items()}
        try:
            if panels := panels_of(stage, name, workdir):
                figures[f"{name}_{stage.task.kind}"] = drawn(panels, name)
        except InputError as error:  # a picture is no reason for a finished run to fail
            print(f"no picture of {name}: {error}")
    return save(figures, folder)


def save(figures: Mapping[str, matplotlib.figure.Figure], folder: Path) -> list[Path]:
    """Writes FOLDER/<key>.png of each; returns the files."""
    paths = {folder / f"{key}.png": figure for key, figure in figures.items()}
    for path, figure in paths.items():
        with path.open("wb") as file:
            figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
    return list(paths)


def loss_curves(workdir: Path, stages: Mapping[str, Stage]) -> matplotlib.figure.Figure:
    """Training loss against epochs, a panel per kind of task."""
    panels: dict[str, dict[str, Points]] = {}
    for name, stage in stages.items():
        log = metric_log.read(workdir / name / "metrics.jsonl")
        panels.setdefault(stage.task.kind, {})[name] = points(log, "loss")
    return curves(panels, "loss")


def evaluation_curves(workdir: Path, stages: Mapping[str, Stage]) -> matplotlib.figure.Figure | None:
    """What was measured during training against epochs, a panel per metric; None if nothing was."""
    panels: dict[str, dict[str, Points]] = {}
    for name, stage in stages.items():
        log = metric_log.read(workdir / name / "metrics.jsonl")
        for eval_name, cfg in stage.evals.items():
            for key in [f"{eval_name}/{metric}" for metric in cfg.metrics() or () if metric != "images"]:
                panels.setdefault(key, {})[name] = points(log, key)
    panels = {
        key: found for key, found in panels.items() if any(len(xy) > 1 for one in found.values() for xy in one.values())
    }
    return curves(panels, "%") if panels else None


def compared_with_papers(results: dict[str, Any]) -> dict[str, matplotlib.figure.Figure]:
    """Of each comparison that has published values: ours, with standard errors, against them."""
    figures = {}
    for title, compared in results["compare"].items():
        paper = compared.get("paper", {})
        rows = {label: row for label, row in compared["rows"].items() if label in paper}
        if not rows:
            continue
        figure = matplotlib.figure.Figure(figsize=(6, 4.5))
        axes = figure.subplots()
        for i, label in enumerate(sorted(rows, key=lambda name: (paper[name], rows[name]["mean"]))):
            row, side = rows[label], (("left", (5, 5)), ("right", (-5, -9)))[i % 2]  # so that neighbours do not overlap
            place = paper[label], row["mean"]
            axes.errorbar(*place, yerr=row["stderr"], fmt="o", capsize=3)
            axes.annotate(label, place, xytext=side[1], ha=side[0], textcoords="offset points", fontsize=7)
        ranks = compared.get("rank_correlation")
        axes.set(
            title=title + ("" if ranks is None else f", rank correlation {ranks:.2f}"),
            xlabel=f"published {compared['metric'].rpartition('/')[2]}, %", ylabel=f"{compared['metric']} here, %",
        )  # fmt: skip
        axes.margins(0.35, 0.15)
        axes.grid(alpha=0.3)
        figures["compare_" + re.sub(r"\W+", "_", title).strip("_").lower()] = figure
    return figures


def points(log: list[dict[str, float]], metric: str) -> Points:
    """(epoch, value) of `metric`, and of each replica's, by their keys in a stage's log."""
    scale = next((line["epoch"] / line["step"] for line in log if line.get("epoch")), 0.0)
    own = re.compile(rf"(replica\d+/)?{re.escape(metric)}")
    found: Points = {}
    for line in sorted(log, key=lambda line: line["step"]):
        for key in filter(own.fullmatch, line):
            found.setdefault(key, []).append((line["step"] * scale, line[key]))
    return found


def curves(panels: Mapping[str, Mapping[str, Points]], ylabel: str) -> matplotlib.figure.Figure:
    """A panel for each title, with a line for each stage; those of replicas are thin, behind their mean."""
    figure = matplotlib.figure.Figure(figsize=(5.5 * len(panels), 4))
    for axes, (title, stages) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        groups = list(dict.fromkeys(re.sub(r"_\d+$", "", name) for name in stages))  # stages that differ by seed
        for name, found in stages.items():
            group = re.sub(r"_\d+$", "", name)
            label = group if axes.get_legend_handles_labels()[1].count(group) == 0 else None
            for key, xy in sorted(found.items()):
                style = {"color": f"C{groups.index(group)}", "marker": "." if len(xy) < 20 else ""}
                style |= {"linewidth": 0.4, "alpha": 0.5} if key.startswith("replica") else {"linewidth": 1}
                axes.plot(*zip(*xy, strict=True), label=None if key.startswith("replica") else label, **style)
        axes.set(title=title, xlabel="epoch", ylabel=ylabel)
        axes.grid(alpha=0.3)
        if axes.lines:  # stages of no steps have none
            axes.legend()
    return figure


def confusions(files: Iterable[Path], title: str) -> dict[str, matplotlib.figure.Figure]:
    """Accuracy by class beside what each class was taken for, of each evaluation whose arrays are in one of `files`."""
    figures = {}
    for file in files:
        with file.open("rb") as opened, np.load(opened) as arrays:
            if "confusion" in arrays:
                key, measure = ("iou", "IoU") if "iou" in arrays else ("per_class", "accuracy")
                of_classes = (arrays[name] for name in (key, "confusion", "classes"))
                figures[f"{file.stem}_classes"] = by_class(*of_classes, f"{title}: {file.stem}", measure)
    return figures


def by_class(
    per_class: np.ndarray, confusion: np.ndarray, classes: np.ndarray, title: str, measure: str
) -> matplotlib.figure.Figure:
    """per_class [C] in percent, confusion [C, C] in images or pixels, classes: names [C], or [0] if not known."""
    count = len(per_class)
    side = min(max(4.0, 0.3 * count), 9.0)
    figure = matplotlib.figure.Figure(figsize=(2 * side, side), layout="constrained")
    bars, grid = figure.subplots(1, 2)
    bars.barh(range(count), np.nan_to_num(per_class), height=0.8 if count <= NAMED else 1)
    bars.set(title=f"{measure} by class, mean {np.nanmean(per_class):.1f} %", xlabel="%", ylabel="class", xlim=(0, 100))
    bars.set_ylim(count - 0.5, -0.5)
    shares = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = grid.imshow(shares, vmin=0, vmax=100, interpolation="nearest")
    grid.set(title="what they were taken for", xlabel="predicted class", ylabel="class")
    figure.colorbar(image, ax=grid, label="% of the class")
    if len(classes) == count <= NAMED:
        for axes in (bars, grid):
            axes.set_yticks(range(count), classes)
        grid.set_xticks(range(count), classes, rotation=90)
    figure.suptitle(title)
    return figure


def panels_of(stage: Stage, name: str, workdir: Path) -> Panels | None:
    """What the task of a finished stage has to show; of several replicas, the first."""
    one_device = sharding.make_mesh(devices=jax.local_devices()[:1])
    single = dataclasses.replace(stage, evals={}, run=dataclasses.replace(stage.run, replicas=1))
    loaded = start.load(single, name, workdir, one_device)
    task, folder = loaded.setup.task, workdir / name
    folder = folder / handoff.replica_name(0) if handoff.replicas(folder) else folder
    variables = jax.tree.map(jnp.asarray, handoff.read_variables(folder))
    batch = _samples(task.fields, stage.data, sources.open_source(stage.data))
    rngs = {stream: jax.random.key(i) for i, stream in enumerate(STREAMS)}
    return task.panels(variables, loaded.frozen, batch, rngs)


def drawn(panels: Panels, name: str) -> matplotlib.figure.Figure:
    """Rows of images as a grid; two maps side by side share a scale, with a colour bar."""
    rows, columns = len(panels.rows), len(panels.rows[0])
    figure = matplotlib.figure.Figure(figsize=(1.7 * columns, 1.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes_row, images in zip(grid, panels.rows, strict=True):
        maps = [column for column, image in enumerate(images) if image.ndim == 2]
        for axes, image in zip(axes_row, images, strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        for pair in (maps[i : i + 2] for i in range(0, len(maps), 2)):
            values = np.stack([images[column] for column in pair])
            for column in pair:
                axes_row[column].images[0].set_clim(min(0.0, values.min()), values.max())
            figure.colorbar(axes_row[pair[-1]].images[0], ax=[axes_row[column] for column in pair])
        if panels.box:
            left, upper, side = panels.box
            corner = (left - 0.5, upper - 0.5)
            axes_row[0].add_patch(matplotlib.patches.Rectangle(corner, side, side, fill=False, color="red"))
    for axes, label in zip(grid[:, 0], panels.row_labels, strict=False):
        axes.set_ylabel(label)
    for axes, label in zip(grid[0], panels.column_labels, strict=False):
        axes.set_title(label, fontsize=8)
    figure.suptitle(f"{name}: {panels.title}")
    return figure


def _samples(fields: Fields, data: Data, source: sources.Source) -> Batch:
    """Records spread over the data set, uncropped, as a batch."""
    data = dataclasses.replace(data, transform="eval", crop_pct=1.0)
    batch = fields.batch(data, NUM_PICTURES)
    starts = np.linspace(0, len(source), NUM_PICTURES, endpoint=False).astype(int)
    for row, first in enumerate(starts):
        for name, value in _first_readable(fields, source, first, data).items():
            batch[name][row] = value
    return jax.tree.map(jnp.asarray, {**batch, "is_valid": np.ones(NUM_PICTURES, bool)})


def _first_readable(fields: Fields, source: sources.Source, start: int, data: Data) -> Example:
    """Record `start`, or the first after it that can be read; raises InputError after ten."""
    for i in (number % len(source) for number in range(start, start + 10)):
        try:
            return fields.read(source[i], source.describe(i), data, np.random.default_rng(0))
        except InputError as error:
            reason = error
    raise reason
