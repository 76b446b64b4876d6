"""Other people's weights -> a folder that every later stage, `load` and `inspect` read like a finished stage's."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path

from tinymim_jax.bridge import files, formats, hiera, layout
from tinymim_jax.bridge.layout import Layout, Told
from tinymim_jax.experiment import config, stage_file
from tinymim_jax.models.contract import Encoder
from tinymim_jax.runtime import codec, storage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import Context
from tinymim_jax.weights import checkpoint
from tinymim_jax.weights.parameters import flatten, matches, unflatten


@dataclasses.dataclass
class Converted:
    """Our parameters, and how they came about."""

    source: files.Source
    layout: Layout
    params: dict[str, Any]  # nested, numpy: encoder, and under pretext a decoder, or a pyramid and heads for pixels
    state: dict[str, Any] = dataclasses.field(default_factory=dict)  # batch_stats of these heads

    @property
    def untrained(self) -> list[str]:
        """The parameters that the source's own training left as they were."""
        return [key for key in flatten(self.params) if matches(self.layout.untrained, key)]

    def lines(self) -> list[str]:
        """The report: what it is, what was inferred, and where each tensor went."""
        m, d = self.layout.model, self.layout.decoder
        text = [
            f"{self.source.path}: {self.layout.kind}",
            f"model: {m.summary()}",
        ]
        if self.layout.task:
            text.append(self.layout.task.summary())
        else:
            text.append(f"decoder: width {d.width}, {d.depth} blocks" if d else "no decoder: it cannot reconstruct")
        text += [f"note: {note}" for note in self.layout.notes]
        size = sum(array.size for array in self.layout.arrays.values())
        text.append(f"weights: {len(self.layout.arrays)} tensors, {size:,} parameters")
        for why in dict.fromkeys(self.layout.ignored.values()):
            keys = [key for key, reason in self.layout.ignored.items() if reason == why]
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            text.append(f"ignored, {why}: {', '.join(keys[:4])}{more}")
        return [files.printable(line) for line in [*text, f"licence: {self.layout.licence}"]]


def read(path: Path, told: Told | None = None) -> Converted:
    """The checkpoint at `path` in our layout; raises InputError on anything that is not fully understood."""
    told = told or Told()
    try:
        source = files.read(path, told.ema)
        arrays = files.check_values(source, told.half)
        found = (hiera if hiera.is_one(source, arrays) else layout).understand(source, arrays, told)
        params = _to_ours(found)
        stats = params.pop("batch_stats", None)
        return Converted(source, found, params, {"batch_stats": stats} if stats else {})
    except InputError as error:
        text = files.printable(str(error))
        raise InputError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def _to_ours(found: Layout) -> dict[str, Any]:
    """Our tree; raises InputError unless its keys and the tensors' are the same and fit."""
    left = dict(found.arrays)
    params, bins = {}, formats.bins_of(found.task)
    for key, leaf in flatten(shapes(found.model, found.decoder, found.task, found.masks)).items():
        name = formats.mae_name(key, bins)
        if name not in left:
            raise InputError(f"there is no {name}, which a {found.kind} checkpoint has")
        expected = formats.to_mae(key, np.broadcast_to(np.float32(0), leaf.shape)).shape
        if left[name].shape != expected:
            raise InputError(f"{name} has shape {list(left[name].shape)}, expected {list(expected)}")
        params[key] = formats.from_mae(key, left.pop(name), leaf.shape)
    if left:
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise InputError(
            f"{next(iter(left))}{more} has no place in a {found.kind} checkpoint: another architecture, which cannot be"
            " converted"
        )
    return unflatten(params)


