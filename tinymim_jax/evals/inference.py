"""A trained model in use: images as they come -> tokens, logits, features; folders of them -> tables."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from tinymim_jax.data import augment
from tinymim_jax.data.decode import decode
from tinymim_jax.data.device_augment import normalize, to_float
from tinymim_jax.evals import suite
from tinymim_jax.evals.contract import Batches, fetched
from tinymim_jax.evals.painting import WINDOWS, Painter
from tinymim_jax.models.contract import EncoderOutput, Pool
from tinymim_jax.runtime import sharding, storage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.progress_bar import bar

log = logging.getLogger(__name__)
AT_ONCE = 64  # images on the devices, if nothing else is said
PathLike = str | os.PathLike
OnBad = Literal["stop", "skip"]
Images = Any  # an image, or a list of them: a path, a PIL image, uint8 or float in [0, 1] [H, W, 3]; or [B, H, W, 3]


class TrainedModel:
    """An encoder that knows how its images are made and what its classes are called: what `tinymim_jax.load` gives.

    `module, variables = model` are Flax's own, for images that are normalised already. `data` says how `preprocess`
    makes images, `classes` names the logits in their order, where that is known, `block` is the one whose output are
    the features, if it is not the last, as distillation leaves some half trained, and `pool` the token that they are.
    """

    def __init__(self, subject: suite.Subject):
        self.config, self.classes = subject.model, subject.classes
        self._subject = subject
        self.data, self.block, self.pool = suite.pixels(subject), suite.features_block(subject), subject.pool
        self.module: nn.Module = subject.model.build()
        trained = {**subject.variables, "params": subject.variables["params"]["encoder"]}
        self.variables: dict[str, Any] = jax.tree.map(jnp.asarray, trained)
        self._apply = jax.jit(
            lambda v, x, capture: self.module.apply(v, self._normalized(x), capture=capture), static_argnums=2
        )

    def __getitem__(self, index: int) -> Any:
        """As the pair (module, variables), which it can be unpacked into."""
        return (self.module, self.variables)[index]

    def __call__(self, images: Images, capture: Sequence[int] = ()) -> EncoderOutput:
        """What the encoder makes of images of any size, in evaluation: tokens [B, N, D], logits [B, C] with a head.

        `trace[i]` has q, k, v, ... of each block i in `capture`, from 1. One program is compiled for each power of two
        of images, up to 64, and each `capture`. Raises InputError that names an image that cannot be read.
        """
        listed, capture = _listed(images), tuple(capture) if isinstance(capture, Sequence) else capture
        size = min(AT_ONCE, 1 << (len(listed) - 1).bit_length())
        starts = range(0, len(listed), size)
        parts = [self._batch(listed[i : i + size], i, size, capture) for i in starts]
        return parts[0] if len(parts) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

    def preprocess(self, images: Images) -> jax.Array:
        """float32 [B, S, S, 3], resized, cropped and normalised as in evaluation: what `module.apply` takes."""
        return self._normalized(self._pixels(_listed(images)))

    def masks(self, images: Images) -> list[np.ndarray]:
        """The class of each pixel of each image, uint8 [H, W] at the image's own size, by sliding windows.

        Raises InputError if the model has no head for pixels, and what `__call__` raises.
        """
        if self._subject.pixels is None:
            raise InputError("the model has no head for pixels: train one with task 'segment'")
        source = _Given([np.asarray(decode(*_at_hand(image, f"image {i}"))) for i, image in enumerate(_listed(images))])
        found = {name: classes for name, _, classes in self._painter(source, WINDOWS)}
        return [found[source.describe(i)] for i in range(len(source))]

    @functools.cached_property
    def _painter(self) -> Painter:
        return Painter(self._subject)

    def features(
        self, folder: PathLike, block: int | None = None, pool: Pool | None = None, **options: Any
    ) -> tuple[list[str], np.ndarray]:
        """The names of the images under `folder`, and their features, float32 [n, D].

        Without `block` and `pool`, those that probes and kNN read: the last tokens, or those of `self.block`. `block`
        takes tokens as they leave that block, before any norm; `pool` is the first token or the mean of the patches.
        """
        chosen = self.block if block is None else block
        outputs = functools.partial(self.config.outputs, block=chosen, pool=self.pool if pool is None else pool)
        return self.over_folder(folder, lambda *args: outputs(*args).features, "features", **options)

    def predictions(self, folder: PathLike, k: int = 5, **options: Any) -> tuple[list[str], Any]:
        """The names of the images under `folder`; the probabilities of the best k classes and these, [n, k] each."""
        if not self.config.num_classes:
            raise InputError("the model has no head, so it predicts nothing: fine-tune it, or take its features")

        def read(whole: Any, images: jax.Array) -> Any:
            probabilities = jax.nn.softmax(self.config.outputs(whole, images).logits.astype(jnp.float32))
            return jax.lax.top_k(probabilities, min(k, probabilities.shape[-1]))

        return self.over_folder(folder, read, "predictions", **options)

    def over_folder(
        self, folder: PathLike, read: Callable, title: str, batch_size: int = AT_ONCE, on_bad_image: OnBad = "stop"
    ) -> tuple[list[str], Any]:
        """Runs `read(variables, normalised images)` on all images under `folder`, on all devices, with a bar.

        Returns their names in it, in order, and what `read` gives as numpy, a row each. Raises InputError that names
        an image that cannot be decoded; with on_bad_image "skip" it is named in the log and left out.
        """
        data = dataclasses.replace(suite.in_folder(self.data, os.fspath(folder)), on_bad_image=on_bad_image)
        mesh = sharding.make_mesh()
        batches = Batches(data, batch_size, mesh, is_labelled=False)
        for note in batches.source.notes:
            log.warning("%s: %s", folder, note)
        whole = {**self.variables, "params": {"encoder": self.variables["params"]}}
        whole = jax.device_put(whole, sharding.replicated(mesh))

        @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
        def update(variables: Any, batch: Any) -> Any:
            return read(variables, self._normalized(batch["image"])), batch["is_valid"], batch["index"]

        with bar(title, len(batches), "batch", first="compiling", leave=False) as shown:
            found = fetched(functools.partial(update, whole), batches, shown.update)
        values, is_valid, index = jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)
        if count := len(batches.source) - int(is_valid.sum()):
            log.warning("%s: %d of %d images left out, which cannot be decoded", folder, count, len(batches.source))
        root = f"{storage.path(data.path)}/"
        names = [batches.source.describe(i).removeprefix(root) for i in index[is_valid].tolist()]
        return names, jax.tree.map(lambda rows: rows[is_valid], values)

    def _batch(self, images: Sequence[Any], start: int, size: int, capture: tuple[int, ...]) -> EncoderOutput:
        """Of up to `size` images, padded to that; numbered from `start`."""
        rows = self._pixels(images, start)
        padded = np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), np.uint8)])
        return jax.tree.map(lambda leaf: leaf[: len(rows)], self._apply(self.variables, padded, capture))

    def _normalized(self, pixels: jax.Array) -> jax.Array:
        return normalize(to_float(pixels), self.data.mean, self.data.std)

    def _pixels(self, images: Sequence[Any], start: int = 0) -> np.ndarray:
        """uint8 [B, S, S, 3]; images without a name are numbered from `start`."""
        return np.stack([self._one(image, f"image {start + i}") for i, image in enumerate(images)])

    def _one(self, image: Any, name: str) -> np.ndarray:
        return augment.load(*_at_hand(image, name), self.data, np.random.default_rng(0))


class _Given:
    """Images at hand as a source."""

    classes, notes = None, ()

    def __init__(self, images: Sequence[np.ndarray]):
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index], "label": -1}

    def describe(self, index: int) -> str:
        return f"image {index}"


def _at_hand(image: Any, name: str) -> tuple[Any, str]:
    """An image as it is decoded, and what it is called: a path by that, else `name`."""
    if isinstance(image, (str, os.PathLike)):
        return _read(image), str(image)
    if isinstance(image, np.ndarray) and jnp.issubdtype(image.dtype, jnp.floating):
        image = _eight_bit(image, name)
    return image, name


def _listed(images: Images) -> list[Any]:
    """One image an entry; raises InputError if there is none."""
    if isinstance(images, (str, os.PathLike, bytes, Image.Image)):
        return [images]
    if isinstance(images, (list, tuple)):
        listed = [one for entry in images for one in _listed(entry)]
    else:
        array = np.asarray(images)
        listed = list(array) if array.ndim == 4 else [array]
    if not listed:
        raise InputError("there are no images; give at least one")
    return listed


def _read(path: PathLike) -> bytes:
    file = storage.path(path)
    with storage.reading(str(path)):
        if file.exists():
            return file.read_bytes()
    raise InputError(f"{path}: there is no such file")


def _eight_bit(image: np.ndarray, name: str) -> np.ndarray:
    """[H, W, 3] in [0, 1] -> uint8, which a file would hold."""
    if image.size and not (image.min() >= 0 and image.max() <= 1):
        raise InputError(
            f"{name}: floats are RGB in [0, 1], and these reach from {image.min():.3g} to {image.max():.3g}; give 8-bit"
            " values, or normalised images to `module.apply` (module, variables = model)"
        )
    return np.round(255 * image.astype(np.float32)).astype(np.uint8)
