"""What the relation loss and its gradient cost, beside the plain way of writing them."""

import functools
import math
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.bench.step import prepared
from tinymim_jax.bench.timing import clock_of, heading, in_turn, of_linux, ratio
from tinymim_jax.experiment.config import Config, Relation
from tinymim_jax.objectives.relation_kl import Pair, relation_kl, with_kernel
from tinymim_jax.objectives.relations import relation_logits
from tinymim_jax.runtime.codec import walk
from tinymim_jax.runtime.errors import InputError

CALLS = 10  # of a measurement: a GPU needs less for one than it takes to ask for it


def plain(teacher: Pair, student: Pair) -> jax.Array:
    """`relation_kl` with whole relations, left to automatic differentiation."""
    log_t = jax.lax.stop_gradient(jax.nn.log_softmax(relation_logits(*teacher)))
    log_p = jax.nn.log_softmax(relation_logits(*student))
    return jnp.sum(jnp.exp(log_t) * (log_t - log_p), axis=-1).mean(axis=(1, 2))


def relation(cfg: Config, name: str, rounds: int, tokens: list[str], rows: int | None = None) -> dict[str, Any]:
    """Times one relation's loss and gradient at the heads and widths of the distillation stage `name`, in turn.

    `rows` of the queries are worked on at a time (None: as the stage would). Returns, for each number of tokens (none
    given: the stage's), the kernel that runs here, medians of seconds, the bytes that the compiled program needs beside
    its arguments, and time_ratio, ours over the plain one's: the median over rounds. The plain one is left out where
    it does not fit.
    """
    targets = [target for _, target in walk(cfg.stages[name].task, Relation)]
    if not targets:
        raise InputError(f"--stage={name} matches no relations; choose a stage whose task is distill")
    target, (stage, setup, _) = targets[0], prepared(cfg, name)
    if not target.softmax:
        raise InputError(f"--stage={name} compares products without softmax; choose one whose relations have it")
    heads = target.relation_heads or stage.model.heads_of(target.student_block)
    blocks = (setup.task.teacher_cfg, target.teacher_block), (stage.model, target.student_block)
    widths = [model.width_of(block) // heads for model, block in blocks]
    sizes = [_positive(text) for text in tokens] or [stage.model.grid**2 + stage.model.num_prefix]
    ours = functools.partial(relation_kl, rows=rows, kernel=target.kernel)
    found = {}
    for n in sizes:
        rng, shapes = np.random.default_rng(0), [(stage.run.batch_size, n, heads, width) for width in widths]
        teacher, student = (tuple(jnp.asarray(rng.normal(size=s), stage.model.dtype) for _ in range(2)) for s in shapes)
        platforms = with_kernel(target.kernel, teacher[0].swapaxes(1, 2), student[0].swapaxes(1, 2))
        is_ours = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend()) in platforms
        found[n] = {"kernel": "pallas" if is_ours else "xla", **_measure(ours, teacher, student, rounds)}
        beside = f"{found[n]['time_ratio']:.2f} of the plain one's" if "plain_s" in found[n] else "plain does not fit"
        print(f"{n} tokens: {found[n]['ours_s']:.4f} s, {beside}", file=sys.stderr)
    return {**heading("relation", name, stage), "heads": heads, "rows": rows, "tokens": found}


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise InputError(f"--tokens: {text!r} is not a positive whole number; give e.g. --tokens=197,1025")
    return int(text)


def _measure(ours: Callable, teacher: Pair, student: Pair, rounds: int) -> dict[str, Any]:
    compiled = {"ours": _compile(ours, teacher, student)}
    try:
        compiled["plain"] = _compile(plain, teacher, student)
    except jax.errors.JaxRuntimeError as error:  # XLA's own limit
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
    sizes = {key: f.memory_analysis().temp_size_in_bytes for key, f in compiled.items()}
    if sizes.get("plain", 0) > free_memory():
        del compiled["plain"]
    clocks = {f"{key}_s": clock_of(functools.partial(f, student, teacher), CALLS) for key, f in compiled.items()}
    seconds = in_turn(clocks, rounds)
    found: dict[str, Any] = {key: statistics.median(values) for key, values in seconds.items()}
    found |= {f"{key}_bytes": size for key, size in sizes.items()}
    if "plain" in sizes:
        found["bytes_ratio"] = sizes["ours"] / sizes["plain"]
    if "plain" in compiled:
        found["time_ratio"] = ratio(seconds["ours_s"], seconds["plain_s"])
    return found


def _compile(function: Callable, teacher: Pair, student: Pair) -> Any:
    return jax.jit(jax.value_and_grad(lambda s, t: function(t, s).mean())).lower(student, teacher).compile()


def free_memory() -> float:
    """Bytes of the first device that programs may take now."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    available = of_linux("meminfo", r"MemAvailable:\s*(\d+) kB")
    return 1024 * int(available) if available else math.inf
