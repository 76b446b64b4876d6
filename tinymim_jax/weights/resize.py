"""Learnt or fixed positions resampled to another grid, as torch does it."""

import math

import numpy as np


def resize(posembed: np.ndarray, grid: int) -> np.ndarray:
    """Patch positions of [1, T + g^2, D] resampled to [1, T + grid^2, D]; those of the T tokens in front are kept.

    Bicubic with a = -0.75, half-pixel centres and no antialiasing, as torch's `interpolate` does it
    (`jax.image.resize` uses a = -0.5).
    """
    old = side(posembed.shape[1])
    extra = posembed.shape[1] - old**2
    front, table = posembed[:, :extra], posembed[0, extra:]
    weights = _bicubic_weights(old, grid)
    table = np.einsum("ir,jc,rcd->ijd", weights, weights, table.reshape(old, old, -1).astype(np.float64))
    return np.concatenate([front, table.reshape(1, grid * grid, -1)], axis=1).astype(posembed.dtype)


def side(num_tokens: int) -> int:
    """Patches a side, of positions for that many tokens, a few of which may stand in front."""
    return math.isqrt(num_tokens)


def _bicubic_weights(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """[new, old] rows of interpolation weights, borders repeated."""
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    left = np.floor(centre).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        x = np.abs(centre - (left + tap))
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        np.add.at(weights, (np.arange(new), np.clip(left + tap, 0, old - 1)), np.where(x <= 1, near, far))
    return weights
