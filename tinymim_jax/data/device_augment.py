"""Augmentation on the device: pure functions of a key and a batch of images, float32 [B, H, W, 3]."""

import math

import jax
import jax.numpy as jnp

GREY = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL's mode L
ERASE_AREA = (0.02, 1 / 3)  # of the image
ERASE_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))  # height over width
ERASE_ATTEMPTS = 10
PAIRED_ROWS = 8  # of a batch, among which images find their partners


def to_float(images: jax.Array) -> jax.Array:
    """uint8 [B, H, W, 3] -> float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """(images - mean) / std, per channel."""
    return (images - jnp.asarray(mean, images.dtype)) / jnp.asarray(std, images.dtype)


def normalize_within(
    images: jax.Array, extent: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
    """`normalize` of [..., H, W, 3], then 0 in the padding: all but the first `extent` [..., 2] rows and columns."""
    rows, columns = (jnp.arange(side) for side in images.shape[-3:-1])
    inside = (rows[:, None] < extent[..., :1, None]) & (columns < extent[..., 1:, None])
    return jnp.where(inside[..., None], normalize(images, mean, std), 0)


def color_jitter(key: jax.Array, images: jax.Array, strength: float) -> jax.Array:
    """Brightness, contrast and saturation by U(1 - s, 1 + s), in random order, per image; images in [0, 1].

    The semantics are those of torchvision's ColorJitter on float tensors.
    """
    if strength == 0:
        return images
    factor_key, order_key = jax.random.split(key)
    shape = (images.shape[0], 3)
    factors = jax.random.uniform(factor_key, shape, images.dtype, max(0.0, 1 - strength), 1 + strength)
    order = jnp.argsort(jax.random.uniform(order_key, shape), axis=1)
    return jitter_in_order(images, factors, order)


def jitter_in_order(images: jax.Array, factors: jax.Array, order: jax.Array) -> jax.Array:
    """Adjustment order[b, r] is the r-th of image b; 0, 1, 2 are brightness, contrast, saturation by factors[b]."""
    for r in range(3):
        images = adjusted(images, factors, order[:, r])
    return images


def adjusted(images: jax.Array, factors: jax.Array, which: jax.Array) -> jax.Array:
    """One adjustment of each image: 0, 1, 2 in `which` [B] are brightness, contrast, saturation by factors [B, 3]."""
    # All three blend towards something: black, the mean grey, or each pixel's grey.
    factor = jnp.take_along_axis(factors, which[:, None], axis=1)[..., None, None]
    which = which[:, None, None, None]
    grey = jnp.sum(images * jnp.asarray(GREY, images.dtype), axis=-1, keepdims=True)
    mean = jnp.mean(grey, axis=(1, 2), keepdims=True)
    target = jnp.where(which == 0, 0.0, jnp.where(which == 1, mean, grey))
    return jnp.clip(factor * images + (1 - factor) * target, 0, 1)


def shifted_hue(images: jax.Array, shift: jax.Array) -> jax.Array:
    """Hue moved by `shift` [B, 1, 1] of the circle; value and saturation stay (HSV)."""
    red, green, blue = jnp.moveaxis(images, -1, 0)
    value = images.max(axis=-1)
    chroma = value - images.min(axis=-1)
    safe = jnp.where(chroma == 0, 1, chroma)
    hue = jnp.where(
        value == red, (green - blue) / safe,
        jnp.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )  # fmt: skip
    place = (jnp.stack([hue + 5, hue + 3, hue + 1], axis=-1) + 6 * shift[..., None]) % 6
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(place, 4 - place), 0, 1)


def mix(
    key: jax.Array,
    images: jax.Array,
    soft_labels: jax.Array,
    *,
    mixup: float,
    cutmix: float,
    mix_prob: float,
    switch_prob: float,
    mix_group: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Mixup or cutmix, as `own_share` has them, of each image with its `partner`; labels [B, C].

    Each `mix_group` images in a row (None: all) share one draw and are mixed with probability `mix_prob`: timm's Mixup
    in batch mode, each group being the batch of one process, but for who is whose partner.
    """
    if mix_prob == 0 or (mixup == 0 and cutmix == 0):
        return images, soft_labels
    batch, size = len(images), images.shape[1:3]
    group = min(mix_group or batch, batch)
    draws = -(-batch // group)

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        on_key, *keys = jax.random.split(key, 5)
        return jax.random.bernoulli(on_key, mix_prob), own_share(keys, size, mixup, cutmix, switch_prob)

    is_on, own = jax.vmap(draw)(key[None] if draws == 1 else jax.random.split(key, draws))
    own = jnp.where(is_on[:, None, None], own, 1.0).astype(images.dtype)  # [draws, H, W]

    def mixed(images: jax.Array, soft_labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        # After clipping of the box: the share of pixels that are the image's own.
        lam = jnp.repeat(own.mean(axis=(1, 2)), group)[:batch, None]
        kept = jnp.repeat(own, group, axis=0)[:batch, ..., None]
        return images * kept + partner(images) * (1 - kept), soft_labels * lam + partner(soft_labels) * (1 - lam)

    # A branch also keeps XLA from computing `images` (with erasing's noise) anew for each of their two uses.
    return jax.lax.cond(jnp.any(is_on), mixed, lambda *same: same, images, soft_labels)


def partner(rows: jax.Array) -> jax.Array:
    """rows [B, ...], each replaced by its partner: half a block of up to `PAIRED_ROWS` rows away.

    timm pairs an image with its mirror in the batch of one GPU. Blocks keep pairs on one device whatever the number of
    devices is, without sending images around; repetitions of an image, which are neighbours, are never paired up to 4.
    """
    block = math.gcd(len(rows), PAIRED_ROWS)
    if block == 1:
        return rows[::-1]
    return rows.reshape(-1, 2, block // 2, *rows.shape[1:])[:, ::-1].reshape(rows.shape)


def own_share(
    keys: list[jax.Array], size: tuple[int, int], mixup: float, cutmix: float, switch_prob: float
) -> jax.Array:
    """[H, W]: how much of each pixel stays the image's own, by mixup (everywhere the same) or cutmix (0 in a box).

    `mixup` and `cutmix` are alphas of Beta, 0 where one is off; where both are on, `switch_prob` is cutmix's.
    """
    switch_key, mixup_key, cutmix_key, box_key = keys
    both = mixup > 0 and cutmix > 0
    use_cutmix = jax.random.bernoulli(switch_key, switch_prob) if both else jnp.asarray(mixup == 0)
    lam_mixup = jax.random.beta(mixup_key, mixup, mixup) if mixup else 1.0
    lam_cutmix = jax.random.beta(cutmix_key, cutmix, cutmix) if cutmix else 1.0
    return jnp.where(use_cutmix, 1.0 - cutmix_box(box_key, lam_cutmix, *size), lam_mixup)


def cutmix_box(key: jax.Array, lam: jax.Array | float, height: int, width: int) -> jax.Array:
    """bool [H, W], True inside a box of sides sqrt(1 - lam), its centre uniform, clipped at the border."""
    side = jnp.sqrt(1 - jnp.asarray(lam))
    row_key, col_key = jax.random.split(key)
    rows = _interval(jax.random.randint(row_key, (), 0, height), side, height)
    cols = _interval(jax.random.randint(col_key, (), 0, width), side, width)
    return rows[:, None] & cols[None, :]


def _interval(centre: jax.Array, side: jax.Array, length: int) -> jax.Array:
    half = jnp.floor(length * side).astype(jnp.int32) // 2
    position = jnp.arange(length)
    return (position >= centre - half) & (position < centre + half)


def random_erasing(key: jax.Array, images: jax.Array, prob: float) -> jax.Array:
    """One rectangle of N(0, 1) noise in each image with probability `prob`; images are normalised.

    The semantics are those of timm's RandomErasing in pixel mode with count 1.
    """
    if prob == 0:
        return images
    on_key, box_key, noise_key = jax.random.split(key, 3)
    batch, height, width, _ = images.shape
    erased = erasing_boxes(box_key, batch, height, width)
    erased &= jax.random.bernoulli(on_key, prob, (batch, 1, 1))
    return jnp.where(erased[..., None], pixel_noise(noise_key, images.shape).astype(images.dtype), images)


def pixel_noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """N(0, 1), float32 [B, ...]: each image's values are hashes of their positions and of a number of its own.

    A tenth of the work of jax.random.normal, whose threefry would be most of the cost of erasing. The hash is the
    finaliser of MurmurHash3 (fmix32).
    """
    own = jax.random.bits(key, (shape[0], *[1] * (len(shape) - 1)), jnp.uint32)
    x = jax.lax.iota(jnp.uint32, math.prod(shape[1:])).reshape(1, *shape[1:]) * jnp.uint32(0x9E3779B9) ^ own
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ x >> shift) * jnp.uint32(factor)
    x ^= x >> 16
    uniform = (x >> 8).astype(jnp.float32) * 2.0**-23 + (2.0**-24 - 1)  # in (-1, 1), never at an end
    return math.sqrt(2) * jax.lax.erf_inv(uniform)


def erasing_boxes(key: jax.Array, batch: int, height: int, width: int) -> jax.Array:
    """bool [B, H, W], True inside the first of ten drawn rectangles that is smaller than the image, if any."""
    area_key, aspect_key, place_key = jax.random.split(key, 3)
    shape = (batch, ERASE_ATTEMPTS)
    area = height * width * jax.random.uniform(area_key, shape, minval=ERASE_AREA[0], maxval=ERASE_AREA[1])
    aspect = jnp.exp(jax.random.uniform(aspect_key, shape, minval=ERASE_LOG_ASPECT[0], maxval=ERASE_LOG_ASPECT[1]))
    h = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    w = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (h < height) & (w < width)
    first = jnp.argmax(fits, axis=1)[:, None]
    h, w = jnp.take_along_axis(h, first, axis=1), jnp.take_along_axis(w, first, axis=1)  # [B, 1]
    place = jax.random.uniform(place_key, (2, batch, 1))
    top = jnp.floor(place[0] * (height - h + 1)).astype(jnp.int32)
    left = jnp.floor(place[1] * (width - w + 1)).astype(jnp.int32)
    row, col = jnp.arange(height), jnp.arange(width)
    rows = (row >= top) & (row < top + h) & jnp.any(fits, axis=1, keepdims=True)
    cols = (col >= left) & (col < left + w)
    return rows[:, :, None] & cols[:, None, :]
