"""Where records come from: random access to labelled images, without decoding them."""

import bisect
import concurrent.futures
import functools
import glob
import itertools
import os
from typing import Any, Protocol

import msgpack
import numpy as np

from tinymim_jax.config import Data, InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
IDENTITY = ("source", "split", "path", "name", "num_examples", "per_class", "subset_seed")  # fields that choose records
DIGITS_SPLITS = {"train": slice(0, 1297), "test": slice(1297, 1797)}  # in order: other writers in the test split


class Source(Protocol):
    """A fixed sequence of labelled images; picklable, so that worker processes can read it."""

    classes: tuple[str, ...] | None
    """The names of the classes in the order of their labels, where they are known."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": encoded bytes or uint8 [H, W, 3], "label": int}; raises InputError on an unreadable record."""
        ...

    def describe(self, index: int) -> str:
        """What a person needs to find the record."""
        ...

    def labels(self) -> np.ndarray:
        """int64 [n]; may read every record."""
        ...


def open_source(data: Data) -> Source:
    """The records that `data` names, opened once; raises InputError if they are missing or not as many as promised."""
    return _open(*(getattr(data, field) for field in IDENTITY))


@functools.lru_cache(maxsize=8)
def _open(*identity: Any) -> Source:
    data = Data(**dict(zip(IDENTITY, identity, strict=True)))
    openers = {"digits": Digits, "folder": Folder, "tfds": Tfds, "array_record": ArrayRecord}
    if data.source not in openers:
        raise InputError(f"data.source: unknown choice {data.source!r}; choose one of {', '.join(openers)}")
    source: Source = openers[data.source](data)
    if data.per_class is not None:
        source = Subset(source, data.per_class, data.subset_seed)
    if len(source) == 0:
        raise InputError(f"data: split {data.split!r} of {data.source} holds no images; choose another data.split")
    if data.num_examples is not None and len(source) != data.num_examples:
        raise InputError(
            f"data.num_examples is {data.num_examples}, but split {data.split!r} of {data.path or data.source} has"
            f" {len(source)} images; correct it (none: count them) or complete the data"
        )
    return source


class Subset:
    """The same number of images of each class, in the order of `source`."""

    def __init__(self, source: Source, per_class: int, seed: int) -> None:
        if per_class < 1 or seed < 0:
            raise InputError(f"data: per_class {per_class} must be at least 1 and subset_seed {seed} at least 0")
        labels = source.labels()
        chosen = []
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            if len(members) < per_class:
                raise InputError(
                    f"data.per_class is {per_class}, but class {label} has {len(members)} images; use at most that"
                )
            rng = np.random.default_rng((seed, int(label)))
            chosen.append(rng.choice(members, per_class, replace=False))
        self._source, self.classes = source, source.classes
        self._indices = np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)
        self._labels = labels[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[int(self._indices[index])]

    def describe(self, index: int) -> str:
        return self._source.describe(int(self._indices[index]))

    def labels(self) -> np.ndarray:
        return self._labels


class Digits:
    """scikit-learn's 1,797 scanned digits, 8x8, as uint8 RGB."""

    classes = tuple("0123456789")

    def __init__(self, data: Data) -> None:
        from sklearn.datasets import load_digits

        if data.split not in DIGITS_SPLITS:
            raise InputError(f"data.split: unknown choice {data.split!r}; choose one of {', '.join(DIGITS_SPLITS)}")
        part, digits = DIGITS_SPLITS[data.split], load_digits()
        grey = np.round(digits.images[part] * (255 / 16)).astype(np.uint8)  # scans hold 0..16
        self._images = np.repeat(grey[..., None], 3, axis=-1)
        self._labels = digits.target[part].astype(np.int64)
        self._split = data.split

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index], "label": int(self._labels[index])}

    def describe(self, index: int) -> str:
        return f"image {index} of digits {self._split}"

    def labels(self) -> np.ndarray:
        return self._labels


