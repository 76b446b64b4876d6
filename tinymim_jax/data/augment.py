"""Crops and flips on the host; every draw comes from the generator that is passed in."""

import math

import numpy as np
from PIL import Image

from tinymim_jax.config import Data, InputError
from tinymim_jax.data import corruptions, randaugment

RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
CROP_ATTEMPTS = 10  # as torchvision


def transform(image: Image.Image, data: Data, rng: np.random.Generator) -> np.ndarray:
    """What `data.transform` says: RGB image -> uint8 [S, S, 3]."""
    if data.transform == "eval":
        pixels = np.asarray(center_crop(image, data.image_size, data.crop_pct, data.interpolation))
        return corruptions.corrupt(pixels, data.corruption, data.severity, rng) if data.corruption else pixels
    image = random_resized_crop(image, data.image_size, data.crop_scale, data.crop_ratio, data.interpolation, rng)
    if rng.random() < data.hflip:
        image = hflip(image)
    if data.rand_augment:
        fill = tuple(min(255, round(255 * m)) for m in data.mean)
        image = randaugment.rand_augment(image, randaugment.parse(data.rand_augment), fill, rng)
    return np.asarray(image)


def random_resized_crop(
    image: Image.Image,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    interpolation: str,
    rng: np.random.Generator,
) -> Image.Image:
    """A random part of the image, resized to `size` pixels a side; the algorithm of torchvision."""
    left, top, width, height = crop_box(image.width, image.height, scale, ratio, rng)
    # Resizing with a box would let the kernel reach pixels outside it.
    image = image.crop((left, top, left + width, top + height))
    return image.resize((size, size), RESAMPLE[interpolation])


def crop_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(left, top, width, height) in pixels: area uniform in `scale`, aspect (w / h) log-uniform in `ratio`."""
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


def center_crop(image: Image.Image, size: int, crop_pct: float, interpolation: str) -> Image.Image:
    """The shorter side becomes int(size / crop_pct), then the central `size` pixels a side (torchvision's rounding)."""
    if not 0 < crop_pct <= 1:
        raise InputError(f"data.crop_pct is {crop_pct}; it must be above 0 and at most 1")
    shorter = int(size / crop_pct)
    if image.width <= image.height:
        resized = shorter, int(shorter * image.height / image.width)
    else:
        resized = int(shorter * image.width / image.height), shorter
    image = image.resize(resized, RESAMPLE[interpolation])
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def hflip(image: Image.Image) -> Image.Image:
    """Left and right exchanged."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
