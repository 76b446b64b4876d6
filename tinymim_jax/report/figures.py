"""Tables and pictures of a workdir: loss curves, reconstructions, relation maps."""

import dataclasses
import io
import re
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from etils.epath import Path
from rich.console import Console
from rich.table import Table

from tinymim_jax.data import augment, decode, sources
from tinymim_jax.experiment import config
from tinymim_jax.models.layers import patchify
from tinymim_jax.objectives import relations
from tinymim_jax.runtime import metric_log
from tinymim_jax.runtime import sharding as mesh_lib
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import STREAMS, Batch
from tinymim_jax.training.loop import Runner
from tinymim_jax.training.setup import example_batch
from tinymim_jax.weights import handoff

NUM_PICTURES = 6
GREY = 0.5  # of masked patches


def table(results: dict[str, Any]) -> str:
    """The metrics of each stage, then each comparison, as text for a terminal."""
    tables = [Table("stage", "loss", "evaluations", title=results["config"])]
    for name, metrics in results["stages"].items():
        evals = ", ".join(f"{k} {v:.2f}" for k, v in metrics.items() if "/" in k and not k.endswith("/images"))
        tables[0].add_row(name, f"{metrics['loss']:.4f}" if "loss" in metrics else "-", evals)
    for title, compared in results["compare"].items():
        tables.append(Table("", "mean", "std. error", "runs", title=f"{title} ({compared['metric']})"))
        for label, row in compared["rows"].items():
            error = "-" if row["stderr"] is None else f"{row['stderr']:.2f}"
            tables[-1].add_row(label, f"{row['mean']:.2f}", error, str(len(row["values"])))
    console = Console(file=io.StringIO(), width=110)
    console.print(*tables)
    return console.file.getvalue()


def write(workdir: Path, names: list[str]) -> list[Path]:
    """Draws the finished stages `names` into WORKDIR/report/; returns the files."""
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    figures = {"loss": loss_curves(workdir, names)}
    for name in names:
        stage = handoff.read_stage(workdir / name)
        try:
            if stage.task.kind in PICTURES:
                figures[f"{name}_{stage.task.kind}"] = PICTURES[stage.task.kind](stage, name, workdir)
        except InputError as error:  # a picture is no reason for a finished run to fail
            print(f"no picture of {name}: {error}")
    paths = {folder / f"{key}.png": figure for key, figure in figures.items()}
    for path, figure in paths.items():
        with path.open("wb") as file:
            figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
    return list(paths)


