"""ImageNet-C's corruptions (Hendrycks and Dietterich 2019), made from clean images by imagecorruptions-imaug."""

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


def corrupt(pixels: np.ndarray, name: str, severity: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [S, S, 3] -> the same, corrupted; S at least 32. Raises InputError as `check`."""
    check(name)
    import imagecorruptions.corruptions as library

    seed = int(rng.integers(2**32))
    options = {"seed": seed} if name in TAKE_A_SEED else {}
    with _global_generator:
        np.random.seed(seed)
        return np.asarray(getattr(library, name)(Image.fromarray(pixels), severity, **options)).astype(np.uint8)
