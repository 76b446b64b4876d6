"""Positions: a fixed sin-cos table, and which distance two patches have."""

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


def relative_index(grid: int) -> np.ndarray:
    """For each pair of CLS and the patches, [1 + grid^2, 1 + grid^2], its row in a table of distances (BEiT).

    The table has (2 grid - 1)^2 rows, by the distance in rows and then in columns, and three more: from CLS to a patch,
    from a patch to CLS, CLS itself.
    """
    row, column = np.divmod(np.arange(grid**2), grid)
    span = 2 * grid - 1
    index = np.empty((1 + grid**2, 1 + grid**2), np.int32)
    index[1:, 1:] = (row[:, None] - row + grid - 1) * span + column[:, None] - column + grid - 1
    index[0, 1:], index[1:, 0], index[0, 0] = span**2, span**2 + 1, span**2 + 2
    return index