def shapes(
    model: Encoder, decoder: config.Decoder | None, task: config.Task | None = None, masks: config.Masks | None = None
) -> dict[str, Any]:
    """The parameter tree of a model with or without a decoder, as shapes; of one that segments with batch_stats."""
    if task is not None:
        context = Context(model, config.Data("pairs", image_size=model.image_size, masks=masks))
        batch = {"image": jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.uint8)}
        variables = dict(jax.eval_shape(task.build(context).init, jax.random.key(0), batch)[0])
        tree = flatten({**variables.pop("params"), **variables})
        return unflatten({key: leaf for key, leaf in tree.items() if not key.endswith("/count")})  # of a training batch

    def init(key: jax.Array, images: jax.Array, restore: jax.Array) -> dict[str, Any]:
        out, encoder = model.build().init_with_output(key, images)
        if decoder is None:
            return {"encoder": encoder["params"]}
        found = decoder.build(model).init(key, out.tokens, restore)
        return {"encoder": encoder["params"], "pretext": {"decoder": found["params"]}}

    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    return jax.eval_shape(init, jax.random.key(0), images, jax.ShapeDtypeStruct((1, model.grid**2), jnp.int32))


def names(model: Encoder) -> list[str]:
    """Every parameter of an encoder."""
    return list(flatten(shapes(model, None)))


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `folder` when the block ends well and vanishes otherwise.

    Raises InputError if `folder` exists or cannot be made.
    """
    if folder.exists():
        raise InputError(f"{folder} exists; name another folder, or delete it")
    made = list(itertools.takewhile(lambda parent: not parent.exists(), folder.parents))
    try:
        storage.make(folder.parent)
        partial = folder.with_name(f"{folder.name}.partial.{uuid.uuid4().hex}")
        storage.make(partial)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({storage.reason(error)}); name another folder") from None
    try:
        yield partial
        partial.rename(folder)
    except BaseException:
        Path(partial).rmtree(missing_ok=True)
        for parent in made:
            with contextlib.suppress(OSError, ValueError):  # someone else has put something there
                parent.rmdir()
        raise


def write(make: Callable[[], Converted], folder: Path) -> None:
    """Writes what `make` gives into the new `folder`, as of a finished stage of no steps; raises as `new_folder`."""
    with new_folder(folder) as partial:
        converted = make()
        checkpoint.save_model(partial, converted.params, converted.state)
        (partial / "stage.json").write_text(json.dumps(describe(converted), indent=2) + "\n")
    # Only after all else, as a bucket renames a folder file by file.
    (folder / "DONE").write_text(json.dumps({"step": 0, "metrics": {}}) + "\n")


def check_same(path: Path, folder: Path) -> None:
    """Raises InputError if `folder` was converted from another file than `path` is now; if it is gone, that is fine."""
    source = stage_file.read(folder).get("converted", {}).get("source")
    try:
        found = tuple((file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files.locate(path)[1])
    except (InputError, OSError):
        return
    # Another seed's checkpoint has the same size.
    if source and (sum(size for _, size, _ in found) != source["bytes"] or _sha256(found) != source["sha256"]):
        raise InputError(
            f"{folder} was converted from another file than {path}; delete it to convert again, or rename the file"
        )


@functools.lru_cache
def _sha256(found: tuple[tuple[Path, int, int], ...]) -> str:
    return storage.sha256(*(file for file, _, _ in found))


def describe(converted: Converted) -> dict[str, Any]:
    """The contents of stage.json."""
    found, weights = converted.layout, files.locate(converted.source.path)[1]
    facts = {
        "model": codec.to_dict(found.model),
        "decoder": codec.to_dict(found.decoder),
        "norm_pix_loss": found.norm_pix_loss,
        "task": codec.to_dict(found.task),
        "masks": codec.to_dict(found.masks),
        "preprocessing": found.preprocessing,
        "preprocessing_is_stated": found.is_stated,
        "source": {
            "file": str(converted.source.path),
            "bytes": sum(os.stat(file).st_size for file in weights),
            "sha256": storage.sha256(*weights),
            "kind": found.kind,
            "licence": found.licence,
            "made_from": found.made_from,
            "notes": found.notes,
            "ignored": found.ignored,
        },
    }
    versions = {name: version(name) for name in ("jax", "flax", "orbax-checkpoint")}
    told = {"converted": facts, "untrained": converted.untrained, "classes": found.classes}
    return {"format": stage_file.FORMAT, **told, "versions": versions}
