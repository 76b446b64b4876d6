"""What a model of pixels makes of a folder of images: the class of each pixel, as pictures."""

import collections
import contextlib
import dataclasses
import functools
import io
import logging
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils.epath import Path
from PIL import Image

from tinymim_jax.data import class_list, dense, sources
from tinymim_jax.data.decode import decode, image_size
from tinymim_jax.evals.contract import Batch
from tinymim_jax.evals.segmentation import by_windows, painted, window_logits
from tinymim_jax.evals.suite import Subject, in_folder, pixels
from tinymim_jax.runtime import sharding, storage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.metric_log import write_whole
from tinymim_jax.runtime.progress_bar import bar

log = logging.getLogger(__name__)
OVERLAY = 0.5  # share of the colours over the image
WINDOWS = 8  # at once, if nothing else is said


class Unmasked(sources.Chosen):
    """Some records of a source, with masks in which no pixel counts."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = super().__getitem__(index)
        size = image_size(record["image"], self.describe(index))
        return {**record, "mask": np.full(size, dense.IGNORED, np.uint8)}


class Painter:
    """The class of each pixel of images of any size, by sliding windows as in evaluation; compiled once for each number
    of windows and each size, in steps of 128 pixels, of the largest image.
    """

    def __init__(self, subject: Subject):
        own = subject.training or pixels(subject)
        self.data, self.mesh = dataclasses.replace(own, transform="eval"), sharding.make_mesh()
        everywhere, side = sharding.replicated(self.mesh), self.data.image_size

        @functools.partial(jax.jit, out_shardings=everywhere)
        def update(variables: Any, batch: Batch) -> jax.Array:
            logits = window_logits(functools.partial(subject.pixels, variables, {}), batch, False)
            return jax.vmap(lambda own, row: painted(own, row, side))(logits, batch)

        self._update = functools.partial(update, jax.device_put(subject.variables, everywhere))

    def __call__(
        self, source: sources.Source, windows: int, on_bad_image: str = "stop", title: str = ""
    ) -> Iterator[tuple[str, dict[str, Any], np.ndarray]]:
        """What a source calls each of its images, its record and its classes, uint8 [H, W], by number of windows.

        `windows` are seen at once, `title` is that of a bar. Raises InputError that names an image that cannot be
        decoded, or with on_bad_image "skip" leaves it out.
        """
        data = dataclasses.replace(self.data, on_bad_image=on_bad_image)
        passes = by_windows(data, Unmasked(source, np.arange(len(source))), windows, self.mesh).values()
        with bar(title, sum(map(len, passes)), "batch", first="compiling", leave=False, disable=not title) as shown:
            for batches in passes:
                for batch in batches:
                    for index, classes in _cropped(batch, self._update(batch)):
                        yield batches.source.describe(index), batches.source[index], classes
                    shown.update()


def check_out(out: Path, folder: Path) -> None:
    """Raises InputError if `out` is no folder, or pictures in it would lie among the images in `folder`."""
    if out.is_file():
        raise InputError(f"--out={out} is a file; name a folder")
    if storage.absolute(folder) in (storage.absolute(out), *storage.absolute(out).parents):
        raise InputError(f"--out={out} lies in the folder of the images; name another one")


def paint(subject: Subject, folder: Path, out: Path, windows: int, on_bad_image: str = "stop") -> int:
    """Writes, of each image under `folder`, OUT/NAME.png, whose values are classes, and OUT/NAME_over.jpg.

    The first has the colours of the classes as its palette, the second lies over the image. Returns how many there
    are. Raises InputError that names an image that cannot be decoded, or with on_bad_image "skip" leaves it out, and
    if a picture would take the place of another one.
    """
    painter = Painter(subject)
    data = in_folder(painter.data, os.fspath(folder))
    source = sources.open_source(data)
    for note in source.notes:
        log.warning("%s: %s", folder, note)
    root = f"{storage.path(data.path)}/"
    names = [Path(source.describe(i).removeprefix(root)).with_suffix("") for i in range(len(source))]
    if twice := [name for name, count in collections.Counter(names).items() if count > 1]:
        raise InputError(f"{folder}: two images are called {twice[0]}; rename one, as both would become {twice[0]}.png")
    palette = class_list.palette(data.masks.num_classes)
    if subject.training:
        with contextlib.suppress(InputError):  # the data that it was trained on need not be at hand
            palette = class_list.colours(sources.open_source(subject.training), len(palette))
    done = 0
    for name, record, classes in painter(source, windows, on_bad_image, "predictions"):
        _save(out / name.removeprefix(root), classes, decode(record["image"], name), palette)
        done += 1
    return done


def _cropped(batch: Batch, painted: jax.Array) -> Iterator[tuple[int, np.ndarray]]:
    """The numbers of the images that could be read, and their classes at the original size."""
    found, sizes, index, is_valid = jax.device_get([painted, batch["original"], batch["index"], batch["is_valid"]])
    for row in np.flatnonzero(is_valid):
        yield int(index[row]), found[row, : sizes[row, 0], : sizes[row, 1]]


def _save(file: Path, classes: np.ndarray, image: Image.Image, palette: np.ndarray) -> None:
    storage.make(file.parent)
    mask = Image.fromarray(classes)
    mask.putpalette(palette.tobytes())
    over = Image.blend(image, mask.convert("RGB"), OVERLAY)
    for picture, suffix, kind in ((mask, ".png", "PNG"), (over, "_over.jpg", "JPEG")):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        write_whole(file.with_name(file.stem + suffix), buffer.getvalue())
