"""RandAugment as timm 0.3.2 defines "rand-...-inc1": each operation grows stronger with the magnitude."""

import dataclasses
import functools
import re
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from tinymim_jax.runtime.errors import InputError

MAX_MAGNITUDE = 10.0
APPLY_PROB = 0.5  # timm's addition: a drawn operation is applied half of the time
EXAMPLE = "rand-m9-mstd0.5-inc1"

Fill = tuple[int, ...]
Op = Callable[[Image.Image, float, int, Fill], Image.Image]


@dataclasses.dataclass(frozen=True)
class Policy:
    """How many operations, how strong."""

    magnitude: float  # 0 to 10
    std: float = 0.0  # of the magnitude
    num_ops: int = 2


@functools.lru_cache
def parse(text: str) -> Policy:
    """A policy from a string such as "rand-m9-mstd0.5-inc1"; raises InputError on anything it does not know."""
    head, *parts = text.split("-")
    values = {}
    for part in parts:
        match = re.fullmatch(r"(m|n|mstd|inc)(\d+(?:\.\d+)?)", part)
        if match is None or match[1] in values:
            raise InputError(f"data.rand_augment: cannot read {part!r} in {text!r}; write it like {EXAMPLE!r}")
        values[match[1]] = float(match[2])
    num_ops = values.get("n", 2.0)
    if head != "rand" or "m" not in values or values.get("inc") != 1 or not num_ops.is_integer():
        raise InputError(f"data.rand_augment: {text!r} needs rand, m, inc1 and a whole n; write it like {EXAMPLE!r}")
    if values["m"] > MAX_MAGNITUDE:
        raise InputError(f"data.rand_augment: magnitude {values['m']:g} in {text!r} is above {MAX_MAGNITUDE:g}")
    return Policy(values["m"], values.get("mstd", 0.0), int(num_ops))


def rand_augment(image: Image.Image, policy: Policy, fill: Fill, rng: np.random.Generator) -> Image.Image:
    """RGB image -> RGB image; `fill` is the colour of what comes in from outside."""
    for name in rng.choice(list(OPS), policy.num_ops):
        if rng.random() < APPLY_PROB:
            magnitude = min(MAX_MAGNITUDE, max(0.0, rng.normal(policy.magnitude, policy.std)))
            sign = 1 if rng.random() < 0.5 else -1
            image = OPS[name](image, magnitude, sign, fill)
    return image


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: Fill) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=fill
    )


def _rotate(image: Image.Image, magnitude: float, sign: int, fill: Fill) -> Image.Image:
    return image.rotate(sign * (magnitude / 10) * 30, resample=Image.Resampling.BICUBIC, fillcolor=fill)


def _shear_x(image: Image.Image, magnitude: float, sign: int, fill: Fill) -> Image.Image:
    return _affine(image, (1, sign * (magnitude / 10) * 0.3, 0, 0, 1, 0), fill)


def _shear_y(image: Image.Image, magnitude: float, sign: int, fill: Fill) -> Image.Image:
    return _affine(image, (1, 0, 0, sign * (magnitude / 10) * 0.3, 1, 0), fill)


def _translate_x(image: Image.Image, magnitude: float, sign: int, fill: Fill) -> Image.Image:
    return _affine(image, (1, 0, sign * (magnitude / 10) * 0.45 * image.width, 0, 1, 0), fill)


def _translate_y(image: Image.Image, magnitude: float, sign: int, fill: Fill) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, sign * (magnitude / 10) * 0.45 * image.height), fill)


def _auto_contrast(image: Image.Image, magnitude: float, sign: int, fill: Fill) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, magnitude: float, sign: int, fill: Fill) -> Image.Image:
    return ImageOps.equalize(image)


def _invert(image: Image.Image, magnitude: float, sign: int, fill: Fill) -> Image.Image:
    return ImageOps.invert(image)


def _posterize(image: Image.Image, magnitude: float, sign: int, fill: Fill) -> Image.Image:
    # Not ImageOps.posterize: at full strength no bit is left, which Pillow 13 refuses.
    dropped = 4 + int(magnitude / 10 * 4)
    return image.point([v >> dropped << dropped for v in range(256)] * 3)


def _solarize(image: Image.Image, magnitude: float, sign: int, fill: Fill) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(magnitude / 10 * 256))


def _solarize_add(image: Image.Image, magnitude: float, sign: int, fill: Fill) -> Image.Image:
    added = int(magnitude / 10 * 110)
    table = [min(255, v + added) if v < 128 else v for v in range(256)]
    return image.point(table * 3)


def _enhance(enhancer: type, image: Image.Image, magnitude: float, sign: int, fill: Fill) -> Image.Image:
    return enhancer(image).enhance(1 + sign * (magnitude / 10) * 0.9)


OPS: dict[str, Op] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": functools.partial(_enhance, ImageEnhance.Color),
    "ContrastIncreasing": functools.partial(_enhance, ImageEnhance.Contrast),
    "BrightnessIncreasing": functools.partial(_enhance, ImageEnhance.Brightness),
    "SharpnessIncreasing": functools.partial(_enhance, ImageEnhance.Sharpness),
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
}
