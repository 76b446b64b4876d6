"""Any source -> ArrayRecord shards in one shuffled order, images no larger than wanted; a run that was killed goes on.

A shard gets its name when it is whole.
"""

import concurrent.futures
import contextlib
import dataclasses
import io
import itertools
import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Literal

import numpy as np
from etils.epath import Path
from PIL import Image

from tinymim_jax.data import manifest
from tinymim_jax.data.config import Data
from tinymim_jax.data.decode import decode, decode_mask, skipping
from tinymim_jax.data.manifest import Manifest, Settings, Shard
from tinymim_jax.data.rows import follow_parent
from tinymim_jax.data.shards import encode_record
from tinymim_jax.data.sources import Source, open_source
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.workdir_lock import WorkdirLock

WRITER = "group_size:1,uncompressed"  # each record for itself, as it will be read; JPEGs do not compress
POLL = 0.2  # seconds
JPEG_SIDE = 65_500  # pixels that libjpeg writes at most

OnBad = Literal["stop", "skip"]


def prepare(splits: list[Data], folder: Path, settings: Settings, workers: int, on_bad_image: OnBad = "stop") -> None:
    """Writes the shards of each of `splits` into `folder`, or those that are missing, with worker processes.

    Raises InputError if a source is missing, an image cannot be read (skip: it is left out, and the manifest says so),
    or `folder` holds something else.
    """
    storage.check_on_disk(folder, "shards")
    for one, other in itertools.combinations(splits, 2):
        if manifest.overlap(one.split, other.split):
            raise InputError(f"splits {one.split!r} and {other.split!r} would be read together; name another folder")
    packers = []
    for data in splits:
        source = open_source(data)
        found = manifest.new(data, source, settings)
        manifest.take_over(folder, found)
        packers.append(Packer(source, str(folder), found, settings, on_bad_image))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}); name another folder") from None
    with WorkdirLock(folder):
        for packer in packers:
            _pack(packer, folder, workers)
            print("; ".join([packer.manifest.summary(), *packer.source.notes]))


@dataclasses.dataclass(frozen=True)
class Packer:
    """Writes the shards of one split; sent to worker processes by pickle."""

    source: Source
    folder: str
    manifest: Manifest
    settings: Settings
    on_bad_image: OnBad = "stop"

    def __call__(self, shard: int, after_each: Callable[[], None] = lambda: None) -> Shard:
        """Writes shard number `shard`; raises InputError."""
        name = self.manifest.name(shard)
        partial = os.path.join(self.folder, f".{name}.partial")
        order = np.random.default_rng(self.settings.seed).permutation(len(self.source))
        chosen = np.array_split(order, self.manifest.num_shards)[shard].tolist()
        try:
            skipped = self._write(partial, chosen, after_each)
            size, checksum = os.path.getsize(partial), storage.sha256(Path(partial))
            os.replace(partial, os.path.join(self.folder, name))
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(partial)
        facts = {"records": len(chosen) - len(skipped), "bytes": size, "sha256": checksum}
        return facts | ({"skipped": skipped} if skipped else {})

    def _write(self, file: str, chosen: list[int], after_each: Callable[[], None]) -> list[str]:
        """Returns what is wrong with each image that was left out."""
        from array_record.python.array_record_module import ArrayRecordWriter

        skipped = []
        try:
            with contextlib.closing(ArrayRecordWriter(file, WRITER)) as writer:
                for index in chosen:
                    with skipping(self.on_bad_image, skipped.append):
                        writer.write(self._record(index))
                    after_each()
        except RuntimeError as error:  # of the writer, which is C++
            reason = " ".join(str(error).split())
            raise InputError(f"{file}: cannot be written ({reason}); make room or mend the storage") from error
        return skipped

    def _record(self, index: int) -> bytes:
        record, name = self.source[index], self.source.describe(index)
        mask = fit_mask(record, name, self.settings) if "mask" in record else None
        return encode_record(fit(record["image"], name, self.settings), record["label"], mask)


def fit(image: bytes | np.ndarray, name: str, settings: Settings) -> bytes:
    """The image encoded, its shorter side at most `settings.short_side`; its own bytes where it is that already.

    Arrays become PNGs, and what is made smaller JPEGs, or PNGs if it is longer than these can be. Raises InputError
    that begins with `name` if it cannot be decoded.
    """
    picture = decode(image, name)
    size = _fitted(picture.size, settings)
    if size == picture.size and isinstance(image, bytes):
        return image
    buffer, fitted = io.BytesIO(), picture.resize(size, Image.Resampling.BICUBIC)
    if size == picture.size or max(size) > JPEG_SIDE:
        fitted.save(buffer, "PNG")
    else:
        fitted.save(buffer, "JPEG", quality=settings.quality, subsampling=0)
    return buffer.getvalue()


def fit_mask(record: dict[str, Any], name: str, settings: Settings) -> bytes:
    """A record's mask, as large as `fit` makes its image, its values as they are: a PNG, or its own bytes.

    Raises InputError that begins with `name`.
    """
    values = decode_mask(record, name)
    size = _fitted(values.shape, settings)
    if size == values.shape and isinstance(record["mask"], bytes):
        return record["mask"]
    # The pixel in whose middle that of the new one lies.
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, values.shape, strict=True))
    buffer = io.BytesIO()
    Image.fromarray(values.take(rows, axis=0).take(columns, axis=1)).save(buffer, "PNG")
    return buffer.getvalue()


def _fitted(size: tuple[int, int], settings: Settings) -> tuple[int, int]:
    """Of which the shorter is at most `settings.short_side`."""
    scale = min(1, (settings.short_side or math.inf) / min(size))
    return round(size[0] * scale), round(size[1] * scale)


def _pack(packer: Packer, folder: Path, workers: int) -> None:
    """Makes the missing shards in worker processes, which end with it; the manifest is written after each."""
    made = packer.manifest
    for partial in storage.children(folder, f".{made.split}*.partial"):  # of a run that was killed
        partial.unlink()
    made.save(folder)
    if not (missing := made.missing()):
        return
    context = multiprocessing.get_context("spawn")
    packed, stop = context.Value("Q", made.images_done()), context.Event()
    pool = ProcessPoolExecutor(min(workers, len(missing)), context, _start_worker, (packer, packed, stop))
    try:
        with made.bar(packed.value) as bar:
            pending = {pool.submit(_work, shard): made.name(shard) for shard in missing}
            while pending:
                finished, _ = concurrent.futures.wait(pending, POLL, concurrent.futures.FIRST_COMPLETED)
                bar.update(packed.value - bar.n)
                for future in finished:
                    made.shards[pending.pop(future)] = future.result()
                if finished:
                    made.save(folder)
    except concurrent.futures.BrokenExecutor:
        raise InputError(
            "a worker process was ended from outside, perhaps for want of memory; run the same command again, with"
            " fewer --workers: whole shards are kept"
        ) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("whole shards are kept; the same command goes on") from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}  # of a worker process: what it packs


def _start_worker(packer: Packer, packed: Any, stop: Any) -> None:
    _worker.update(packer=packer, packed=packed, stop=stop)
    follow_parent()


def _work(shard: int) -> Shard:
    def after_each() -> None:
        with _worker["packed"].get_lock():
            _worker["packed"].value += 1
        if _worker["stop"].is_set():
            raise InputError("stopped")

    return _worker["packer"](shard, after_each)
