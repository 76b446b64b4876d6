"""Whole training states on disk, written asynchronously by orbax.

A checkpoint has three items: `model` (params, model_state, ema), which later stages read, `optim`
(opt_state, step), and `log` (averages not yet written). The step is also the position in the data
and, with the stage's seed, the source of every random number.
"""

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from tinymim_jax.config import InputError

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one stage's folder."""

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager((folder / FOLDER).absolute(), options=options)

    def save(self, step: int, model: dict[str, Any], optim: dict[str, Any], log: dict[str, Any]) -> None:
        """Starts writing; does nothing if `step` is there already."""
        items = {"model": ocp.args.StandardSave(model), "optim": ocp.args.StandardSave(optim)}
        self.manager.save(step, args=ocp.args.Composite(**items, log=ocp.args.JsonSave(log)))

    def restore(self, step: int, model: Any, optim: Any) -> tuple[Any, Any, dict[str, Any]]:
        """(model, optim, log) of `step`, in the shapes and shardings of the given `jax.ShapeDtypeStruct` trees."""
        items = {"model": ocp.args.StandardRestore(model), "optim": ocp.args.StandardRestore(optim)}
        restored = self.manager.restore(step, args=ocp.args.Composite(**items, log=ocp.args.JsonRestore()))
        return restored.model, restored.optim, restored.log

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self.manager.close()

    def wait(self) -> None:
        """Returns when everything is written."""
        self.manager.wait_until_finished()


def save_model(folder: Path, params: Any) -> None:
    """Writes `params` alone as the checkpoint of step 0 under `folder`."""
    model = {"params": params, "model_state": {}, "ema": {}}
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    # A file for each array: orbax's database of all of them takes twice their size in memory while it is written.
    handlers = {"model": ocp.StandardCheckpointHandler(use_ocdbt=False)}
    path = (folder / FOLDER).absolute()
    with contextlib.closing(ocp.CheckpointManager(path, options=options, item_handlers=handlers)) as manager:
        manager.save(0, args=ocp.args.Composite(model=ocp.args.StandardSave(model)))


def model_shapes(folder: Path) -> dict[str, Any]:
    """The newest checkpoint's `model` item under stage folder `folder`, as shapes; raises InputError if none."""
    with contextlib.closing(ocp.StandardCheckpointHandler()) as reader:
        arrays = reader.metadata(_newest(folder) / "model").tree
    return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), arrays)


def read_model(folder: Path) -> dict[str, Any]:
    """The newest checkpoint's `model` item under stage folder `folder`, as numpy arrays."""
    # Restoring into numpy asks nothing of the devices it was written on.
    target = jax.tree.map(lambda s: np.empty(s.shape, s.dtype), model_shapes(folder))
    with contextlib.closing(ocp.StandardCheckpointHandler()) as reader:
        return reader.restore(_newest(folder) / "model", args=ocp.args.StandardRestore(target))


def steps(folder: Path) -> list[int]:
    """The steps that stage folder `folder` has whole checkpoints of."""
    return sorted(ocp.utils.checkpoint_steps(folder / FOLDER)) if (folder / FOLDER).is_dir() else []


def _newest(folder: Path) -> epath.Path:
    found = steps(folder)
    if not found:
        raise InputError(f"{folder} has no checkpoint; point at the folder of a stage that was trained")
    return epath.Path(folder / FOLDER).absolute() / str(max(found))
