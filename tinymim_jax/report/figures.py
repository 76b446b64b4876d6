"""Pictures of a workdir: loss curves, and what each task has to show."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import matplotlib.figure
import matplotlib.patches
import numpy as np
from etils.epath import Path

from tinymim_jax.data import augment, decode, sources
from tinymim_jax.data.config import Data
from tinymim_jax.experiment import stage_file
from tinymim_jax.experiment.config import Stage
from tinymim_jax.runtime import metric_log, sharding
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import STREAMS, Batch, Panels
from tinymim_jax.training import start
from tinymim_jax.weights import handoff

NUM_PICTURES = 6


def write(workdir: Path, names: list[str]) -> list[Path]:
    """Draws the finished stages `names` into WORKDIR/report/; returns the files."""
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    figures = {"loss": loss_curves(workdir, names)}
    for name in names:
        stage = stage_file.read_stage(workdir / name)
        try:
            if panels := panels_of(stage, name, workdir):
                figures[f"{name}_{stage.task.kind}"] = drawn(panels, name)
        except InputError as error:  # a picture is no reason for a finished run to fail
            print(f"no picture of {name}: {error}")
    paths = {folder / f"{key}.png": figure for key, figure in figures.items()}
    for path, figure in paths.items():
        with path.open("wb") as file:
            figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
    return list(paths)


def loss_curves(workdir: Path, names: list[str]) -> matplotlib.figure.Figure:
    """Training loss against epochs, a panel per kind of task; replicas are thin lines behind their mean."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(stage_file.read_stage(workdir / name).task.kind, []).append(name)
    figure = matplotlib.figure.Figure(figsize=(5.5 * len(kinds), 4))
    for axes, (kind, stages) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds.items(), strict=True):
        groups = list(dict.fromkeys(re.sub(r"_\d+$", "", name) for name in stages))  # stages that differ by seed
        for name in stages:
            group = re.sub(r"_\d+$", "", name)
            label = group if axes.get_legend_handles_labels()[1].count(group) == 0 else None
            lines = [line for line in metric_log.read(workdir / name / "metrics.jsonl") if "epoch" in line]
            for key in sorted({key for line in lines for key in line if key == "loss" or key.endswith("/loss")}):
                x, y = zip(*[(line["epoch"], line[key]) for line in lines if key in line], strict=True)
                width = {"linewidth": 1, "label": label} if key == "loss" else {"linewidth": 0.4, "alpha": 0.5}
                axes.plot(x, y, color=f"C{groups.index(group)}", **width)
        axes.set(title=kind, xlabel="epoch", ylabel="loss")
        axes.grid(alpha=0.3)
        if axes.lines:  # stages of no steps have none
            axes.legend()
    return figure


def panels_of(stage: Stage, name: str, workdir: Path) -> Panels | None:
    """What the task of a finished stage has to show; of several replicas, the first."""
    one_device = sharding.make_mesh(devices=jax.local_devices()[:1])
    single = dataclasses.replace(stage, evals={}, run=dataclasses.replace(stage.run, replicas=1))
    loaded = start.load(single, name, workdir, one_device)
    task, folder = loaded.setup.task, workdir / name
    folder = folder / handoff.replica_name(0) if handoff.replicas(folder) else folder
    variables = jax.tree.map(jnp.asarray, handoff.read_variables(folder))
    batch = _samples(task.fields.batch(stage.data, NUM_PICTURES), stage.data, sources.open_source(stage.data))
    rngs = {stream: jax.random.key(i) for i, stream in enumerate(STREAMS)}
    return task.panels(variables, loaded.frozen, batch, rngs)


def drawn(panels: Panels, name: str) -> matplotlib.figure.Figure:
    """Rows of images as a grid; maps of one row and one pair of columns share a scale."""
    rows, columns = len(panels.rows), len(panels.rows[0])
    figure = matplotlib.figure.Figure(figsize=(1.5 * columns, 1.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes_row, images in zip(grid, panels.rows, strict=True):
        top = max((image.max() for image in images if image.ndim == 2), default=1.0)
        for axes, image in zip(axes_row, images, strict=True):
            axes.imshow(image, interpolation="nearest", vmin=0, vmax=top)
            axes.set(xticks=[], yticks=[])
        if panels.box:
            left, upper, side = panels.box
            corner = (left - 0.5, upper - 0.5)
            axes_row[0].add_patch(matplotlib.patches.Rectangle(corner, side, side, fill=False, color="red"))
    for axes, label in zip(grid[:, 0], panels.row_labels, strict=False):
        axes.set_ylabel(label)
    for axes, label in zip(grid[0], panels.column_labels, strict=False):
        axes.set_title(label, fontsize=9)
    figure.suptitle(f"{name}: {panels.title}")
    return figure


def _samples(batch: dict[str, np.ndarray], data: Data, source: sources.Source) -> Batch:
    """Images spread over the data set, uncropped, as a batch."""
    data = dataclasses.replace(data, transform="eval", crop_pct=1.0)
    starts = np.linspace(0, len(source), NUM_PICTURES, endpoint=False).astype(int)
    for row, first in enumerate(starts):
        batch["image"][row] = _first_readable(source, first, data)
    return jax.tree.map(jnp.asarray, {**batch, "is_valid": np.ones(NUM_PICTURES, bool)})


def _first_readable(source: sources.Source, start: int, data: Data) -> np.ndarray:
    """Image `start`, or the first after it that decodes; raises InputError after ten."""
    for i in range(start, start + 10):
        try:
            image = decode.decode(source[i % len(source)]["image"], source.describe(i % len(source)))
            return augment.transform(image, data, np.random.default_rng(0))
        except InputError as error:
            reason = error
    raise reason
