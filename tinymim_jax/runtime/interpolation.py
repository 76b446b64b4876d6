"""Interpolation along an axis as torch's `interpolate` does it, as matrices of weights."""

from typing import Literal

import numpy as np

Method = Literal["bilinear", "bicubic"]


def resize_matrix(source: int, target: int, method: Method = "bilinear") -> np.ndarray:
    """[target, source] float64, rows of weights: half-pixel centres, no antialiasing, borders repeated.

    Bicubic has a = -0.75 (`jax.image.resize` has -0.5).
    """
    taps, kernel = {"bilinear": ((0, 1), lambda x: 1 - x), "bicubic": ((-1, 0, 1, 2), _cubic)}[method]
    centre = (np.arange(target) + 0.5) * source / target - 0.5
    left = np.floor(centre).astype(int)
    weights = np.zeros((target, source))
    for tap in taps:
        places = np.arange(target), np.clip(left + tap, 0, source - 1)
        np.add.at(weights, places, kernel(np.abs(centre - (left + tap))))
    return weights


def _cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, far)
