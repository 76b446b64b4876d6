"""Images as data of a page, each once, within a budget."""

import base64
import io
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from tinymim_jax.report.charts import Pictures
from tinymim_jax.tasks.contract import Panels

LARGEST = 256  # pixels a side
SMALL = 64  # up to here, pixels are shown as squares and stored without loss


class Stock:
    """Encodes images until `left` bytes are used."""

    def __init__(self, left: int):
        self.left = left

    def pictures(self, chart: Pictures) -> dict[str, Any]:
        """The choices and grids of `chart` as JSON; grids beyond the budget are left out, the last first."""
        sources: list[tuple[str, bool]] = []
        numbers: dict[tuple, int] = {}
        grids = {}
        for where, panels in chart.grids.items():
            rows = [self._row(panels, row, sources, numbers) for row in panels.rows]
            if all(number is not None for row in rows for number in row):
                grids[",".join(map(str, where))] = _grid(panels, rows)
        axes = [[name, list(labels)] for name, labels in chart.axes.items()]
        return {"axes": axes, "grids": grids, "images": sources}

    def _row(self, panels: Panels, row: list[np.ndarray], sources: list, numbers: dict) -> list[int | None]:
        limits = {column: scale for pair, scale in panels.scales(row) for column in pair}
        found = []
        for column, image in enumerate(row):
            what = id(image), limits.get(column)  # grids of one choice have arrays in common
            if what not in numbers and (source := self._encode(image, limits.get(column))):
                numbers[what] = len(sources)
                sources.append((source, max(image.shape[:2]) <= SMALL))
            found.append(numbers.get(what))
        return found

    def _encode(self, image: np.ndarray, limits: tuple[float, float] | None) -> str | None:
        """A data URI; None if the budget is used up."""
        if limits is not None:
            low, high = limits
            image = matplotlib.colormaps["viridis"]((image - low) / max(high - low, 1e-12))[..., :3]
        picture = Image.fromarray(np.uint8(np.clip(image, 0, 1) * 255 + 0.5))
        picture.thumbnail((LARGEST, LARGEST))
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", lossless=max(picture.size) <= SMALL, quality=80)
        source = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
        if len(source) > self.left:
            return None
        self.left -= len(source)
        return source


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
        shown["box"] = {
            name: f"{100 * value / size:.3g}%"
            for name, value, size in (
                ("left", left, width), ("top", top, height), ("width", side, width), ("height", side, height)
            )
        }  # fmt: skip
    return shown
