"""What a running stage shows: a bar, averages, the first bad loss, and a wish to stop."""

import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import tqdm

from tinymim_jax import metrics
from tinymim_jax.config import InputError
from tinymim_jax.metrics import Mean
from tinymim_jax.writer import Writer

BAD_IMAGES = "bad_images"  # of a step: how many could not be read; written as a total
STEPS_AHEAD = 3  # dispatched and unfinished: enough to keep a device busy, few enough to hold few batches


class Progress:
    """Collects each step's metrics without waiting for it, and averages them between log lines.

    `state()` goes into the checkpoint, so that averages do not depend on where a run was interrupted.
    """

    def __init__(self, name: str, writer: Writer, *, start: int, total: int, batch_size: int, saved: dict | None):
        saved = saved or {"window": {}, "averages": {}, "bad_images": 0}
        self.bad_images = saved["bad_images"]
        self.window = {key: Mean(*sum_count) for key, sum_count in saved["window"].items()}
        self.averages: dict[str, float] = saved["averages"]
        self.name, self.writer, self.batch_size = name, writer, batch_size
        self.pending: list[tuple[int, dict[str, Mean]]] = []
        self.waited, self.since, self.images = 0.0, time.perf_counter(), 0
        self.bar = tqdm.tqdm(
            desc=name,
            initial=start * batch_size,
            total=total * batch_size,
            unit="img",
            unit_scale=True,
            mininterval=0.1 if sys.stderr.isatty() else 10,
        )

    def next_batch(self, batches: Iterator[Any]) -> Any:
        """next(batches), with the wait counted."""
        begin = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - begin
        return batch

    def add(self, step: int, step_metrics: dict[str, Mean]) -> None:
        """Takes step `step`'s metrics, still on the device."""
        self.pending.append((step, step_metrics))
        if len(self.pending) > STEPS_AHEAD:
            jax.block_until_ready(self.pending[-1 - STEPS_AHEAD])
        self.images += self.batch_size
        self.bar.update(self.batch_size)

    def collect(self) -> None:
        """Fetches what is pending; raises InputError at the first loss, gradient or weights that are not finite."""
        for step, values in jax.device_get(self.pending):
            bad = [k for k in ("loss", "grad_norm", "param_norm") if k in values and not math.isfinite(values[k].sum)]
            if bad:
                raise InputError(
                    f"stage {self.name}: the {bad[0]} is not finite at step {step}; the last good checkpoint is kept:"
                    " lower optim.lr or set optim.clip_norm, and run again"
                )
            if "labels_beyond_head" in values and values["labels_beyond_head"].sum:
                raise InputError(
                    f"stage {self.name}: step {step} has labels that model.num_classes leaves no output for;"
                    " set it to the number of classes of the data"
                )
            floats = {key: Mean(float(m.sum), float(m.count)) for key, m in values.items()}
            self.bad_images += int(floats.pop(BAD_IMAGES, Mean(0, 1)).sum)
            self.window = metrics.merge([self.window, floats])
        self.pending.clear()

    def log(self, step: int, extra: dict[str, float]) -> None:
        """Writes the averages since the last call, `extra`, images/s and the share of time spent waiting for data."""
        self.collect()
        seconds = time.perf_counter() - self.since
        self.averages = {**metrics.to_floats(self.window), **extra, BAD_IMAGES: self.bad_images}
        speed = {"images_per_s": self.images / seconds, "data_wait": self.waited / seconds}
        self.writer.write(step, {**self.averages, **speed})
        self.bar.set_postfix(loss=f"{self.averages['loss']:.4g}", refresh=False)
        self.window = {}
        self.waited, self.since, self.images = 0.0, time.perf_counter(), 0

    def state(self) -> dict[str, Any]:
        """The unfinished averages, as JSON types."""
        window = {key: [m.sum, m.count] for key, m in self.window.items()}
        return {"window": window, "averages": self.averages, "bad_images": self.bad_images}
