"""ArrayRecord shards of labelled images, as `prepare` writes them."""

import bisect
import concurrent.futures
import contextlib
import glob
import itertools
import json
from typing import Any

import msgpack
import numpy as np
from etils.epath import Path

from tinymim_jax.data.config import Data
from tinymim_jax.data.folder import names
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError


class ArrayRecord:
    """Shards `path/split*.array_record*` in order of name, each record as `encode_record` writes it."""

    def __init__(self, data: Data) -> None:
        from array_record.python import array_record_data_source as reader

        storage.check_on_disk(data.path, "array_record files")
        folder = storage.path(data.path)
        found = {name: storage.children(folder, f"{glob.escape(name)}*.array_record*") for name in names(data.split)}
        split = next(filter(found.get, found), None)
        if split is None:
            pattern = folder / f"{data.split}*.array_record*"
            raise InputError(f"{pattern}: no such files; set data.path and data.split to PATH/SPLIT*.array_record*")
        self.notes = () if split == data.split else (f"read from {folder / split}*",)
        self._files = [str(file) for file in found[split]]
        self.classes = _prepared_classes(folder / f"{split}.json", len(self._files))
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            counts = list(pool.map(_count_records, self._files))
        self._ends = list(itertools.accumulate(counts))
        # With its range given, a file is not opened a second time to be counted.
        self._records = reader.ArrayRecordDataSource(
            [f"{file}[0:{count}]" for file, count in zip(self._files, counts, strict=True)]
        )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        with storage.reading(self.describe(index)):
            record = self._records[index]
        return decode_record(record, self.describe(index))

    def describe(self, index: int) -> str:
        shard = bisect.bisect_right(self._ends, index)
        start = self._ends[shard - 1] if shard else 0
        return f"{self._files[shard]} record {index - start}"

    def labels(self) -> np.ndarray:
        return np.array([self[i]["label"] for i in range(len(self))], np.int64)


def _prepared_classes(file: Path, shards: int) -> tuple[str, ...] | None:
    """What the manifest that `prepare` writes knows, if there is one; raises InputError if it lists more shards."""
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text())
        expected, classes = manifest["num_shards"], manifest["classes"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file} is damaged; run the prepare command again") from None
    if shards < expected:
        raise InputError(f"{file}: {expected - shards} of {expected} shards are missing; run the prepare command again")
    return None if classes is None else tuple(classes)


def _count_records(file: str) -> int:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        with contextlib.closing(ArrayRecordReader(file)) as reader:
            return reader.num_records()
    except Exception as error:  # the C++ reader raises bare RuntimeErrors and the like
        raise InputError(f"{file}: not an array_record file ({storage.reason(error)}); write it again") from error


def encode_record(image: bytes, label: int, mask: bytes | None = None) -> bytes:
    """One record of an array_record shard: a msgpack map of the encoded image, its class and perhaps its mask."""
    return msgpack.packb({"image": image, "label": int(label)} | ({} if mask is None else {"mask": mask}))


def decode_record(record: bytes, name: str = "record") -> dict[str, Any]:
    """The inverse of `encode_record`; raises InputError that begins with `name`."""
    try:
        fields = msgpack.unpackb(record)
        mask = {"mask": bytes(fields["mask"])} if "mask" in fields else {}
        return {"image": bytes(fields["image"]), "label": int(fields["label"]), **mask}
    except Exception as error:  # arbitrary bytes fail in many ways
        raise InputError(
            f"{name}: not a msgpack map of image and label ({storage.reason(error)}); write it with"
            " shards.encode_record"
        ) from error
