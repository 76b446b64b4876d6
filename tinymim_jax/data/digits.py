"""Embedded data: scikit-learn's scanned digits, and scenes made of them."""

from typing import Any

import numpy as np
from PIL import Image

from tinymim_jax.data.config import Data
from tinymim_jax.data.folder import Labelled
from tinymim_jax.runtime.errors import InputError

SPLITS = {"train": slice(0, 1297), "test": slice(1297, 1797)}  # in order: other writers in the test split
SCENES = {"train": 400, "test": 100}  # how many
HEIGHTS, WIDTHS = (88, 104), (116, 140)  # of a scene, in pixels
DIGITS, SIDES = (3, 6), (24, 56)  # in a scene; of a digit, in pixels
STROKE = 128  # of 255 in a scan: from here on, a pixel is the digit's
CONTRAST = 60  # of 255: grey levels between a digit and what is around it, at least
NOISE = 12  # of 255: standard deviation


class Digits(Labelled):
    """scikit-learn's 1,797 scanned digits, 8x8, as uint8 RGB."""

    classes = tuple("0123456789")

    def __init__(self, data: Data) -> None:
        from sklearn.datasets import load_digits

        if data.split not in SPLITS:
            raise InputError(f"data.split: unknown choice {data.split!r}; choose one of {', '.join(SPLITS)}")
        part, digits = SPLITS[data.split], load_digits()
        grey = np.round(digits.images[part] * (255 / 16)).astype(np.uint8)  # scans hold 0..16
        self._images = np.repeat(grey[..., None], 3, axis=-1)
        self._labels = digits.target[part].astype(np.int64)
        self._split = data.split

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index], "label": int(self._labels[index])}

    def describe(self, index: int) -> str:
        return f"image {index} of digits {self._split}"


class Scenes(Labelled):
    """Digits of any size and colour on a noisy gradient, with masks: 0 is background, 1 + d the strokes of digit d.

    Each scene is a function of its split and number; the digits are those of the split.
    """

    classes = ("background", *Digits.classes)

    def __init__(self, data: Data) -> None:
        self._digits = Digits(data)
        self._split = data.split
        self._labels = np.full(SCENES[data.split], -1, np.int64)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((list(SCENES).index(self._split), range(len(self))[index]))
        size = int(rng.integers(*HEIGHTS, endpoint=True)), int(rng.integers(*WIDTHS, endpoint=True))
        image, mask = _background(size, rng), np.zeros(size, np.uint8)
        for _ in range(rng.integers(*DIGITS, endpoint=True)):
            self._paste(image, mask, rng)
        image += rng.normal(0, NOISE, image.shape)
        return {"image": np.clip(image, 0, 255).astype(np.uint8), "mask": mask, "label": -1}

    def _paste(self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> None:
        """One digit, over what is there."""
        record, side = self._digits[int(rng.integers(len(self._digits)))], int(rng.integers(*SIDES, endpoint=True))
        scan = Image.fromarray(record["image"][..., 0]).resize((side, side), Image.Resampling.BICUBIC)
        scan = np.asarray(scan, np.float64)
        top, left = (int(rng.integers(full - side + 1)) for full in mask.shape)
        place = np.s_[top : top + side, left : left + side]
        around = image[place].mean()
        colour = rng.uniform(0, 255, 3)
        while abs(colour.mean() - around) < CONTRAST:
            colour = rng.uniform(0, 255, 3)
        opacity = np.clip((scan - STROKE / 2) / STROKE, 0, 1)[..., None]  # a half at the edge of a stroke
        image[place] += opacity * (colour - image[place])
        mask[place][scan >= STROKE] = 1 + record["label"]

    def describe(self, index: int) -> str:
        return f"scene {index} of {self._split}"


def _background(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """From one colour to another in any direction, float64 [H, W, 3]."""
    first, last = rng.uniform(0, 255, (2, 3))
    down, across = np.meshgrid(*(np.linspace(-1, 1, side) for side in size), indexing="ij")
    angle = rng.uniform(0, 2 * np.pi)
    share = 0.5 + (np.sin(angle) * down + np.cos(angle) * across)[..., None] / 3
    return first + share * (last - first)
