"""Photometric distortion of segmentation crops (SSD's, as mmsegmentation's PhotoMetricDistortion), on the device.

Differs from the original in that all is computed in float, where OpenCV rounds to 8 bits after each step.
"""

import dataclasses

import jax
import jax.numpy as jnp

from tinymim_jax.data.config import Data
from tinymim_jax.data.device_augment import normalize_within, shifted_hue, to_float

PROB = 0.5  # of each step
BRIGHTNESS = 32 / 255  # added or taken away, at most
FACTORS = (0.5, 1.5)  # of contrast and saturation
HUE = 18  # steps either way, the upper end excluded ...
HUE_STEPS = 180  # ... of as many in a circle, as OpenCV counts hue


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Distortion:
    """What is done to each image, [B, 1, 1]; the values that change nothing are 0, 1, 1, 0 and 1."""

    brightness: jax.Array  # is added
    early_contrast: jax.Array  # multiplies, at once
    saturation: jax.Array  # multiplies HSV's
    hue: jax.Array  # is added, of the circle
    late_contrast: jax.Array  # multiplies, in the end


def model_input(images: jax.Array, extent: jax.Array, data: Data, rng: jax.Array | None = None) -> jax.Array:
    """Crops or windows as the model sees them: uint8 [..., H, W, 3] -> float32, normalised, 0 outside `extent`.

    With `rng`, crops to train on, [B, H, W, 3], whose colours are distorted if `data.masks` says so.
    """
    images = to_float(images)
    if rng is not None and data.masks.photometric:
        images = photometric(rng, images)
    return normalize_within(images, extent, data.mean, data.std)


def photometric(rng: jax.Array, images: jax.Array) -> jax.Array:
    """Brightness, saturation and hue, each with probability 1/2, contrast likewise before or after the last two.

    Float [B, H, W, 3] in [0, 1] -> the same, drawn for each image.
    """
    return distorted(images, draw(rng, len(images)))


def draw(rng: jax.Array, count: int) -> Distortion:
    """Of `count` images."""
    keys = jax.random.split(rng, 6)
    shape = (count, 1, 1)
    on = jax.random.bernoulli(keys[0], PROB, (4, *shape))
    is_early = jax.random.bernoulli(keys[1], 0.5, shape)
    added = jax.random.uniform(keys[2], shape, minval=-BRIGHTNESS, maxval=BRIGHTNESS)
    contrast, saturation = (jax.random.uniform(key, shape, minval=FACTORS[0], maxval=FACTORS[1]) for key in keys[3:5])
    hue = jax.random.randint(keys[5], shape, -HUE, HUE) / HUE_STEPS
    return Distortion(
        brightness=jnp.where(on[0], added, 0),
        early_contrast=jnp.where(on[1] & is_early, contrast, 1),
        saturation=jnp.where(on[2], saturation, 1),
        hue=jnp.where(on[3], hue, 0),
        late_contrast=jnp.where(on[1] & ~is_early, contrast, 1),
    )


def distorted(images: jax.Array, by: Distortion) -> jax.Array:
    """`images` changed in the order of the fields of `by`, clipped after each."""
    images = jnp.clip(images + by.brightness[..., None], 0, 1)
    images = jnp.clip(images * by.early_contrast[..., None], 0, 1)
    images = shifted_hue(_saturated(images, by.saturation), by.hue)
    return jnp.clip(images * by.late_contrast[..., None], 0, 1)


def _saturated(images: jax.Array, factor: jax.Array) -> jax.Array:
    """Saturation multiplied by `factor` [B, 1, 1], at most to 1; hue and value stay (HSV)."""
    value = images.max(axis=-1, keepdims=True)
    chroma = value - images.min(axis=-1, keepdims=True)
    factor = jnp.minimum(factor[..., None], value / jnp.where(chroma == 0, 1, chroma))
    return jnp.where(chroma == 0, images, value - (value - images) * factor)
