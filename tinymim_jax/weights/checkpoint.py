"""Whole training states on disk, written asynchronously by orbax.

A checkpoint has the items `model` (params, model_state, ema), which later stages read, `optim` (opt_state, step), and
`log` (averages not yet written). The step is also the position in the data and, with the stage's seed and name, the
source of every random number.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils.epath import Path

from tinymim_jax.runtime import multihost, storage
from tinymim_jax.runtime.errors import InputError, Unavailable

FOLDER = "checkpoints"
DAMAGED = ".damaged"  # what a checkpoint's name ends in once it could not be read
REPLICA = "replica_"  # how the folder of a replica, in that of its stage, begins
SUMS = "sums"  # of the items, beside the log
ARRAYS = {".zarray": "zarr", "zarr.json": "zarr3"}  # the file that describes an array -> its format
BROKEN = ("DATA_LOSS", "OUT_OF_RANGE", "NOT_FOUND", "FAILED_PRECONDITION")  # tensorstore, of bytes that are bad or gone


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of one stage's folder."""

    def __init__(self, folder: Path, keep: int):
        # One process lists the folder: a network's file system may show others an older one.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, single_host_load_and_broadcast=True
        )
        self.folder, self.is_read_back = folder, False
        self.manager = ocp.CheckpointManager(storage.absolute(folder / FOLDER), options=options)

    def save(self, step: int, items: Mapping[str, Any], log: dict[str, Any]) -> None:
        """Starts writing; does nothing if `step` is there already. Raises InputError if an earlier one failed.

        The first is written to its end and read back. `items` are trees of arrays by name, `log` JSON types.
        """
        log = {**log, SUMS: {name: array_sums(item) for name, item in items.items()}}
        args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        with self._writing():
            is_new = self.manager.save(step, args=ocp.args.Composite(**args, log=ocp.args.JsonSave(log)))
        if is_new and not self.is_read_back:
            self.wait()
            self.is_read_back = True
            if (why := multihost.run_on_primary(lambda: fault(self.folder, step))) is not None:
                raise Unavailable(
                    f"{self.folder}: the checkpoint of step {step} is not what was written ({why}); mend the storage or"
                    " choose another --workdir, and run the same command again"
                )

    def __exit__(self, kind: type | None, *_: object) -> None:
        # Of two errors the first is the cause.
        with contextlib.suppress(InputError) if kind else contextlib.nullcontext(), self._writing():
            try:
                self.manager.wait_until_finished()
            finally:
                self.manager.close()  # which raises, too

    def wait(self) -> None:
        """Returns when everything is written; raises InputError if something could not be."""
        with self._writing():
            self.manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # no fault of the storage
        except Exception as error:  # tensorstore and orbax raise ValueError, OSError, RuntimeError and their own
            whole = steps(self.folder)
            kept = f"that of step {whole[-1]} is kept" if whole else "there is none before it"
            raise Unavailable(
                f"{self.folder}: a checkpoint could not be written ({storage.reason(error)}); {kept}: make room or mend"
                " the storage, and run the same command again"
            ) from error


def restore(folder: Path, step: int, targets: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The items `targets` and the log of the checkpoint of `step` under stage folder `folder`.

    Items come in the shapes and shardings of the given trees of `jax.ShapeDtypeStruct`. All processes must call it;
    raises InputError in all if it is damaged, or one cannot read it.
    """
    path = storage.absolute(folder / FOLDER) / str(step)

    def read() -> tuple[dict[str, Any], dict[str, Any]]:
        with reading(folder, step), contextlib.closing(ocp.StandardCheckpointHandler()) as reader:
            return {
                name: reader.restore(path / name, args=ocp.args.StandardRestore(target))
                for name, target in targets.items()
            }, _read_log(path)

    items, log = multihost.raise_everywhere(read)  # orbax' own would leave the others waiting
    saved = log.pop(SUMS, {})
    found = {name: array_sums(item) for name, item in items.items() if name in saved}

    def compare() -> None:
        with reading(folder, step):
            for name in found:
                _compare(found[name], saved[name])

    multihost.raise_everywhere(compare)  # of what each holds whole, each has read its own
    return items, log


def _read_log(path: Path) -> dict[str, Any]:
    with contextlib.closing(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(path / "log", args=ocp.args.JsonRestore())


@contextlib.contextmanager
def reading(folder: Path, step: int) -> Iterator[None]:
    """Turns what reading the checkpoint of `step` raises into an InputError if its files are at fault.

    Unavailable if the storage is; what is neither's, as of a changed library, is raised as it is.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # no fault of the file
    except Exception as error:  # any, as in writing
        if storage.blame(error) is None:
            if (why := fault(folder, step)) is None:
                raise
            raise InputError(f"{folder}: the checkpoint of step {step} is damaged ({why})") from None
        raise Unavailable(
            f"{folder}: the checkpoint of step {step} could not be read ({storage.reason(error)}); mend the storage,"
            " and run the same command again"
        ) from None


def fault(folder: Path, step: int) -> str | None:
    """What is wrong with the files of the checkpoint of `step`; None if they hold what was saved.

    It is tensorstore's verdict, on one array at a time: neither orbax nor a device has a part in it.
    """
    path = storage.absolute(folder / FOLDER) / str(step)
    if not path.exists():
        return None  # it was looked for in the wrong place
    try:
        log = json.loads((path / "log" / "metadata").read_text()) if (path / "log").exists() else {}
        for name, saved in log.get(SUMS, {"model": None}).items():  # older ones that were converted have no sums
            json.loads((path / name / "_METADATA").read_text())
            if (placed := path / name / "_sharding").exists():
                json.loads(placed.read_text())
            found = _stored_sums(path / name)
            if saved is not None and sorted(found) != sorted(saved):
                return "its values are not those that were saved"
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError) as error:
        return f"{type(error).__name__}: {error}"
    except ValueError as error:
        if not str(error).startswith(BROKEN):
            raise
        return storage.reason(error)
    return None


