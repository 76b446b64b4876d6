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
Op = Callable[[Image.Image, float, Fill], Image.Image]  # of RGB; how strong, -1 to 1: those without a sign take abs


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
            image = OPS[name](image, sign * (magnitude / MAX_MAGNITUDE), fill)
    return image


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: Fill) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=fill
    )


def _rotate(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    return image.rotate(level * 30, resample=Image.Resampling.BICUBIC, fillcolor=fill)


def _posterize(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    # Not ImageOps.posterize: at full strength no bit is left, which Pillow 13 refuses.
    dropped = 4 + int(abs(level) * 4)
    return image.point([v >> dropped << dropped for v in range(256)] * 3)


def _solarize_add(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    added = int(abs(level) * 110)
    table = [min(255, v + added) if v < 128 else v for v in range(256)]
    return image.point(table * 3)


def _enhancing(enhancer: type) -> Op:
    return lambda image, level, fill: enhancer(image).enhance(1 + level * 0.9)


OPS: dict[str, Op] = {
    "AutoContrast": lambda image, level, fill: ImageOps.autocontrast(image),
    "Equalize": lambda image, level, fill: ImageOps.equalize(image),
    "Invert": lambda image, level, fill: ImageOps.invert(image),
    "Rotate": _rotate,
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": lambda image, level, fill: ImageOps.solarize(image, 256 - int(abs(level) * 256)),
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": _enhancing(ImageEnhance.Color),
    "ContrastIncreasing": _enhancing(ImageEnhance.Contrast),
    "BrightnessIncreasing": _enhancing(ImageEnhance.Brightness),
    "SharpnessIncreasing": _enhancing(ImageEnhance.Sharpness),
    "ShearX": lambda image, level, fill: _affine(image, (1, level * 0.3, 0, 0, 1, 0), fill),
    "ShearY": lambda image, level, fill: _affine(image, (1, 0, 0, level * 0.3, 1, 0), fill),
    "TranslateXRel": lambda image, level, fill: _affine(image, (1, 0, level * 0.45 * image.width, 0, 1, 0), fill),
    "TranslateYRel": lambda image, level, fill: _affine(image, (1, 0, 0, 0, 1, level * 0.45 * image.height), fill),
}
