"""The names and colours of the classes of masks: from a file beside the images, else colours of our own."""

import colorsys
import re
from typing import Any

import fsspec
import numpy as np

from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.storage import reason

PLAIN, TABLE = "classes.txt", "objectInfo150.txt"  # a class a line; ADE20K's, whose columns have names
COLOURED = re.compile(r"(.*\S)[\s,;]+(\d+)[\s,;]+(\d+)[\s,;]+(\d+)")
GOLDEN = 0.618034  # of the circle: steps of hue that never come near each other
SHADES = ((0.8, 0.9), (0.5, 1.0), (0.9, 0.55))  # saturation and value, in turn

Colours = np.ndarray  # uint8 [C, 3], RGB


def read(files: fsspec.AbstractFileSystem, tree: str) -> tuple[tuple[str, ...] | None, Colours | None]:
    """What `tree` says of its classes in `classes.txt` or `objectInfo150.txt`: None where it says nothing.

    A line of the first is a name, or a name and R G B. Raises InputError if it is something else.
    """
    for name, parse in ((PLAIN, _plain), (TABLE, _table)):
        file = f"{tree}/{name}"
        if files.isfile(file):
            try:
                lines = [line.strip() for line in files.cat_file(file).decode("utf-8-sig").splitlines()]
            except Exception as error:  # each bucket's library has its own
                raise InputError(f"{file}: cannot be read ({reason(error)}); mend or remove it") from error
            if not any(lines):
                raise InputError(f"{file}: names no classes; write one a line, or remove it")
            return parse(file, lines)
    return None, None


def _plain(file: str, lines: list[str]) -> tuple[tuple[str, ...], Colours | None]:
    numbered = {number: line for number, line in enumerate(lines, 1) if line}
    found = {number: COLOURED.fullmatch(line) for number, line in numbered.items()}
    if not any(found.values()):
        return tuple(numbered.values()), None
    for number, match in found.items():
        if match is None or max(map(int, match.groups()[1:])) > 255:
            raise InputError(
                f"{file}, line {number}: {numbered[number]!r} is no NAME R G B with colours up to 255, as other lines"
                " are; write all of them so, or none"
            )
    colours = [[int(level) for level in match.groups()[1:]] for match in found.values()]
    return tuple(match[1] for match in found.values()), np.array(colours, np.uint8)


def _table(file: str, lines: list[str]) -> tuple[tuple[str, ...], None]:
    header, *rows = (line.split("\t") for line in lines if line)
    try:
        column = header.index("Name")
        return tuple(row[column] for row in rows), None
    except (ValueError, IndexError):
        raise InputError(f"{file}: is no table with a column Name between tabs; take ADE20K's, or remove it") from None


def palette(count: int) -> Colours:
    """The same colours for any `count`, no two alike, neighbours far apart."""
    shades = [(i * GOLDEN % 1, *SHADES[i % len(SHADES)]) for i in range(count)]
    levels = np.array([colorsys.hsv_to_rgb(*shade) for shade in shades]).reshape(-1, 3)
    return np.round(255 * levels).astype(np.uint8)


def colours(source: Any, count: int) -> Colours:
    """Of the `count` classes of a source's masks: its own where it has any (`Pairs.colours`), else `palette`."""
    own = getattr(source, "colours", None)
    return palette(count) if own is None else own
