"""What is won by training students of one teacher in one program."""

import statistics
from typing import Any

import jax
import jax.numpy as jnp

from tinymim_jax.bench.step import compile_step, prepared, step_clock
from tinymim_jax.bench.timing import heading, in_turn, ratio
from tinymim_jax.experiment.config import Config
from tinymim_jax.runtime import hlo_stats
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.training.chain import can_share
from tinymim_jax.training.step import jit_step, side_by_side


def beside(cfg: Config, name: str, rounds: int, students: int) -> dict[str, Any]:
    """Times one program of `students` students like stage `name` and, in turn, as many steps of the stage alone.

    Returns:
      alone_s and together_s (medians, a step of all), ratio of the two, which is that of each student's images a second
      (the median over rounds), flops_ratio, what it would be by the operations that the compiler counts, and the bytes
      that the two programs take.
    """
    stage, setup, mesh = prepared(cfg, name)
    if not can_share(stage, stage):
        raise InputError(f"--stage={name} shares no teacher's pass; choose a stage that distils, of configs/*/study.py")
    per_call = stage.run.steps_per_call
    alone, arguments = compile_step(setup, mesh)
    states = tuple(jax.tree.map(jnp.copy, arguments[0]) for _ in range(students))  # each step gives its state away
    shardings = jax.tree.map(lambda x: x.sharding, states)
    joint = states, *arguments[1:3], (arguments[3],) * students
    together = jit_step(side_by_side([setup] * students), mesh, shardings, per_call).lower(*joint).compile()
    clock = step_clock(alone, arguments, per_call)
    clocks = {
        "alone_s": lambda: sum(clock() for _ in range(students)),
        "together_s": step_clock(together, joint, per_call),
    }
    found = in_turn(clocks, rounds)
    return {
        **heading("beside", name, stage),
        "students": students,
        **{key: statistics.median(values) for key, values in found.items()},
        "ratio": ratio(found["alone_s"], found["together_s"]),
        "flops_ratio": students * hlo_stats.all_flops(alone) / hlo_stats.all_flops(together),
        "alone_bytes": hlo_stats.memory_bytes(alone),
        "together_bytes": hlo_stats.memory_bytes(together),
    }
