"""Scalars to `metrics.jsonl`, `metrics.csv`, TensorBoard and, where `WANDB_PROJECT` is set, Weights & Biases."""

import contextlib
import csv
import io
import itertools
import json
import os
import threading
import uuid
from collections.abc import Iterable
from typing import Any

import jax
from etils.epath import Path

from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError

EVERY = 2.0  # seconds between two writes of metrics.jsonl: a bucket takes a file as a whole, and one a second


class MetricLog(contextlib.AbstractContextManager):
    """Adds scalars under `folder`; lines after step `start` are dropped first, so a resumed run has no repeats."""

    def __init__(self, folder: Path, start: int = 0, *, active: bool = True):
        """`active` False, on all processes but one: writes nothing."""
        self.path, self.active = folder / "metrics.jsonl", active
        if not active:
            return
        self.kept = [line for line in read(self.path) if line["step"] <= start]
        storage.make(folder)
        self.tracked = _tracked(folder, start)
        self.lines, self.written = [json.dumps(line) + "\n" for line in self.kept], -1
        self.lock, self.closed = threading.Lock(), threading.Event()
        self.flush()
        threading.Thread(target=self._follow, daemon=True).start()  # training does not wait for a bucket
        import tensorboardX.record_writer  # imports PyTorch where it can, for seconds: a dry run does without

        for scheme in (*storage.EXTRAS, "file"):
            tensorboardX.record_writer.register_writer_factory(scheme, EventFile)
        storage.make(folder / "tensorboard")
        url = storage.files(folder).unstrip_protocol(str(folder / "tensorboard"))
        self.board = tensorboardX.SummaryWriter(url, purge_step=start + 1)

    def has(self, step: int, starts: tuple[str, ...]) -> bool:
        """Whether a line of `step` with a name that begins so was there when this log, active, was made."""
        return any(line["step"] == step and any(name.startswith(starts) for name in line) for line in self.kept)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """One line {"step": step, name: value, ...}; in the file after `EVERY` seconds, or `flush`."""
        line = {"step": step, **scalars}
        if not self.active or line in self.kept:  # the latter: an evaluation done again after a crash
            return
        self.lines.append(json.dumps(line) + "\n")
        for name, value in scalars.items():
            self.board.add_scalar(name, value, step)
        if self.tracked:
            self.tracked.log(line)

    def flush(self) -> None:
        """Returns when all lines are in the files; a checkpoint must not know more than that."""
        if self.active:
            self._write_lines()
            write_whole(self.path.with_suffix(".csv"), table(map(json.loads, self.lines)))

    def _write_lines(self) -> None:
        with self.lock:
            lines = list(self.lines)
            if len(lines) != self.written:
                write_whole(self.path, "".join(lines))
                self.written = len(lines)

    def _follow(self) -> None:
        while not self.closed.wait(EVERY):
            with contextlib.suppress(Exception):  # raised by whoever waits for the lines
                self._write_lines()

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self.active:
            self.closed.set()
            self.board.close()
            with contextlib.suppress(Exception) if kind else contextlib.nullcontext():  # the first error is the cause
                self.flush()
            if self.tracked:
                self.tracked.finish(exit_code=int(kind is not None))


def tracker() -> Any:
    """The package wandb if `WANDB_PROJECT` is set, else None; raises InputError if it is missing."""
    if not os.environ.get("WANDB_PROJECT"):
        return None
    try:
        import wandb
    except ImportError:
        raise InputError("WANDB_PROJECT is set and the package is missing: pip install wandb, or unset it") from None
    return wandb


def _tracked(folder: Path, start: int) -> Any:
    """A run of Weights & Biases, the same one again where a stage goes on; None if it is not asked for."""
    if (wandb := tracker()) is None:
        return None
    known, config = folder / "wandb_id", json.loads((folder / "stage.json").read_text())
    if not (start and known.exists()):
        write_whole(known, uuid.uuid4().hex)
    name = f"{folder.parent.name}/{folder.name}"
    try:
        run = wandb.init(id=known.read_text(), resume="allow", name=name, config=config)
    except wandb.Error as error:
        raise InputError(
            f"WANDB_PROJECT is set, and Weights & Biases did not start ({storage.reason(error)}); log in (wandb login),"
            " set WANDB_MODE=offline, or unset it"
        ) from None
    run.define_metric("*", step_metric="step")  # results of an evaluation come after later steps
    return run


def table(lines: Iterable[dict[str, float]]) -> str:
    """Lines of metrics as CSV: a row for each step, a column for each name."""
    rows: dict[int, dict[str, float]] = {}
    for line in lines:
        rows.setdefault(line["step"], {}).update(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(itertools.chain(*rows.values()))), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[step] for step in sorted(rows))
    return text.getvalue()


class EventFile:
    """What TensorBoard reads: written as a whole, and again at the next flush if that fails.

    tensorboardX' own ends its thread when a disk is full or a bucket fails, and then blocks whoever writes.
    """

    def __init__(self, path: str):
        self.path, self.content = path, bytearray()

    def write(self, data: bytes) -> None:
        """Adds to the file."""
        self.content += data

    def flush(self) -> None:
        """Tries to write the file."""
        with contextlib.suppress(Exception):
            storage.files(self.path).pipe_file(self.path, bytes(self.content))

    close = flush

    @classmethod
    def open(cls, path: str) -> "EventFile":
        """A new file, as tensorboardX asks for it."""
        return cls(path)

    @staticmethod
    def directory_check(path: str) -> None:
        """Nothing: `MetricLog` has made the folder."""


def read(path: Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`, up to one that is damaged; [] if there is no file."""
    lines = []
    with contextlib.suppress(ValueError, TypeError, KeyError):
        for text in path.read_bytes().splitlines() if path.exists() else []:
            line = json.loads(text)
            int(line["step"])
            lines.append(line)
    return lines


def read_done(path: Path) -> dict[str, float]:
    """The final metrics in a stage's `DONE`; raises InputError if it is damaged."""
    try:
        return dict(json.loads(path.read_text())["metrics"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged; delete it, and the stage goes on from its newest checkpoint") from None


def write_json(path: Path, value: Any) -> None:
    """Writes `value` to `path`, which never holds half of it; in process 0 alone."""
    if jax.process_index() == 0:
        storage.make(path.parent)
        write_whole(path, json.dumps(value, indent=2) + "\n")


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes `content` to `path`, which never holds half of it."""
    files, partial = storage.files(path), f"{path}.partial"
    with storage.writing(path):
        files.pipe_file(partial, content.encode() if isinstance(content, str) else content)
        files.mv(partial, str(path))