def loss_curves(workdir: Path, names: list[str]) -> matplotlib.figure.Figure:
    """Training loss against epochs, a panel per kind of task."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(handoff.read_stage(workdir / name).task.kind, []).append(name)
    figure = matplotlib.figure.Figure(figsize=(5.5 * len(kinds), 4))
    for axes, (kind, stages) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds.items(), strict=True):
        groups = list(dict.fromkeys(re.sub(r"_\d+$", "", name) for name in stages))  # stages that differ by seed
        for name in stages:
            group = re.sub(r"_\d+$", "", name)
            label = group if axes.get_legend_handles_labels()[1].count(group) == 0 else None
            lines = [line for line in metric_log.read(workdir / name / "metrics.jsonl") if "epoch" in line]
            x, y = [line["epoch"] for line in lines], [line["loss"] for line in lines]
            axes.plot(x, y, color=f"C{groups.index(group)}", label=label, linewidth=1)
        axes.set(title=kind, xlabel="epoch", ylabel="loss")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def reconstructions(stage: config.Stage, name: str, workdir: Path) -> matplotlib.figure.Figure:
    """MAE: original, masked and reconstructed images, a column each."""
    runner = _runner(stage, name, workdir)
    batch, images = _samples(stage, runner.source)
    task, patch = runner.plan.task, stage.model.patch_size
    params = handoff.read_params(workdir / name)
    out, _ = task.reconstruct(params, batch, _rngs(), train=False)
    pixels = patchify(images, patch)
    pred = np.asarray(out.pred)
    if stage.task.norm_pix_loss:  # back to each patch's own mean and contrast, which the model was not asked for
        pred = pred * pixels.std(axis=-1, ddof=1, keepdims=True) + pixels.mean(axis=-1, keepdims=True)
    else:
        pred = pred * np.tile(stage.data.std, patch**2) + np.tile(stage.data.mean, patch**2)
    masked = np.asarray(out.is_masked)[..., None]
    rows = [pixels, np.where(masked, GREY, pixels), np.where(masked, pred, pixels)]
    figure = matplotlib.figure.Figure(figsize=(1.5 * len(images), 5), layout="constrained")
    grid = figure.subplots(3, len(images))
    for axes_row, values, label in zip(grid, rows, ("original", "masked", "reconstructed"), strict=True):
        for axes, image in zip(axes_row, _unpatch(values, patch), strict=True):
            _show(axes, image.clip(0, 1))
        axes_row[0].set_ylabel(label)
    figure.suptitle(f"{name}: {stage.task.mask_ratio:.0%} of the patches masked")
    return figure


def relation_maps(stage: config.Stage, name: str, workdir: Path) -> matplotlib.figure.Figure:
    """Distillation: what one patch (boxed) relates to, in the teacher and in the student, mean over heads."""
    runner = _runner(stage, name, workdir)
    batch, images = _samples(stage, runner.source)
    traces = runner.plan.task.traces(handoff.read_params(workdir / name), runner.frozen, batch, _rngs(), train=False)
    side = stage.model.image_size // stage.model.patch_size
    query = (side // 2) * side + side // 2
    names = stage.task.relations
    figure = matplotlib.figure.Figure(figsize=(1.6 * (1 + 2 * len(names)), 1.6 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), 1 + 2 * len(names))
    for axes, image in zip(grid[:, 0], images, strict=True):
        _show(axes, image)
        patch = stage.model.patch_size
        corner = (side // 2) * patch - 0.5
        axes.add_patch(matplotlib.patches.Rectangle((corner, corner), patch, patch, fill=False, color="red"))
    for column, relation in enumerate(names):
        maps = [relations.relation(*relations.pair(trace, relation)).mean(axis=1)[:, 1 + query, 1:] for trace in traces]
        for i, pair in enumerate(np.stack(maps, axis=1)):  # teacher and student on one scale
            for who in range(2):
                _show(grid[i, 1 + 2 * column + who], pair[who].reshape(side, side), vmin=0, vmax=pair.max())
        for who, label in enumerate(("teacher", "student")):
            grid[0, 1 + 2 * column + who].set_title(f"{relation.upper()} {label}", fontsize=9)
    figure.suptitle(f"{name}: relations of the boxed patch")
    return figure


PICTURES = {"mae": reconstructions, "distill": relation_maps}


def _runner(stage: config.Stage, name: str, workdir: Path) -> Runner:
    one_device = mesh_lib.make_mesh(devices=jax.local_devices()[:1])
    return Runner(dataclasses.replace(stage, evals={}), name, workdir, one_device)


def _samples(stage: config.Stage, source: sources.Source) -> tuple[Batch, np.ndarray]:
    """Images spread over the data set, uncropped: as a batch, and as floats in [0, 1] [n, S, S, 3]."""
    data = dataclasses.replace(stage.data, transform="eval", crop_pct=1.0)
    starts = np.linspace(0, len(source), NUM_PICTURES, endpoint=False).astype(int)
    batch = example_batch(stage, NUM_PICTURES)
    for row, start in enumerate(starts):
        batch["image"][row] = _first_readable(source, start, data)
    return jax.tree.map(jnp.asarray, batch), batch["image"] / 255.0


def _first_readable(source: sources.Source, start: int, data: config.Data) -> np.ndarray:
    """Image `start`, or the first after it that decodes; raises InputError after ten."""
    for i in range(start, start + 10):
        try:
            image = decode.decode(source[i % len(source)]["image"], source.describe(i % len(source)))
            return augment.transform(image, data, np.random.default_rng(0))
        except InputError as error:
            reason = error
    raise reason


def _rngs() -> dict[str, jax.Array]:
    return {name: jax.random.key(i) for i, name in enumerate(STREAMS)}


def _unpatch(patches: np.ndarray, patch: int) -> np.ndarray:
    """The inverse of `patchify`: [n, L, P] -> [n, S, S, 3]."""
    n, side = len(patches), round(patches.shape[1] ** 0.5)
    return patches.reshape(n, side, side, patch, patch, 3).swapaxes(2, 3).reshape(n, side * patch, side * patch, 3)


def _show(axes: Any, image: np.ndarray, **scale: float) -> None:
    axes.imshow(image, interpolation="nearest", **scale)
    axes.set(xticks=[], yticks=[])
