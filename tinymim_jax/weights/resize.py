"""Positions resampled to another grid: tables of patches as torch does it, tables of distances as BEiT does it."""

import math

import numpy as np

from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.interpolation import resize_matrix


def resize(posembed: np.ndarray, grid: int) -> np.ndarray:
    """Patch positions of [1, T + g^2, D] resampled to [1, T + grid^2, D]; those of the T tokens in front are kept.

    Bicubic, as torch's `interpolate` does it.
    """
    old = side(posembed.shape[1])
    extra = posembed.shape[1] - old**2
    front, table = posembed[:, :extra], posembed[0, extra:]
    weights = resize_matrix(old, grid, "bicubic")
    table = np.einsum("ir,jc,rcd->ijd", weights, weights, table.reshape(old, old, -1).astype(np.float64))
    return np.concatenate([front, table.reshape(1, grid * grid, -1)], axis=1).astype(posembed.dtype)


def side(num_tokens: int) -> int:
    """Patches a side, of positions for that many tokens, a few of which may stand in front."""
    return math.isqrt(num_tokens)


def resize_relative(table: np.ndarray, grid: int) -> np.ndarray:
    """A table of distances [(2 g - 1)^2 + 3 T, H] (`posembed.relative_index`) resampled to that of another grid.

    A cubic spline for each head, on distances that are spread as a geometric series so that the nearest stay what they
    are and the farthest become the new grid's (BEiT, load_checkpoint of semantic_segmentation/mmcv_custom).
    """
    import scipy.interpolate  # these take a third of a second, which others need not wait for
    import scipy.optimize

    old, new = relative_side(len(table)) - 1, grid - 1  # the largest distances
    if not min(old, new):
        raise InputError("a table of distances of one patch cannot be resized; start it anew (init.fresh)")
    if old == new:
        return table
    steps = np.linspace(0, new, old + 1)[1:]
    if min(old, new) > 1:  # else there is no such series
        powers = np.arange(old)
        steps = np.cumsum(scipy.optimize.brentq(lambda q: np.sum(q**powers) - new, 1e-3, 1e3) ** powers)
    known, wanted = np.concatenate([-steps[::-1], [0], steps]), np.arange(-new, new + 1)
    patches, front = np.split(table, [(2 * old + 1) ** 2])
    rows, degree = patches.reshape(2 * old + 1, 2 * old + 1, -1), min(3, 2 * old)
    heads = [
        scipy.interpolate.RectBivariateSpline(known, known, rows[..., h], kx=degree, ky=degree)(wanted, wanted)
        for h in range(rows.shape[-1])
    ]
    return np.concatenate([np.stack(heads, axis=-1).reshape(-1, len(heads)), front]).astype(table.dtype)


def relative_front(rows: int) -> int:
    """Tokens in front, one or two, of a table of distances with so many rows: squares of odd numbers are 1 modulo 8."""
    return (rows - 1) % 8 // 3


def relative_side(rows: int) -> int:
    """Patches a side, of a table of distances with so many rows."""
    return (math.isqrt(rows - 3 * relative_front(rows)) + 1) // 2
