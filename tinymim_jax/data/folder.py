"""ImageFolder trees: image files in a folder for each class, or without classes."""

import collections
import concurrent.futures
import hashlib
import itertools
import os
from typing import Any

import fsspec
import numpy as np

from tinymim_jax.data.config import Data
from tinymim_jax.data.decode import EXTENSIONS
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError

HELD_OUT = ("val", "test", "validation")  # what people call the split that is evaluated on
SPLITS = {"train", "training", "valid", "dev", "eval", *HELD_OUT}  # folders with such names are no classes

KINDS = 8  # of files that are left out, named


def names(split: str) -> tuple[str, ...]:
    """What `split` may be called where the data lies, its own name first."""
    return (split, *(name for name in HELD_OUT if split in HELD_OUT and name != split))


class Labelled:
    """What sources that know their labels without reading have in common."""

    _labels: np.ndarray
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self) -> np.ndarray:
        return self._labels


class Folder(Labelled):
    """The images below `path/split/<class>/`, classes numbered in the order of their names; or in `path/split/`.

    Without a `split`, they are all below `path`, unlabelled. Where `path` has no splits but these folders, each class
    is split by `held_out`; images without classes all train.
    """

    def __init__(self, data: Data) -> None:
        if not data.path:
            raise InputError("data.path is empty; set it to the tree that holds SPLIT/<class>/*")
        tree = storage.path(data.path)
        storage.check(tree)
        self._storage = storage.files(tree)
        split = next((name for name in names(data.split) if self._storage.isdir(str(tree / name))), None)
        if split is None and not self._storage.isdir(str(tree)):
            raise InputError(f"{tree}: no such folder; name a folder of images")
        self._root = str(tree if split is None else tree / split)
        top = entries(self._storage, self._root) if self._storage.isdir(self._root) else {}
        is_splittable = top and data.split in ("train", *HELD_OUT) and SPLITS.isdisjoint(name.lower() for name in top)
        if split is None and not is_splittable:
            raise InputError(f"{tree / data.split}: no such folder; the tree needs SPLIT/<class>/*, or classes alone")
        self.classes = tuple(name for name, is_folder in top.items() if is_folder)
        with concurrent.futures.ThreadPoolExecutor(16) as pool:  # a bucket takes its time for each
            walks = pool.map(lambda name: walk(self._storage, self._root, name), self.classes)
            files = dict(zip(self.classes, walks, strict=True))
        files[""] = [name for name, is_folder in top.items() if not is_folder]
        if not data.split:
            self.classes, files = (), {"": sorted(file for each in files.values() for file in each)}
        found = {name: [file for file in files[name] if is_image(file)] for name in self.classes or [""]}
        if empty := [name for name, each in found.items() if not each]:
            raise InputError(f"{os.path.join(self._root, empty[0])}: a folder without images; add some, or remove it")
        self.notes = (f"read from {self._root}",) if split not in (None, data.split) else ()
        if split is None:
            found = {name: self._of_split(data, each) for name, each in found.items()}
        self.notes += left_out(files, set(found))
        self._files = [file for each in found.values() for file in each]
        self._labels = np.repeat(np.arange(len(found)) if self.classes else -1, list(map(len, found.values())))

    def _of_split(self, data: Data, files: list[str]) -> list[str]:
        """Those of a class's files, or of all, that belong to `data.split` of a tree without splits."""
        if not self.classes and data.split != "train":
            raise InputError(
                f"{self._root} has neither splits nor classes: all of its images are split 'train'; to"
                " measure, put them into class folders"
            )
        if not self.classes:
            return files
        self.notes = (
            f"{self._root} is not split: its {len(self.classes)} folders are classes, and about {data.val_fraction:.0%}"
            " of each, by a hash of names (val_fraction, val_seed), are val, the rest train",
        )
        held = held_out(files, data.val_fraction, data.val_seed)
        return [file for file in files if (file in held) != (data.split == "train")]

    def __getitem__(self, index: int) -> dict[str, Any]:
        with storage.reading(self.describe(index)):
            image = self._storage.cat_file(self.describe(index))  # of a bucket, in one request; a path takes three
        return {"image": image, "label": int(self._labels[index])}

    def describe(self, index: int) -> str:
        return f"{self._root}/{self._files[index]}"


def entries(files: fsspec.AbstractFileSystem, folder: str) -> dict[str, bool]:
    """Whether each thing in `folder`, hidden folders apart, is a folder itself; raises InputError."""
    try:
        if "://" in folder:
            listed = files.ls(folder, detail=True)
            found = {entry["name"].rstrip("/"): entry["type"] == "directory" for entry in listed}
            # A bucket may list the folder too.
            found = {path.rsplit("/", 1)[-1]: kind for path, kind in found.items() if not folder.endswith(path)}
        else:
            with os.scandir(folder) as inside:  # asks no file what it is
                found = {e.name: e.is_dir() and not (e.is_symlink() and _is_loop(e.path)) for e in inside}
    except Exception as error:  # each bucket's library has its own
        raise InputError(f"{folder}: cannot be listed ({storage.reason(error)}); mend it") from error
    return {name: found[name] for name in sorted(found) if not (found[name] and _is_hidden(name))}


def walk(files: fsspec.AbstractFileSystem, root: str, folder: str = "") -> list[str]:
    """The files below a folder of `root`, in order, with their paths from there; raises InputError."""
    inside = f"{folder}/" if folder else ""
    each = [
        walk(files, root, inside + name) if is_folder else [inside + name]
        for name, is_folder in entries(files, f"{root}/{folder}" if folder else root).items()
    ]
    return sorted(itertools.chain(*each))


def held_out(files: list[str], fraction: float, seed: int) -> set[str]:
    """Those of a class's files that are kept from training: by a hash of each name, whatever else there is.

    But one file trains, and of more one at least lies on either side, unless `fraction` is 0 or 1.
    """
    place = {file: hashlib.sha256(f"{seed}/{file}".encode(errors="surrogateescape")).digest() for file in files}
    count = sum(int.from_bytes(digest[:8]) < fraction * 2**64 for digest in place.values())
    if 0 < fraction < 1:
        count = min(max(count, 1), len(files) - 1)
    return set(sorted(files, key=place.__getitem__)[:count])


def _is_loop(link: str) -> bool:
    """Whether it leads to a folder that it lies in."""
    target, above = (os.path.join(os.path.realpath(path), "") for path in (link, os.path.dirname(link)))
    return above.startswith(target)


def is_image(file: str) -> bool:
    """By its ending; hidden files are none."""
    return os.path.splitext(file)[1].lower() in EXTENSIONS and not _is_hidden(file)


def _is_hidden(file: str) -> bool:
    """As macOS' `._name.jpg`, which are no images."""
    return os.path.basename(file).startswith(".")


def _kind(file: str) -> str:
    return "hidden" if _is_hidden(file) else os.path.splitext(file)[1].lower() or "without an ending"


def left_out(files: dict[str, list[str]], found: set[str]) -> tuple[str, ...]:
    """A note of what is no image or, where there are class folders, lies beside these; () if there is nothing."""
    kinds = collections.Counter(
        "beside the class folders" if is_image(file) else _kind(file)
        for name, each in files.items()
        for file in each
        if name not in found or not is_image(file)
    )
    named = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(KINDS))
    files = f"{kinds.total()} file{'s' * (kinds.total() > 1)} left out"
    return (f"{files}: {named}{', ...' if len(kinds) > KINDS else ''}",) if kinds else ()
