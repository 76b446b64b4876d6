"""What the task of each finished stage has to show."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path

from tinymim_jax.data import sources
from tinymim_jax.data.config import Data
from tinymim_jax.data.fields import Example, Fields
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
    batch = _samples(task.fields, stage.data, sources.open_source(stage.data))
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