def _stored_sums(item: Path) -> list[int]:
    """`sums` of the arrays in an item's folder."""
    folder, found = f"{item}/", []
    where = folder if "://" in folder else {"driver": "file", "path": folder}
    is_database = (item / "manifest.ocdbt").exists()
    store = ts.KvStore.open({"driver": "ocdbt", "base": where} if is_database else where).result()
    for key in store.list().result():
        name, _, last = key.decode().rpartition("/")
        if last in ARRAYS:
            spec = {"driver": ARRAYS[last], "fill_missing_data_reads": False}
            array = ts.open(spec, kvstore=store / f"{name}/", open=True).result()
            found += [int(value) for value in sums(array.read().result())]
    return found


def set_aside(folder: Path, step: int) -> None:
    """Renames the checkpoint of `step`, so that it is neither read nor in the way."""
    path = Path(folder) / FOLDER / str(step)
    target = path.with_name(f"{step}{DAMAGED}")
    target.rmtree(missing_ok=True)
    path.rename(target)


def sums(tree: Any, xp: Any = np) -> list[Any]:
    """For each leaf, the sum of its values' bits as whole numbers, mod 2^32: the same however it is split."""

    def one(leaf: Any) -> Any:
        leaf = xp.asarray(leaf)
        kind = xp.dtype(f"uint{8 * leaf.dtype.itemsize}") if leaf.dtype != bool else None
        bits = leaf.astype(xp.uint32) if kind is None else leaf.view(kind)
        return xp.sum(bits, dtype=xp.uint32)

    return [one(leaf) for leaf in jax.tree.leaves(tree)]


@jax.jit
def _device_sums(tree: Any) -> list[jax.Array]:
    return sums(tree, jnp)  # in one program: several at once could wait for each other's processes


def array_sums(tree: Any) -> list[int]:
    """`sums` of arrays on devices, where they lie; those of one process on a CPU need no program."""
    on_host = jax.default_backend() == "cpu" and jax.process_count() == 1
    return [int(value) for value in (sums(tree) if on_host else jax.device_get(_device_sums(tree)))]


def _compare(found: list[Any], saved: list[int]) -> None:
    if [int(value) for value in found] != saved:
        raise ValueError("the values that were read are not those that were saved")


def save_model(folder: Path, params: Any, model_state: Any = None, ema: Any = None) -> None:
    """Writes what later stages read as the checkpoint of step 0 under `folder`; this process alone."""
    model = {"params": params, "model_state": model_state or {}, "ema": ema or {}}
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="convert")
    options = ocp.CheckpointManagerOptions(
        enable_async_checkpointing=False, multiprocessing_options=alone, create=False
    )
    # A file for each array: orbax's database of all of them takes twice their size in memory while it is written.
    handlers = {"model": ocp.StandardCheckpointHandler(use_ocdbt=False), "log": ocp.JsonCheckpointHandler()}
    log = ocp.args.JsonSave({SUMS: {"model": [int(value) for value in sums(model)]}})
    path = storage.absolute(folder / FOLDER)
    storage.make(path)
    with contextlib.closing(ocp.CheckpointManager(path, options=options, item_handlers=handlers)) as manager:
        manager.save(0, args=ocp.args.Composite(model=ocp.args.StandardSave(model), log=log))


def model_shapes(folder: Path) -> dict[str, Any]:
    """The newest checkpoint's `model` item under stage folder `folder`, as shapes; raises InputError if none."""
    with contextlib.closing(ocp.StandardCheckpointHandler()) as reader:
        arrays = reader.metadata(_newest(folder) / "model").tree
    return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), arrays)


def read_model(folder: Path) -> dict[str, Any]:
    """The newest checkpoint's `model` item under stage folder `folder`, as numpy arrays; InputError if damaged."""
    path = _newest(folder)
    try:
        with reading(folder, int(path.name)), contextlib.closing(ocp.StandardCheckpointHandler()) as reader:
            # Restoring into numpy asks nothing of the devices it was written on.
            target = jax.tree.map(lambda s: np.empty(s.shape, s.dtype), model_shapes(folder))
            model = reader.restore(path / "model", args=ocp.args.StandardRestore(target))
            log = _read_log(path) if (path / "log").exists() else {}  # older ones that were converted have none
            if (saved := log.get(SUMS, {}).get("model")) is not None:
                _compare(sums(model), saved)
            return model
    except Unavailable:
        raise
    except InputError as error:
        # Only the newest will do; a replica is made anew by its stage.
        done = stage_folder(folder) / "DONE"
        raise InputError(f"{error}; make it again: without {done} its stage goes on from an older one") from None


def stage_folder(folder: Path) -> Path:
    """The stage's folder, of a stage's or of one of its replicas'."""
    return folder.parent if folder.name.startswith(REPLICA) else folder


def steps(folder: Path) -> list[int]:
    """The steps that stage folder `folder` has whole checkpoints of."""
    return sorted(ocp.utils.checkpoint_steps(folder / FOLDER)) if (folder / FOLDER).is_dir() else []


def _newest(folder: Path) -> Path:
    found = steps(folder)
    if not found:
        raise InputError(f"{folder} has no checkpoint; point at the folder of a stage that was trained")
    return storage.absolute(folder / FOLDER) / str(max(found))
