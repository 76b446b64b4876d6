"""ImageNet-C's corruptions (Hendrycks and Dietterich 2019), made from clean images.

They are imagecorruptions-imaug's, which has numpy's motion blur for ImageMagick's, in motion_blur and snow; but its
elastic_transform and frost are others than those published, so these two are made here.
"""

import functools
import importlib.resources
import io
import threading

import numpy as np
from PIL import Image

from tinymim_jax.runtime.errors import InputError

# The 15 of mCE, with AlexNet's top-1 error (augmix, imagenet.py).
ALEXNET_ERROR = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}

TAKE_A_SEED = ("impulse_noise", "glass_blur")  # the library's others draw from numpy's global generator

_global_generator = threading.Lock()  # which all threads share


def check(name: str) -> None:
    """Raises InputError if `name` is not a corruption, or the library is not installed."""
    if name not in ALEXNET_ERROR:
        raise InputError(f"data.corruption: unknown choice {name!r}; choose one of {', '.join(ALEXNET_ERROR)}")
    try:
        import imagecorruptions  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"making corruptions needs imagecorruptions-imaug ({error}): pip install 'tinymim_jax[robust]'"
        ) from None


# By severity: weights of image and texture; and strength, sigma and shift of corners, as shares of 244 pixels.
FROST = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))
ELASTIC = ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
TEXTURES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")  # the sixth was never drawn


def corrupt(
    pixels: np.ndarray, name: str, severity: int, rng: np.random.Generator, quality: int | None = None
) -> np.ndarray:
    """uint8 [S, S, 3], S at least 32 -> the same, corrupted and, with a `quality`, a JPEG's; InputError as `check`."""
    check(name)
    made = OWN[name](pixels, severity, rng) if name in OWN else _by_library(pixels, name, severity, rng)
    made, file = made.astype(np.uint8), io.BytesIO()
    if quality is None:
        return made
    Image.fromarray(made).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def _by_library(pixels: np.ndarray, name: str, severity: int, rng: np.random.Generator) -> np.ndarray:
    import imagecorruptions.corruptions as library

    seed = int(rng.integers(2**32))
    options = {"seed": seed} if name in TAKE_A_SEED else {}
    with _global_generator:
        np.random.seed(seed)
        return np.asarray(getattr(library, name)(Image.fromarray(pixels), severity, **options))


def frost(pixels: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A weighted sum of the image and of a part of one of five textures, both of the same size in pixels."""
    own, other = FROST[severity - 1]
    height, width, _ = pixels.shape
    texture = _texture(TEXTURES[rng.integers(len(TEXTURES))], height, width)
    top, left = rng.integers(texture.shape[0] - height), rng.integers(texture.shape[1] - width)
    return np.clip(own * pixels + other * texture[top : top + height, left : left + width], 0, 255)


@functools.cache
def _texture(name: str, height: int, width: int) -> np.ndarray:
    """One of the published textures, which the library has; enlarged only if an image would not fit into it."""
    with (importlib.resources.files("imagecorruptions") / "frost" / name).open("rb") as file:
        image = Image.open(file).convert("RGB")
    scale = max(1, (height + 1) / image.height, (width + 1) / image.width)
    return np.asarray(image.resize([round(side * scale) for side in image.size]))


def elastic_transform(pixels: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A random affine map of three corners of a central square, then a smooth random shift of each pixel.

    The published lengths are for 224 px; other images get them in proportion.
    """
    import cv2
    from scipy.ndimage import gaussian_filter, map_coordinates

    shape = pixels.shape[:2]
    strength, sigma, shift = (244 * share * min(shape) / 224 for share in ELASTIC[severity - 1])
    half, centre = min(shape) // 3, np.float32(shape) // 2
    corners = np.float32([centre + half, centre + (half, -half), centre - half])
    moved = corners + rng.uniform(-shift, shift, corners.shape).astype(np.float32)
    affine = cv2.getAffineTransform(corners, moved)
    image = cv2.warpAffine(np.float32(pixels) / 255, affine, shape[::-1], borderMode=cv2.BORDER_REFLECT_101)
    # Drawn along x, then along y.
    shifts = [gaussian_filter(rng.uniform(-1, 1, shape), sigma, mode="reflect", truncate=3) * strength for _ in "xy"]
    at = np.indices(shape) + np.float32(shifts[::-1])
    channels = [map_coordinates(image[..., c], at, order=1, mode="reflect") for c in range(3)]
    return np.clip(np.stack(channels, axis=-1), 0, 1) * 255


OWN = {"elastic_transform": elastic_transform, "frost": frost}
