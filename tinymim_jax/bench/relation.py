"""What the relation loss and its gradient cost, beside the plain way of writing them."""

import functools
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.bench.step import prepared
from tinymim_jax.config import Config, InputError, Stage
from tinymim_jax.models import flops, vit
from tinymim_jax.objectives.relation_kl import Pair, relation_kl
from tinymim_jax.objectives.relations import relation_logits

MAX_DENSE = 8e9  # bytes of the plain one's relations, above which it is left out
CALLS = 10  # of a measurement: a GPU needs less for one than it takes to ask for it


def plain(teacher: Pair, student: Pair) -> jax.Array:
    """`relation_kl` with whole relations, left to automatic differentiation."""
    log_t = jax.lax.stop_gradient(jax.nn.log_softmax(relation_logits(*teacher)))
    log_p = jax.nn.log_softmax(relation_logits(*student))
    return jnp.sum(jnp.exp(log_t) * (log_t - log_p), axis=-1).mean(axis=(1, 2))


def relation(cfg: Config, name: str, rounds: int, tokens: list[str]) -> dict[str, Any]:
    """Times one relation's loss and gradient at the heads and widths of the distillation stage `name`, in turn.

    Returns, for each number of tokens (none given: the stage's), medians of seconds, the bytes that the compiled
    program needs beside its arguments, and time_ratio, ours over the plain one's: the median over rounds.
    """
    if cfg.stages[name].task.kind != "distill":
        raise InputError(f"--stage={name} matches no relations; choose a stage whose task is distill")
    stage, plan, _ = prepared(cfg, name)
    heads = vit.heads_of(stage.model, stage.task.student_block)
    widths = [model.width // heads for model in (plan.task.teacher_cfg, stage.model)]
    sizes = [_positive(text) for text in tokens] or [flops.num_tokens(stage.model)]
    return {
        "benchmark": "relation",
        "stage": name,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "dtype": stage.model.dtype,
        "batch_size": stage.run.batch_size,
        "heads": heads,
        "kernel": stage.task.relation_kernel,
        "tokens": {n: _measure(stage, n, heads, widths, rounds) for n in sizes},
    }


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise InputError(f"--tokens: {text!r} is not a positive whole number; give e.g. --tokens=197,1025")
    return int(text)


def _measure(stage: Stage, n: int, heads: int, widths: list[int], rounds: int) -> dict[str, Any]:
    batch, dtype = stage.run.batch_size, stage.model.dtype
    rng = np.random.default_rng(0)
    teacher, student = (
        tuple(jnp.asarray(rng.normal(size=(batch, n, heads, width)), dtype) for _ in range(2)) for width in widths
    )
    ours = functools.partial(relation_kl, kernel=stage.task.relation_kernel)
    functions = {"ours": ours, "plain": plain}
    if batch * heads * n * n * 4 > MAX_DENSE:
        del functions["plain"]
    compiled = {
        key: jax.jit(jax.value_and_grad(lambda s, t, f=f: f(t, s).mean())).lower(student, teacher).compile()
        for key, f in functions.items()
    }
    seconds: dict[str, list[float]] = {key: [] for key in compiled}
    for _ in range(rounds + 1):  # the first round warms up
        for key, function in compiled.items():
            begin = time.perf_counter()
            for _ in range(CALLS):
                result = function(student, teacher)
            jax.block_until_ready(result)
            seconds[key].append((time.perf_counter() - begin) / CALLS)
    found: dict[str, Any] = {f"{key}_s": statistics.median(values[1:]) for key, values in seconds.items()}
    found |= {f"{key}_bytes": f.memory_analysis().temp_size_in_bytes for key, f in compiled.items()}
    if "plain" in seconds:
        pairs = zip(seconds["ours"][1:], seconds["plain"][1:], strict=True)
        found["time_ratio"] = statistics.median(a / b for a, b in pairs)
        found["bytes_ratio"] = found["ours_bytes"] / found["plain_bytes"]
    ratio = f", {found['time_ratio']:.2f} of the plain one's" if "plain" in seconds else "; the plain one does not fit"
    print(f"{n} tokens: {found['ours_s']:.4f} s{ratio}", file=sys.stderr)
    return found
