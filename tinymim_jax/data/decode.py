"""Encoded bytes -> an RGB image, or a mask of classes."""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from tinymim_jax.runtime.errors import InputError, Unavailable

Image.init()
# What Pillow reads, but for EPS (which would start Ghostscript), what it knows by name only, and headers that fit all.
NOT_READ = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5", "IMT", "IPTC", "SPIDER"}
FORMATS = [kind for kind in Image.ID if kind not in NOT_READ]
EXTENSIONS = {end for end, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO")}
SKIP = (
    "or leave such images out with on_bad_image=skip (in a run --config.stages.NAME.data.on_bad_image=skip, of an"
    " eval's images --config.stages.NAME.evals.NAME.data.on_bad_image=skip; elsewhere --on_bad_image=skip)"
)


@contextlib.contextmanager
def skipping(on_bad_image: str, note: Callable[[str], object] = lambda _: None) -> Iterator[None]:
    """Around what reads an image: raises InputError with its remedy, or with "skip" tells `note` what is wrong."""
    try:
        yield
    except Unavailable:
        raise  # no fault of this image
    except InputError as error:
        if on_bad_image == "stop":
            raise InputError(f"{error}, {SKIP}") from error
        note(str(error))


def decode(image: bytes | np.ndarray | Image.Image, name: str) -> Image.Image:
    """The image in RGB, whatever its file name or mode; raises InputError that begins with `name`."""
    if isinstance(image, np.ndarray):
        return _from_array(image, name)
    if isinstance(image, Image.Image):
        with _decoding(name):
            return _to_rgb(image)
    with _opened(image, name) as opened:
        return _to_rgb(opened)


def decode_mask(record: Mapping[str, Any], name: str) -> np.ndarray:
    """The values of a record's mask as they stand in the file, uint8 [H, W]: grey levels, or numbers in a palette.

    Raises InputError that begins with `name`, also where there is none, or it is of another size than the image.
    """
    mask = record.get("mask")
    if mask is None:
        raise InputError(f"{name}: has no mask; use images with masks (source pairs or scenes, or shards of such)")
    if not isinstance(mask, np.ndarray):
        with _opened(mask, f"{name}: its mask") as opened:
            mask = np.asarray(opened)
    values, size = _one_channel(mask, name), image_size(record["image"], name)
    if values.shape != size:
        ours, theirs = (f"{width} x {height}" for height, width in (size, values.shape))
        raise InputError(f"{name}: is {ours} pixels and its mask {theirs}; both must be of one size")
    return values


def image_size(image: bytes | np.ndarray | BinaryIO, name: str) -> tuple[int, int]:
    """(height, width) from the header alone; raises InputError that begins with `name`."""
    if isinstance(image, np.ndarray):
        return image.shape[:2]
    with _opened(image, name) as opened:
        return opened.height, opened.width


@contextlib.contextmanager
def _opened(image: bytes | BinaryIO, name: str) -> Iterator[Image.Image]:
    if image == b"":
        raise _undecodable(name, "no bytes")
    with _decoding(name), Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS) as it:
        yield it


@contextlib.contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError as error:
        raise _undecodable(name, "in none of the formats that Pillow reads") from error
    except Exception as error:  # damaged bytes raise OSError, SyntaxError, struct.error, DecompressionBombError...
        raise _undecodable(name, " ".join(str(error).split())) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which nobody says what is white")
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip at 255
        scaled = np.clip(np.asarray(image).astype(np.float32) / 257, 0, 255)
        image = Image.fromarray(np.round(scaled).astype(np.uint8))
    return image.convert("RGB")


def _from_array(image: np.ndarray, name: str) -> Image.Image:
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[-1] == 3)) or not image.size:
        raise InputError(f"{name}: an array {image.dtype}{list(image.shape)} is no image; give uint8[H, W, 3], RGB")
    return Image.fromarray(image).convert("RGB")


def _one_channel(values: np.ndarray, name: str) -> np.ndarray:
    if values.ndim == 3 and (values.shape[-1] == 1 or (values == values[..., :1]).all()):  # grey, written as colours
        values = values[..., 0]
    if values.ndim != 2:
        raise InputError(
            f"{name}: its mask is in colours ({values.dtype}{list(values.shape)}); save the number of each pixel's"
            " class, in one channel"
        )
    if values.dtype.kind not in "bui" or values.min(initial=0) < 0 or values.max(initial=0) > 255:
        raise InputError(f"{name}: its mask holds values that are not whole numbers from 0 to 255; save such")
    return values.astype(np.uint8, copy=False)


def _undecodable(name: str, reason: str) -> InputError:
    return InputError(f"{name}: cannot be decoded as an image ({reason}); remove or replace it")
