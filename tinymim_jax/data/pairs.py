"""Images and their masks in parallel trees, as sets for segmentation are distributed."""

import collections
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import fsspec
import numpy as np

from tinymim_jax.data import class_list
from tinymim_jax.data.config import Data
from tinymim_jax.data.folder import HELD_OUT, SPLITS, Labelled, entries, held_out, is_image, left_out, names, walk
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError

IMAGES = ("images", "image", "imgs", "img")  # what people call the folder of images ...
MASKS = ("annotations", "masks", "labels", "annotation", "mask", "label", "gt")  # ... and of masks
# What the name of a mask may have behind that of its image.
SUFFIX = re.compile(r"[_.-](masks?|labels?|labelids|annotations?|annot|gt|seg|segmentation|l)$", re.IGNORECASE)


class Pairs(Labelled):
    """Images below one folder, and below another a mask for each, of the same name but for its ending and `SUFFIX`.

    Where `path` has no splits, its images are split by `held_out`; without a `split`, all of them are taken.
    """

    def __init__(self, data: Data) -> None:
        if not data.path:
            raise InputError("data.path is empty; set it to the tree that holds images and masks")
        path = storage.path(data.path)
        storage.check(path)
        self._storage, tree = storage.files(path), str(path)
        if not self._storage.isdir(tree):
            raise InputError(f"{tree}: no such folder; name a tree of images and masks")
        image_folder, mask_folder = _folders(self._storage, tree, data.split)
        self._roots = f"{tree}/{image_folder}", f"{tree}/{mask_folder}"
        self.classes, self.colours = class_list.read(self._storage, tree)
        images, masks = (self._walk(root) for root in self._roots)
        masks = self._matched(images, masks)
        if image_folder in IMAGES and data.split:
            images = self._of_split(data, images)
        elif data.split and data.split not in image_folder.split("/"):
            self.notes += (f"read from {self._roots[0]}",)
        self._files = [(image, masks[image]) for image in images]
        self._labels = np.full(len(images), -1, np.int64)

    def _walk(self, root: str) -> list[str]:
        files = walk(self._storage, root)
        found = [file for file in files if is_image(file)]
        if not found:
            raise InputError(f"{root}: a folder without images; add some, or remove it")
        self.notes += left_out({"": files}, {""})
        return found

    def _matched(self, images: list[str], masks: list[str]) -> dict[str, str]:
        """The mask of each image; raises InputError where there is none, or more than one."""
        image_root, mask_root = self._roots
        stems = collections.defaultdict(list)
        for image in images:
            stems[_stem(image)].append(image)
        for one, other, *_ in (alike for alike in stems.values() if len(alike) > 1):
            raise InputError(f"{image_root}/{one} and {other} would share a mask; remove or rename one")
        found = collections.defaultdict(list)
        for mask in masks:
            stem = _stem(mask)
            found[stem if stem in stems else SUFFIX.sub("", stem)].append(mask)
        if missing := [image for image in images if _stem(image) not in found]:
            raise InputError(
                f"{image_root}/{missing[0]}: has no mask {mask_root}/{_stem(missing[0])}.* ({len(missing)} of"
                f" {len(images)} images have none); add masks, or remove such images"
            )
        for image in images:
            if len(some := found[_stem(image)]) > 1:
                raise InputError(
                    f"{image_root}/{image}: two files may be its mask, {mask_root}/{some[0]} and {some[1]}; keep one"
                )
        if spare := [mask for stem, some in found.items() if stem not in stems for mask in some]:
            self.notes += (f"masks without an image left out: {len(spare)}, first {mask_root}/{spare[0]}",)
        return {image: found[_stem(image)][0] for image in images}

    def _of_split(self, data: Data, images: list[str]) -> list[str]:
        self.notes += (
            f"{self._roots[0]} is not split: about {data.val_fraction:.0%} of its images, by a hash of names"
            " (val_fraction, val_seed), are val, the rest train",
        )
        held = held_out(images, data.val_fraction, data.val_seed)
        return [image for image in images if (image in held) != (data.split == "train")]

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, mask = (self._read(f"{root}/{file}") for root, file in zip(self._roots, self._files[index], strict=True))
        return {"image": image, "mask": mask, "label": -1}

    def _read(self, file: str) -> bytes:
        with storage.reading(file):
            return self._storage.cat_file(file)

    def open_image(self, index: int) -> BinaryIO:
        """An image's file, for those who read no more than its header."""
        with storage.reading(self.describe(index)):
            return self._storage.open(self.describe(index), "rb")

    def describe(self, index: int) -> str:
        return f"{self._roots[0]}/{self._files[index][0]}"


def _folders(files: fsspec.AbstractFileSystem, tree: str, split: str) -> tuple[str, str]:
    """Where below `tree` the images of `split` and their masks lie; raises InputError."""
    for images, masks in _layouts(split):
        root = f"{tree}/{images}"
        if not files.isdir(root) or (images in IMAGES and not _is_whole(files, root, split)):
            continue
        found = [folder for folder in masks if files.isdir(f"{tree}/{folder}")]
        if len(found) > 1:
            raise InputError(f"{tree}: both {found[0]} and {found[1]} may hold the masks of {images}; keep one")
        if found:
            return images, found[0]
        raise InputError(f"{root}: there are no masks for it; put them into {tree}/{next(iter(masks))}")
    split = split or "SPLIT"
    raise InputError(
        f"{tree}: has no images with masks of split {split!r}; name a tree with images/{split} and annotations/{split},"
        f" {split}/images and {split}/masks, {split} and {split}annot, or images and masks"
    )


def _layouts(split: str) -> Iterator[tuple[str, Iterable[str]]]:
    """Where images may lie, and where their masks then may, from the tree."""
    for name in (*names(split), *["training"] * (split == "train")) if split else ():
        for images in IMAGES:
            yield f"{images}/{name}", [f"{masks}/{name}" for masks in MASKS]
            yield f"{name}/{images}", [f"{name}/{masks}" for masks in MASKS]
        yield name, [f"{name}{joint}{masks}" for masks in ("annot", *MASKS) for joint in ("", "_")]
    for images in IMAGES:
        yield images, MASKS


def _is_whole(files: fsspec.AbstractFileSystem, folder: str, split: str) -> bool:
    """Whether a folder of images is not split, so that `split` may be taken of it; without a split, all are."""
    if not split:
        return True
    return split in ("train", *HELD_OUT) and SPLITS.isdisjoint(name.lower() for name in entries(files, folder))


def _stem(file: str) -> str:
    return os.path.splitext(file)[0]
