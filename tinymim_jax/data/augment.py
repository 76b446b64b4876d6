"""Crops and flips on the host; every draw comes from the generator that is passed in."""

import math

import numpy as np
from PIL import Image

from tinymim_jax.data import corruptions, fast_jpeg, randaugment
from tinymim_jax.data.config import Data
from tinymim_jax.data.decode import decode

CROP_ATTEMPTS = 10  # as torchvision


def load(image: bytes | np.ndarray | Image.Image, name: str, data: Data, rng: np.random.Generator) -> np.ndarray:
    """A record's image as `transform` makes it, uint8 [S, S, 3]; raises InputError that begins with `name`.

    With `data.fast_crop`, training crops of JPEGs show the same part, made by `fast_jpeg`.
    """
    is_fast = data.fast_crop and data.transform == "train" and isinstance(image, bytes)
    header = fast_jpeg.read_header(image) if is_fast else None
    if header is None:
        return transform(decode(image, name), data, rng)
    box = crop_box(header.width, header.height, data.crop_scale, data.crop_ratio, rng)
    pixels = fast_jpeg.crop(image, header, box, data.image_size, data.interpolation)
    if pixels is None:
        return _finish(_resized_part(decode(image, name), box, data), data, rng)
    if data.rand_augment:
        return _finish(Image.fromarray(pixels), data, rng)
    return mirrored(pixels) if rng.random() < data.hflip else pixels


def transform(image: Image.Image, data: Data, rng: np.random.Generator) -> np.ndarray:
    """What `data.transform` says: RGB image -> uint8 [S, S, 3]."""
    if data.transform == "eval":
        pixels = np.asarray(center_crop(image, data.image_size, data.crop_pct, data.interpolation, data.crop_mode))
        how = data.corruption, data.severity, rng, data.corruption_quality
        return corruptions.corrupt(pixels, *how) if data.corruption else pixels
    box = crop_box(image.width, image.height, data.crop_scale, data.crop_ratio, rng)
    return _finish(_resized_part(image, box, data), data, rng)


def _finish(image: Image.Image, data: Data, rng: np.random.Generator) -> np.ndarray:
    """What follows a training crop."""
    if rng.random() < data.hflip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if data.rand_augment:
        fill = tuple(min(255, round(255 * m)) for m in data.mean)
        image = randaugment.rand_augment(image, randaugment.parse(data.rand_augment), fill, rng)
    return np.asarray(image)


def _resized_part(image: Image.Image, box: fast_jpeg.Box, data: Data) -> Image.Image:
    left, top, width, height = box
    # Resizing with a box would let the kernel reach pixels outside it.
    image = image.crop((left, top, left + width, top + height))
    return image.resize((data.image_size, data.image_size), fast_jpeg.RESAMPLE[data.interpolation])


def crop_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> fast_jpeg.Box:
    """(left, top, width, height) in pixels: area uniform in `scale`, aspect (w / h) log-uniform in `ratio`.

    The algorithm is that of torchvision's RandomResizedCrop.
    """
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    # No draw fits a very long image: the largest central part with an allowed aspect.
    w = max(1, min(width, round(height * ratio[1])))
    h = max(1, min(height, round(width / ratio[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def center_crop(
    image: Image.Image, size: int, crop_pct: float, interpolation: str, mode: str = "center"
) -> Image.Image:
    """The shorter side becomes int(size / crop_pct), then the central `size` pixels a side (torchvision's rounding).

    With `mode` "squash" the longer side becomes as short.
    """
    shorter = int(size / crop_pct)
    if mode == "squash":
        resized = shorter, shorter
    elif image.width <= image.height:
        resized = shorter, int(shorter * image.height / image.width)
    else:
        resized = int(shorter * image.width / image.height), shorter
    image = image.resize(resized, fast_jpeg.RESAMPLE[interpolation])
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def mirrored(pixels: np.ndarray) -> np.ndarray:
    """[H, W, 3], left and right exchanged; colour by colour, which numpy copies four times as fast as pixels."""
    out = np.empty_like(pixels)
    for colour in range(pixels.shape[-1]):
        out[..., colour] = pixels[:, ::-1, colour]
    return out
