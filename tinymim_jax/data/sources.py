"""Where records come from: random access to labelled images, without decoding them."""

import functools
import os
from typing import Any, Protocol

import numpy as np

from tinymim_jax.data.config import Data
from tinymim_jax.data.digits import Digits, Scenes
from tinymim_jax.data.folder import Folder, Labelled
from tinymim_jax.data.pairs import Pairs
from tinymim_jax.data.shards import ArrayRecord
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError

# The fields of `Data` that choose records.
IDENTITY = ("source", "split", "path", "name", "num_examples", "per_class", "subset_seed", "val_fraction", "val_seed")
MASK_FEATURES = ("mask", "annotation", "segmentation_mask")  # what tfds' builders call it


class Source(Protocol):
    """A fixed sequence of labelled images; picklable, so that worker processes can read it."""

    classes: tuple[str, ...] | None
    """The names of the classes of images, or of pixels, in the order of their numbers; None: not known; (): none."""

    notes: tuple[str, ...]
    """What a person should know of how it was found."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": encoded bytes or uint8 [H, W, 3], "label": int}, -1 where there is none.

        Where images have masks, also "mask": encoded bytes, or an array [H, W] or [H, W, 1] of classes. Raises
        InputError on an unreadable record.
        """
        ...

    def describe(self, index: int) -> str:
        """What a person needs to find the record."""
        ...

    def labels(self) -> np.ndarray:
        """int64 [n]; may read every record."""
        ...


def open_source(data: Data) -> Source:
    """The records that `data` names, opened once.

    Raises InputError if they are missing, or neither as many nor of as many classes as promised.
    """
    source = _open(*identity(data))
    if data.masks is not None and source.classes and len(source.classes) != data.masks.num_classes:
        raise InputError(
            f"data.masks.num_classes is {data.masks.num_classes}, and {data.path or data.source} names"
            f" {len(source.classes)} classes; correct either"
        )
    return source


def identity(data: Data) -> tuple[Any, ...]:
    """The values of the fields that choose records; hashable, unlike `data`."""
    return tuple(getattr(data, field) for field in IDENTITY)


@functools.lru_cache(maxsize=8)
def _open(*values: Any) -> Source:
    data = Data(**dict(zip(IDENTITY, values, strict=True)))
    openers = {
        "digits": Digits, "folder": Folder, "tfds": Tfds, "array_record": ArrayRecord, "pairs": Pairs, "scenes": Scenes
    }  # fmt: skip
    source: Source = openers[data.source](data)
    if data.per_class is not None:
        source = of_each_class(source, data.per_class, data.subset_seed or 0)
    if len(source) == 0:
        raise InputError(f"data: split {data.split!r} of {data.source} holds no images; choose another data.split")
    if data.num_examples is not None and len(source) != data.num_examples:
        raise InputError(
            f"data.num_examples is {data.num_examples}, but split {data.split!r} of {data.path or data.source} has"
            f" {len(source)} images; correct it (none: count them) or complete the data"
        )
    return source


def need_labels(source: Source) -> None:
    """Raises InputError if the images have no classes."""
    labels = source.labels() if isinstance(source, Labelled) else [source[0]["label"]]
    if source.classes == () or labels[0] < 0:
        raise InputError(f"{source.describe(0)} and the others have no classes; sort them into class folders")


def check_same_classes(*pair: Data) -> None:
    """Raises InputError if two sets differ in the names of their classes, as far as they have any."""
    first, second = (open_source(data).classes for data in pair)
    if first is not None and second is not None and (odd := sorted(set(first) ^ set(second))):
        where = " and ".join(f"{data.path}/{data.split}" for data in pair)
        raise InputError(f"data: {where} differ in their classes ({odd[0]}); both need the same")


class Chosen:
    """Some records of `source`, by their numbers."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self._source, self._indices = source, indices
        self.classes, self.notes = source.classes, source.notes

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[int(self._indices[index])]

    def describe(self, index: int) -> str:
        return self._source.describe(int(self._indices[index]))

    def labels(self) -> np.ndarray:
        return self._source.labels()[self._indices]


def of_each_class(source: Source, count: int, seed: int) -> Chosen:
    """The same number of images of each class, in the order of `source`; raises InputError if there are fewer."""
    need_labels(source)
    labels, chosen = source.labels(), [np.zeros(0, np.int64)]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < count:
            raise InputError(
                f"data.per_class is {count}, but class {label} has {len(members)} images; use at most that"
            )
        chosen.append(np.random.default_rng((seed, int(label))).choice(members, count, replace=False))
    return Chosen(source, np.sort(np.concatenate(chosen)))


class Tfds:
    """A prepared TensorFlow dataset with features "image" and "label" or a mask, read without TensorFlow."""

    classes = None  # known to the builder, in other names than a folder's
    notes = ()

    def __init__(self, data: Data) -> None:
        self._data = data
        storage.check_on_disk(data.path, "tfds' files")
        len(self._records)  # opens: missing data is reported here, not in a worker

    @functools.cached_property
    def _records(self) -> Any:
        import tensorflow_datasets as tfds

        data = self._data
        try:
            return tfds.data_source(
                data.name,
                split=data.split,
                data_dir=os.path.expanduser(data.path) if data.path else None,
                download=False,
                decoders={"image": tfds.decode.SkipDecoding()},
            )
        except Exception as error:  # tfds has no common error: assertions, KeyError, NotImplementedError, OSError
            raise InputError(
                f"tfds {data.name!r}, split {data.split!r}: cannot be opened ({storage.reason(error)}); check"
                f" data.name, data.split and data.path; prepare it once with: tfds build {data.name}"
                " --file_format=array_record, or use an ImageFolder tree (configs that read tfds take data=PATH)"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"_data": self._data}  # each process opens its own files

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with storage.reading(self.describe(index)):
            record = self._records[index]
        mask = next((record[name] for name in MASK_FEATURES if name in record), None)
        needed = {"image"} if mask is not None else {"image", "label"}
        if missing := needed - set(record):
            raise InputError(f"{self.describe(index)}: has no feature {missing.pop()!r}; it has {', '.join(record)}")
        found = {"image": record["image"], "label": int(record.get("label", -1))}
        return found if mask is None else {**found, "mask": mask}

    def describe(self, index: int) -> str:
        return f"record {index} of tfds {self._data.name}, split {self._data.split}"

    def labels(self) -> np.ndarray:
        return np.array([self[i]["label"] for i in range(len(self))], np.int64)