class Folder:
    """An ImageFolder tree, `path/split/<class>/<image>`; classes are numbered in the order of their names."""

    def __init__(self, data: Data) -> None:
        if not data.path:
            raise InputError("data.path is empty; set it to the tree that holds SPLIT/<class>/*")
        self._root = os.path.join(os.path.expanduser(data.path), data.split)
        if not os.path.isdir(self._root):
            raise InputError(f"{self._root}: no such folder; set data.path and data.split to PATH/SPLIT/<class>/*")
        self.classes = tuple(e.name for e in _visible(self._root) if e.is_dir())
        if not self.classes:
            raise InputError(f"{self._root}: has no class folders; expected {self._root}/<class>/*.JPEG")
        self._files: list[str] = []
        counts = []
        for name in self.classes:
            entries = _visible(os.path.join(self._root, name))
            files = [f"{name}/{e.name}" for e in entries if e.name.lower().endswith(EXTENSIONS) and e.is_file()]
            if not files:
                raise InputError(
                    f"{os.path.join(self._root, name)}: a class folder without images; remove it or add images"
                    f" ({', '.join(EXTENSIONS)})"
                )
            self._files += files
            counts.append(len(files))
        self._labels = np.repeat(np.arange(len(counts)), counts)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            with open(self.describe(index), "rb") as file:
                image = file.read()
        except OSError as error:
            raise InputError(f"{self.describe(index)}: cannot be read ({error.strerror}); mend it") from error
        return {"image": image, "label": int(self._labels[index])}

    def describe(self, index: int) -> str:
        return os.path.join(self._root, self._files[index])

    def labels(self) -> np.ndarray:
        return self._labels


def _visible(folder: str) -> list[os.DirEntry]:
    """Entries in order of name, without hidden ones (macOS leaves `._name.jpg` files that are no images)."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


class Tfds:
    """A prepared TensorFlow dataset with features "image" and "label", read without TensorFlow."""

    classes = None  # known to the builder, in other names than a folder's

    def __init__(self, data: Data) -> None:
        self._data = data
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
                f"tfds {data.name!r}, split {data.split!r}: cannot be opened ({_one_line(error)}); check data.name,"
                f" data.split and data.path; prepare it once with: tfds build {data.name} --file_format=array_record,"
                " or use an ImageFolder tree (configs that read tfds take data=PATH)"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"_data": self._data}  # each process opens its own files

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        missing = {"image", "label"} - set(record)
        if missing:
            raise InputError(f"{self.describe(index)}: has no feature {missing.pop()!r}; it has {', '.join(record)}")
        return {"image": record["image"], "label": int(record["label"])}

    def describe(self, index: int) -> str:
        return f"record {index} of tfds {self._data.name}, split {self._data.split}"

    def labels(self) -> np.ndarray:
        return np.array([self[i]["label"] for i in range(len(self))], np.int64)


class ArrayRecord:
    """Shards `path/split*.array_record*` in order of name, each record as `encode_record` writes it."""

    classes = None

    def __init__(self, data: Data) -> None:
        from array_record.python import array_record_data_source as reader

        pattern = os.path.join(os.path.expanduser(data.path), f"{data.split}*.array_record*")
        self._files = sorted(glob.glob(pattern))
        if not self._files:
            raise InputError(f"{pattern}: no such files; set data.path and data.split to PATH/SPLIT*.array_record*")
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
        return decode_record(self._records[index], self.describe(index))

    def describe(self, index: int) -> str:
        shard = bisect.bisect_right(self._ends, index)
        start = self._ends[shard - 1] if shard else 0
        return f"{self._files[shard]} record {index - start}"

    def labels(self) -> np.ndarray:
        return np.array([self[i]["label"] for i in range(len(self))], np.int64)


def _count_records(file: str) -> int:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(file)
        count = reader.num_records()
        reader.close()
    except Exception as error:  # the C++ reader raises bare RuntimeErrors and the like
        raise InputError(f"{file}: not an array_record file ({_one_line(error)}); write it again") from error
    return count


def encode_record(image: bytes, label: int) -> bytes:
    """One record of an array_record shard: a msgpack map of the encoded image and its class."""
    return msgpack.packb({"image": image, "label": int(label)})


def decode_record(record: bytes, name: str = "record") -> dict[str, Any]:
    """The inverse of `encode_record`; raises InputError that begins with `name`."""
    try:
        fields = msgpack.unpackb(record)
        return {"image": bytes(fields["image"]), "label": int(fields["label"])}
    except Exception as error:  # arbitrary bytes fail in many ways
        raise InputError(
            f"{name}: not a msgpack map of image and label ({_one_line(error)}); write it with sources.encode_record"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
