"""Images as data of a page, each once, within the room that there is."""

import base64
import io
import json
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from tinymim_jax.report.charts import Pictures
from tinymim_jax.tasks.contract import Panels

LARGEST = 256  # pixels a side
SMALL = 64  # up to here, pixels are shown as squares and stored without loss


class Room:
    """What a page may still hold, in bytes."""

    def __init__(self, left: int):
        self.left = left

    def admits(self, text: str) -> bool:
        """Whether there is room for `text`, which then takes it."""
        size = len(text.encode())
        self.left -= size if (is_room := size <= self.left) else 0
        return is_room


def pictures(chart: Pictures, room: Room) -> dict[str, Any]:
    """The choices and grids of `chart` as JSON, each image once; what there is no room for is left out."""
    sources: list[tuple[str, bool]] = []
    numbers: dict[tuple, int] = {}  # by the array, which grids of several choices have in common, and its scale
    grids = {}

    def number(image: np.ndarray, limits: tuple[float, float] | None) -> int | None:
        if (id(image), limits) not in numbers and room.admits(source := _encoded(image, limits)):
            numbers[id(image), limits] = len(sources)
            sources.append((source, max(image.shape[:2]) <= SMALL))
        return numbers.get((id(image), limits))

    for where, panels in chart.grids.items():
        rows = []
        for row in panels.rows:
            limits = {column: scale for pair, scale in panels.scales(row) for column in pair}
            rows.append([number(image, limits.get(column)) for column, image in enumerate(row)])
        if all(found is not None for row in rows for found in row) and room.admits(
            json.dumps(grid := _grid(panels, rows))
        ):
            grids[",".join(map(str, where))] = grid
    axes = [[name, list(labels)] for name, labels in chart.axes.items()]
    return {"axes": axes, "grids": grids, "images": sources}


def _encoded(image: np.ndarray, limits: tuple[float, float] | None) -> str:
    """A data URI of an image, or of a map in colours from the lowest to the highest of `limits`."""
    if limits is not None:
        low, high = limits
        image = matplotlib.colormaps["viridis"]((image - low) / max(high - low, 1e-12))[..., :3]
    picture = Image.fromarray(np.uint8(np.clip(image, 0, 1) * 255 + 0.5))
    picture.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=max(picture.size) <= SMALL, quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _grid(panels: Panels, rows: list[list[int]]) -> dict[str, Any]:
    captions = panels.captions or [[""] * len(row) for row in rows]
    shown = {
        "title": panels.title,
        "labels": list(panels.row_labels),
        "columns": list(panels.column_labels),
        "rows": [list(map(list, zip(*row, strict=True))) for row in zip(rows, captions, strict=True)],
    }
    if panels.box:
        left, top, side = panels.box
        height, width = panels.rows[0][0].shape[:2]
        shares = {"left": left / width, "top": top / height, "width": side / width, "height": side / height}
        shown["box"] = {name: f"{100 * share:.3g}%" for name, share in shares.items()}
    return shown
