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


def relative_index(grid: int, front: int = 1) -> np.ndarray:
    """For each pair of the tokens in front and the patches, [N, N], its row in a table of distances (BEiT).

    The table has (2 grid - 1)^2 rows, by the distance in rows and then in columns, and three for each token in front,
    those of the first one last: from it to another, from another to it, itself. Between two such tokens, those of the
    first hold (TinyMIM, Segmentation/TinyMIMstar-T/backbone/mae.py).
    """
    row, column = np.divmod(np.arange(grid**2), grid)
    span = 2 * grid - 1
    index = np.empty((front + grid**2,) * 2, np.int32)
    index[front:, front:] = (row[:, None] - row + grid - 1) * span + column[:, None] - column + grid - 1
    for token in reversed(range(front)):
        first = span**2 + 3 * (front - 1 - token)
        index[token], index[:, token], index[token, token] = first, first + 1, first + 2
    return index
