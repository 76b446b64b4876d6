"""Fixed sin-cos positions."""

import numpy as np


def sincos(grid: int, width: int, extra: int = 1) -> np.ndarray:
    """Positions [1, extra + grid^2, width] float32, zeros for the tokens in front (MAE util/pos_embed.py).

    The first half of the channels encodes the column, the second the row; each is [sin, cos].
    """
    omega = 10000.0 ** -(np.arange(width // 4) / (width / 4))
    angles = np.arange(grid)[:, None] * omega
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [grid, width / 2]
    columns = np.broadcast_to(axis[None, :], (grid, grid, width // 2))
    rows = np.broadcast_to(axis[:, None], (grid, grid, width // 2))
    table = np.concatenate([columns, rows], axis=-1).reshape(grid * grid, width)
    return np.concatenate([np.zeros((extra, width)), table])[None].astype(np.float32)
