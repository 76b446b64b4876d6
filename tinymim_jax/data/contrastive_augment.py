"""Views for contrastive learning, made on the device from crops: float32 [B, H, W, 3] in [0, 1] (MoCo v3, BYOL).

Differs from the original in that all is computed in float, where PIL rounds to 8 bits in between, and in its blur: a
Gaussian, where PIL approximates one by boxes.
"""

import dataclasses

import jax
import jax.numpy as jnp

from tinymim_jax.data.device_augment import GREY, adjusted, shifted_hue

JITTER = (0.4, 0.4, 0.2)  # brightness, contrast, saturation
HUE = 0.1  # of the circle, either way
JITTER_PROB, GREY_PROB = 0.8, 0.2
SIGMA = (0.1, 2.0)  # of the blur, in pixels
RADIUS = 6  # three times the largest of these


@dataclasses.dataclass(frozen=True)
class View:
    """With which probabilities an image is blurred and solarised."""

    blur: float
    solarize: float


VIEWS = View(blur=1.0, solarize=0.0), View(blur=0.1, solarize=0.2)


def make_view(key: jax.Array, images: jax.Array, view: View) -> jax.Array:
    """Jitter, grey, blur and solarisation, each drawn for each image."""
    keys = jax.random.split(key, 5)

    def some(key: jax.Array, prob: float, changed: jax.Array, images: jax.Array) -> jax.Array:
        return jnp.where(jax.random.bernoulli(key, prob, (len(images), 1, 1, 1)), changed, images)

    images = some(keys[0], JITTER_PROB, jitter(keys[1], images), images)
    grey = jnp.sum(images * jnp.asarray(GREY), axis=-1, keepdims=True)
    images = some(keys[2], GREY_PROB, jnp.broadcast_to(grey, images.shape), images)
    blur_key, sigma_key = jax.random.split(keys[3])
    sigma = jax.random.uniform(sigma_key, (len(images),), minval=SIGMA[0], maxval=SIGMA[1])
    images = some(blur_key, view.blur, blurred(images, sigma), images)
    if not view.solarize:
        return images
    return some(keys[4], view.solarize, jnp.where(images * 255 >= 128, 1 - images, images), images)


def jitter(key: jax.Array, images: jax.Array) -> jax.Array:
    """Brightness, contrast, saturation and hue in random order."""
    factor_key, order_key, hue_key = jax.random.split(key, 3)
    shape, strength = (len(images), 3), jnp.asarray(JITTER)
    factors = 1 + strength * jax.random.uniform(factor_key, shape, minval=-1, maxval=1)
    order = jnp.argsort(jax.random.uniform(order_key, (len(images), 4)), axis=1)
    shift = jax.random.uniform(hue_key, (len(images), 1, 1), minval=-HUE, maxval=HUE)
    for r in range(4):
        is_hue = (order[:, r] == 3)[:, None, None, None]
        others = adjusted(images, factors, jnp.minimum(order[:, r], 2))
        images = jnp.where(is_hue, shifted_hue(images, shift), others)
    return images


def blurred(images: jax.Array, sigma: jax.Array) -> jax.Array:
    """Convolved with a Gaussian of `sigma` [B], cut at `RADIUS`; borders are repeated."""
    weights = jnp.exp(-(jnp.arange(-RADIUS, RADIUS + 1) ** 2) / (2 * sigma[:, None] ** 2))
    weights = (weights / weights.sum(axis=1, keepdims=True)).T[..., None, None, None]  # [taps, B, 1, 1, 1]
    for axis in (1, 2):
        size = images.shape[axis]
        ends = [(RADIUS, RADIUS) if i == axis else (0, 0) for i in range(4)]
        padded = jnp.pad(images, ends, mode="edge")
        images = sum(weight * jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i, weight in enumerate(weights))
    return images
