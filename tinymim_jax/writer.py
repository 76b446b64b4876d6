"""Scalars to `metrics.jsonl` and TensorBoard."""

import json
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter


class Writer:
    """Appends scalars under `folder`; lines after step `start` are dropped first, so a resumed run has no repeats."""

    def __init__(self, folder: Path, start: int = 0, *, active: bool = True):
        """`active` False, on all processes but one: writes nothing."""
        self.path, self.active = folder / "metrics.jsonl", active
        if not active:
            return
        self.kept = [line for line in read(self.path) if line["step"] <= start]
        folder.mkdir(parents=True, exist_ok=True)
        _write_whole(self.path, "".join(json.dumps(line) + "\n" for line in self.kept))
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def has(self, step: int, part: str) -> bool:
        """Whether a line of `step` with a name that contains `part` was there when this writer was made.

        One that is not active does not know, and says yes: the one that is decides.
        """
        return not self.active or any(line["step"] == step and any(part in name for name in line) for line in self.kept)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """One line {"step": step, name: value, ...}, flushed."""
        line = {"step": step, **scalars}
        if not self.active or line in self.kept:  # the latter: an evaluation done again after a crash
            return
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for name, value in scalars.items():
            self.board.add_scalar(name, value, step)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self.file.close()
            self.board.close()


def read(path: Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`, without a last one cut short by a crash; [] if there is no file."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def write_json(path: Path, value: Any) -> None:
    """Writes `value` to `path`, which never holds half of it; in process 0 alone."""
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, json.dumps(value, indent=2) + "\n")


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
