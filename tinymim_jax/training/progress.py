"""What a running stage shows: a bar, averages, the first bad loss, and a wish to stop."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from tinymim_jax.experiment.config import Run
from tinymim_jax.objectives import metrics
from tinymim_jax.objectives.metrics import Mean
from tinymim_jax.runtime.errors import InputError, Unavailable
from tinymim_jax.runtime.metric_log import MetricLog
from tinymim_jax.runtime.preemption import StopRequest
from tinymim_jax.runtime.progress_bar import bar

BAD_IMAGES = "bad_images"  # of a step: how many could not be read; written as a total
SKIPPED = "skipped"  # updates left out because they were not finite; a total
ASKED = "asked"  # of a step: rows whose process was asked to stop
FAILED = "failed"  # and rows whose process has failed
TOLD = (ASKED, FAILED)
LR = "lr"  # of a step; what is logged is the last one, no average
FINITE = ("loss", "grad_norm", "param_norm")  # what an update must be to be made
STEPS_AHEAD = 3  # dispatched and unfinished: enough to keep a device busy, few enough to hold few batches


class Progress:
    """Collects each step's metrics without waiting for it, and averages them between log lines.

    `state()` goes into the checkpoint, so that averages do not depend on where a run was interrupted.
    """

    def __init__(
        self,
        name: str,
        writer: MetricLog,
        *,
        start: int,
        total: int,
        run: Run,
        saved: dict | None,
        stop: StopRequest,
        note: Callable[[int, str], str] = lambda step, what: "",
        begin: float | None = None,
        title: str | None = None,
    ):
        """Goes on after step `start` of `total`, with what was `saved` there.

        `stop` is what this process was asked for; `note` writes down what a step that is not finite was given, and
        returns where; `begin`, as `time.perf_counter` gave it, is the stage's, from which its first step is timed;
        `title` is what the bar says, "" for none, None for `name`.
        """
        saved = saved or {"window": {}, "averages": {}, "totals": {}}
        self.totals = {BAD_IMAGES: 0, **saved["totals"]}
        self.run, self.note, self.stop, self.has_heard = run, note, stop, False
        self.window = {key: Mean(*sum_count) for key, sum_count in saved["window"].items()}
        self.averages: dict[str, float] = saved["averages"]
        self.name, self.writer, self.batch_size, self.replicas = name, writer, run.batch_size, run.replicas
        self.pending: list[tuple[int, dict[str, Mean]]] = []
        self.waited, self.since, self.images = 0.0, time.perf_counter(), 0
        self.begin, self.first_step = begin, None
        shown = {"initial": start, "disable": title == "" or not writer.active or start == total}
        self.bar = bar(title or name, total, "step", first="compiling", speed=(run.batch_size, "img"), **shown)

    def add(self, step: int, step_metrics: dict[str, Mean], waited: float = 0.0) -> None:
        """Takes the metrics, still on the device, of step `step`, or stacked of the steps up to it.

        `waited` are the seconds that their batches were waited for.
        """
        self.waited += waited
        self.pending.append((step, step_metrics))
        if len(self.pending) > STEPS_AHEAD:
            done, finished = self.pending[-1 - STEPS_AHEAD]
            jax.block_until_ready(finished)
            self._note_done(done)
            if jax.process_count() > 1:
                self._hear(finished)
        self.images += self.batch_size * (next(iter(step_metrics.values())).sum.size // self.replicas)

    def _note_done(self, step: int) -> None:
        if self.begin is not None:
            self.first_step, self.begin = time.perf_counter() - self.begin, None
        self.bar.update(step - self.bar.n)

    def _hear(self, values: dict[str, Mean]) -> None:
        """Learns whether any process had been asked to stop, or had failed, when it read this step's batch."""
        self.has_heard = self.has_heard or bool(ASKED in values and np.any(values[ASKED].sum))
        if FAILED in values and np.any(values[FAILED].sum):
            self.stop.raise_failure()
            raise Unavailable(f"stage {self.name}: another process has failed; its log says why")

    def is_asked(self) -> bool:
        """Whether to stop after this step, alike in every process."""
        return self.has_heard if jax.process_count() > 1 else self.stop.asked

    def collect(self) -> None:
        """Fetches what is pending; raises InputError at a loss, gradient or weights that are not finite.

        Where `run.on_nan` is skip, the step has left out that update, and it is only counted, up to `run.max_skipped`.
        """
        pending = jax.device_get(self.pending)
        if pending:
            self._note_done(pending[-1][0])
        for step, values in (one for last, stack in pending for one in self._unstacked(last, stack)):
            self._hear(values)
            if BAD_IMAGES in values:  # replicas that share their batches count the same ones
                bad = values[BAD_IMAGES].sum
                self.totals[BAD_IMAGES] += int(bad[0] if self.run.data_seed is not None else np.sum(bad))
            for replica in range(self.replicas):
                self._take(step, replica, {key: Mean(m.sum[replica], m.count[replica]) for key, m in values.items()})
        self.pending.clear()

    def _take(self, step: int, replica: int, values: dict[str, Mean]) -> None:
        """Adds what one replica has measured at a step to the window."""
        others = (*TOLD, BAD_IMAGES)
        floats = {key: Mean(float(m.sum), float(m.count)) for key, m in values.items() if key not in others}
        if (beyond := floats.get("labels_beyond_head")) and beyond.sum:
            raise InputError(
                f"stage {self.name}: step {step} has labels that model.num_classes leaves no output for;"
                " set it to the number of classes of the data"
            )
        bad = [k for k in FINITE if k in floats and not math.isfinite(floats[k].sum)]
        if bad:
            self._skip(step, bad[0] if self.replicas == 1 else f"{bad[0]} of replica {replica}")
            return
        self.window.pop(LR, None)
        self.window = metrics.merge([self.window, floats])
        if self.replicas > 1:
            own = {replica_metric(replica, key): value for key, value in floats.items() if key != LR}
            self.window = metrics.merge([self.window, own])

    def _unstacked(self, last: int, stack: dict[str, Mean]) -> Iterator[tuple[int, dict[str, Mean]]]:
        """Each step of which `last` is the last, with its metrics [R]."""
        flat = jax.tree.map(lambda x: np.reshape(x, (-1, self.replicas)), stack)
        count = len(next(iter(flat.values())).sum)
        for i in range(count):
            yield last - count + 1 + i, jax.tree.map(lambda x, i=i: x[i], flat)

    def _skip(self, step: int, what: str) -> None:
        where = self.note(step, what)
        told = f"stage {self.name}: the {what} is not finite at step {step}{where}"
        if self.run.on_nan == "stop":
            raise InputError(
                f"{told}; what was saved before is kept: lower optim.lr, set optim.clip_norm, or leave such updates"
                " out with run.on_nan=skip, and run again"
            )
        self.totals[SKIPPED] = self.totals.get(SKIPPED, 0) + 1
        if self.totals[SKIPPED] > self.run.max_skipped * self.replicas:
            raise InputError(
                f"{told}, after {self.run.max_skipped} such updates were left out (run.max_skipped); the last good"
                " checkpoint is kept: lower optim.lr or set optim.clip_norm, and run again"
            )
        self.bar.write(f"{told}; its update is left out", file=sys.stderr)

    def log(self, step: int, extra: dict[str, float]) -> None:
        """Writes the averages since the last call, `extra`, images/s and the share of time spent waiting for data.

        The first line has first_step_s, seconds from the stage's begin to the end of its first steps, too.
        """
        self.collect()
        seconds = time.perf_counter() - self.since
        self.averages = {**metrics.to_floats(self.window), **extra, **self.totals}
        speed = {"images_per_s": self.images / seconds, "data_wait": self.waited / seconds}
        if self.first_step is not None:
            speed["first_step_s"], self.first_step = self.first_step, None
        self.writer.write(step, {**self.averages, **speed})
        if "loss" in self.averages:  # not if every update was left out
            self.bar.note = f" loss {self.averages['loss']:.4g}"
        self.window = {}
        self.waited, self.since, self.images = 0.0, time.perf_counter(), 0

    def state(self) -> dict[str, Any]:
        """The unfinished averages, as JSON types."""
        window = {key: [m.sum, m.count] for key, m in self.window.items()}
        return {"window": window, "averages": self.averages, "totals": self.totals}


def replica_metric(replica: int, name: str) -> str:
    """The name of a metric of one of several replicas."""
    return f"replica{replica}/{name}"
