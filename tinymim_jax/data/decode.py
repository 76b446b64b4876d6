"""Encoded bytes -> an RGB image."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from tinymim_jax.runtime.errors import InputError

Image.init()
# What Pillow reads, but for EPS (which would start Ghostscript), what it knows by name only, and headers that fit all.
NOT_READ = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5", "IMT", "IPTC", "SPIDER"}
FORMATS = [kind for kind in Image.ID if kind not in NOT_READ]
EXTENSIONS = {end for end, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO")}
SKIP = (
    "or leave such images out with on_bad_image=skip (in a run --config.stages.NAME.data.on_bad_image=skip, of an"
    " eval's images --config.stages.NAME.evals.NAME.data.on_bad_image=skip; elsewhere --on_bad_image=skip)"
)


def decode(image: bytes | np.ndarray | Image.Image, name: str) -> Image.Image:
    """The image in RGB, whatever its file name or mode; raises InputError that begins with `name`."""
    if isinstance(image, np.ndarray):
        return _from_array(image, name)
    try:
        if isinstance(image, Image.Image):
            return _to_rgb(image)
        with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
            return _to_rgb(opened)
    except UnidentifiedImageError as error:
        reason = "in none of the formats that Pillow reads" if image else "no bytes"
        raise _undecodable(name, reason) from error
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


def _undecodable(name: str, reason: str) -> InputError:
    return InputError(f"{name}: cannot be decoded as an image ({reason}); remove or replace it")
