"""What the task of each finished stage has to show."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path

from tinymim_jax.data import sources
from tinymim_jax.data.config import Data
from tinymim_jax.data.fields import Fields
from tinymim_jax.evals.contract import Batches
from tinymim_jax.experiment.config import Stage
from tinymim_jax.runtime import sharding
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import STREAMS, Batch, Panels
from tinymim_jax.training import start
from tinymim_jax.weights import handoff

NUM_PICTURES = 6


def panels_of(stage: Stage, name: str, workdir: Path) -> Panels | None:
    """What the task of a finished stage has to show; of several replicas, the first."""
    one_device = sharding.make_mesh(devices=jax.local_devices()[:1])
    single = dataclasses.replace(stage, evals={}, run=dataclasses.replace(stage.run, replicas=1))
    loaded = start.load(single, name, workdir, one_device)
    task, folder = loaded.setup.task, workdir / name
    folder = folder / handoff.replica_name(0) if handoff.replicas(folder) else folder
    variables = jax.tree.map(jnp.asarray, handoff.read_variables(folder))
    batch = _samples(task.fields, stage.data, sources.open_source(stage.data), one_device)
    rngs = {stream: jax.random.key(i) for i, stream in enumerate(STREAMS)}
    return task.panels(variables, loaded.frozen, batch, rngs)


def choices(panels: Panels) -> list[Panels]:
    """The whole grid, then the images of each sample apart, in a row with what was made of it.

    Samples are columns where rows are labelled, as original and reconstruction, and else rows.
    """
    if panels.row_labels and not panels.column_labels:
        apart = [list(column) for column in zip(*panels.rows, strict=True)]
        labels = panels.row_labels
    else:
        apart, labels = panels.rows, panels.column_labels
    return [panels, *(Panels(panels.title, [row], [], list(labels), panels.box) for row in apart)]


def _samples(fields: Fields, data: Data, source: sources.Source, mesh: jax.sharding.Mesh) -> Batch:
    """Records spread over the data set, uncropped, as a batch, without those that cannot be read."""
    data = dataclasses.replace(data, transform="eval", crop_pct=1.0, workers=0)
    numbers = np.linspace(0, len(source), NUM_PICTURES, endpoint=False).astype(int)
    (batch,) = Batches(data, NUM_PICTURES, mesh, fields, False, sources.Chosen(source, numbers))
    if not (is_valid := np.asarray(batch["is_valid"])).any():
        raise InputError("none of the images that it would show can be read")
    return jax.tree.map(lambda rows: rows[is_valid], dict(batch))
