"""What the host does for a batch."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import simplejpeg

from tinymim_jax.bench.timing import Clock, clock_of, in_turn, processor, ratio, software
from tinymim_jax.data import fast_jpeg, pipeline, sources
from tinymim_jax.data.augment import load
from tinymim_jax.data.decode import decode
from tinymim_jax.data.rows import image_rng
from tinymim_jax.experiment.config import Config, Data

IMAGES = 300  # of a measurement on one core
IN_TURN = 50  # of these: noise is shared, caches are those of the kind of work
BATCH_SIZE = 32  # of one on all cores
BATCHES = 20

Work = Callable[[bytes | np.ndarray, str, int], Any]


def loader(cfg: Config, name: str, rounds: int) -> dict[str, Any]:
    """Times the host's work for stage `name`, reading included: on one core, on the same images in turn; on all cores.

    Returns:
      images/s (medians; a core's seconds are those that it works) of decode (at full size, by libjpeg-turbo), pil (its
      decode, random-resized-crop and flip: the baseline) and transform (what the stage asks for but RandAugment), the
      last as a multiple of the others (medians over rounds); all_cores, what the pipeline makes of it with the stage's
      workers and with one on each core, also as a multiple of what all cores decode at most. Where the stage asks for
      RandAugment, also with it.
    """
    data = dataclasses.replace(cfg.stages[name].data, transform="train")
    plain = dataclasses.replace(data, rand_augment="")
    source = sources.open_source(data)
    wanted = {"transform": plain} | ({"rand_augment": data} if data.rand_augment else {})
    exact = dataclasses.replace(plain, fast_crop=False)
    work = {"decode": _decode, "pil": _loading(exact)} | {key: _loading(value) for key, value in wanted.items()}

    rates = _one_core(source, work, rounds)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    decoded = cores * statistics.median(rates["decode"])
    return {
        "benchmark": "loader",
        "stage": name,
        "processor": processor(),
        **software("numpy", "pillow", "simplejpeg", "cykooz-resizer"),
        "cores": cores,
        "image_size": data.image_size,
        "fast_crop": data.fast_crop,
        **{f"{key}_images_per_s": statistics.median(values) for key, values in rates.items()},
        "of_pil": ratio(rates["transform"], rates["pil"]),
        "of_decode": ratio(rates["transform"], rates["decode"]),
        "all_cores": [
            _all_cores(dataclasses.replace(value, workers=workers), source, rounds, key, decoded)
            for key, value in wanted.items()
            for workers in sorted({data.workers, cores})
        ],
    }


def _decode(image: bytes | np.ndarray, name: str, index: int) -> np.ndarray:
    if isinstance(image, bytes) and fast_jpeg.read_header(image) is not None:
        with contextlib.suppress(ValueError):  # damaged: PIL's to judge
            return simplejpeg.decode_jpeg(image)
    return np.asarray(decode(image, name))


def _loading(data: Data) -> Work:
    return lambda image, name, index: load(image, name, data, image_rng(0, 0, index))


def _one_core(source: sources.Source, work: dict[str, Work], rounds: int) -> dict[str, list[float]]:
    """Images a second of one core's time, for each kind of work in each round."""
    chosen = np.random.default_rng(0).permutation(len(source))[:IMAGES].tolist()
    turns = -(-len(chosen) // IN_TURN)

    def clock(function: Work) -> Clock:
        indices = itertools.cycle(chosen)

        def call() -> None:
            index = next(indices)
            function(source[index]["image"], source.describe(index), index)

        return clock_of(call, IN_TURN, time.thread_time)

    seconds = in_turn({f"{key}_s": clock(function) for key, function in work.items()}, rounds, turns)
    return {key: [turns / s for s in seconds[f"{key}_s"]] for key in work}


def _all_cores(data: Data, source: sources.Source, rounds: int, key: str, decoded: float) -> dict[str, Any]:
    """Images/s (median) that worker processes keep up with, as a multiple of `decoded` too; their start is left out."""
    rows = pipeline.train_rows(data, source, min(BATCH_SIZE, len(source)), seed=0)
    kept = data.prefetch + data.workers * (data.threads + 1)  # batches that lie ready when nobody has taken any
    # As many more at the end: the last round, too, has what comes behind it to make.
    batches = pipeline.host_batches(rows, 0, 2 * kept + (rounds + 1) * BATCHES)
    try:
        collections.deque(itertools.islice(batches, kept), maxlen=0)
        clock = clock_of(functools.partial(next, batches), BATCHES)
        (seconds,) = in_turn({f"batch_s with {data.workers} workers": clock}, rounds).values()
    finally:
        batches.close()
    rate = rows.batch_size / statistics.median(seconds)
    how = {"workers": data.workers, "threads": data.threads}
    return {**how, f"{key}_images_per_s": rate, "of_decode": rate / decoded}
