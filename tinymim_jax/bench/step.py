"""What a training step costs."""

import datetime
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import distributions
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path

from tinymim_jax.bench import torch_baseline
from tinymim_jax.data.pipeline import stacked
from tinymim_jax.experiment.config import Config, Stage
from tinymim_jax.planning import dry_run
from tinymim_jax.runtime import hlo_stats
from tinymim_jax.runtime import sharding as mesh_lib
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.training.setup import StageSetup, example_batch, make_setup
from tinymim_jax.training.step import create_state, jit_step

MATMUL_SIZES = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
CALLS = 10  # of a measurement of a peak: a GPU takes less for one than Python for asking
COPIED = 2**27  # numbers, more than caches hold
SETTING = re.compile("XLA_|LIBTPU_|NVIDIA_TF32|MALLOC_|GLIBC_TUNABLES|JAX_(DEFAULT|CPU|DISABLE)")


def step(cfg: Config, name: str, rounds: int, vs: str | None = None) -> dict[str, Any]:
    """Times the step of stage `name` and, in turn, the device's matmul peak and, with `vs` "torch", PyTorch's steps.

    Returns:
      images_per_s and step_s (medians), model_flops (counted by hand, a step) and xla_flops (what the compiler
      counts), matmul_flops_per_s (measured, same dtype), model_flops_share of it, memory_bytes_per_s (measured, as a
      large array is read and written), peak_memory_bytes. With `vs`, torch_matmul_flops_per_s, and for each of
      `torch_baseline.VARIANTS` its images_per_s and ratio, ours over theirs: the median over rounds.
    """
    stage, plan, mesh = prepared(cfg, name)
    if vs:
        torch_baseline.check(name, stage, jax.default_backend(), mesh.size)
    compiled, arguments = compile_step(plan, mesh)
    arguments, _ = timed_step(compiled, arguments)
    memory = peak_memory(compiled)  # before anything else takes some
    peaks = {"matmul_flops_per_s": matmul(stage.model.dtype), "memory_bytes_per_s": copying()}
    if vs:
        peaks["torch_matmul_flops_per_s"] = torch_baseline.matmul(stage.model.dtype, matmul_size(), CALLS)
    others = torch_baseline.steps(stage, dry_run.teacher_model(cfg, name, Path(f"runs/{cfg.name}"))) if vs else {}

    def ours() -> float:
        nonlocal arguments
        arguments, seconds = timed_step(compiled, arguments, stage.run.steps_per_call)
        return seconds

    steps, theirs, reached = _in_turn(rounds, ours, others, peaks)
    seconds = statistics.median(steps[1:])
    measured = {name: statistics.median(one[name] for one in reached[1:]) * mesh.size for name in peaks}
    model_flops = plan.task.flops_per_image() * stage.run.batch_size
    return {
        "benchmark": "step",
        "stage": name,
        **conditions(),
        "devices": mesh.size,
        **_asked(stage),
        "images_per_s": stage.run.batch_size / seconds,
        "step_s": seconds,
        "model_flops": model_flops,
        "xla_flops": hlo_stats.all_flops(compiled) * mesh.size / stage.run.steps_per_call,
        **measured,
        "model_flops_share": model_flops / seconds / measured["matmul_flops_per_s"],
        "peak_memory_bytes": memory,
        **{
            f"torch_{variant}": _compared(other, steps, [one[variant] for one in theirs], stage)
            for variant, other in others.items()
        },
    }


def _asked(stage: Stage) -> dict[str, Any]:
    kernel = {"relation_kernel": stage.task.relation_kernel} if stage.task.kind == "distill" else {}
    return {
        "dtype": stage.model.dtype,
        "attention": stage.model.attention,
        **kernel,
        "batch_size": stage.run.batch_size,
        "steps_per_call": stage.run.steps_per_call,
    }


def _in_turn(
    rounds: int,
    ours: Callable[[], float],
    others: dict[str, torch_baseline.TorchStep],
    peaks: dict[str, Callable[[], float]],
) -> tuple[list[float], list[dict[str, float]], list[dict[str, float]]]:
    """Of each round, the first of which warms up: seconds of our step, those of the others, and what peaks measure."""
    steps, theirs, reached = [], [], []
    for _ in range(rounds + 1):
        if others:
            ours()  # as in `torch_baseline.timed`
        steps.append(ours())
        theirs.append(torch_baseline.timed(others))
        reached.append({name: peak() for name, peak in peaks.items()})
        line = f"{steps[-1]:.3f} s a step, {reached[-1]['matmul_flops_per_s'] / 1e9:.0f} matmul GFLOP/s"
        print(line, *(f"torch {variant} {s:.3f} s" for variant, s in theirs[-1].items()), sep=", ", file=sys.stderr)
    return steps, theirs, reached


def conditions() -> dict[str, Any]:
    """What numbers of two runs may differ in: device, versions, variables that set how memory and XLA work."""
    kind = jax.devices()[0].device_kind
    return {
        "device": f"{processor()}, {os.cpu_count()} cores" if kind == "cpu" else kind,
        **software("jax", "jaxlib"),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if SETTING.match(name)},
    }


def software(*packages: str) -> dict[str, str]:
    """The time, and versions of Python and of those packages that are installed."""
    installed = {d.name.lower(): d.version for d in distributions() if d.name}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    found = {name: installed[name] for name in packages if name in installed}
    return {"time": now, "python": platform.python_version(), **found}


def processor() -> str:
    """What the system calls the host's."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return name[1] if name else platform.processor() or platform.machine()


def _compared(other: torch_baseline.TorchStep, ours: list[float], theirs: list[float], stage: Stage) -> dict[str, Any]:
    seconds = statistics.median(theirs[1:])
    return {
        "ratio": statistics.median(b / a for a, b in zip(ours[1:], theirs[1:], strict=True)),
        "images_per_s": stage.run.batch_size / seconds,
        "step_s": seconds,
        "torch": other.torch.__version__,
        "dtype": str(other.dtype).removeprefix("torch."),
        "peak_memory_bytes": other.peak_memory(),
    }


def augment(cfg: Config, name: str, rounds: int) -> dict[str, Any]:
    """Times the step of the classify stage `name` with and without mixup, cutmix and random erasing, in turn.

    Returns step_s and plain_step_s (medians), and share, how much of the step these augmentations take: the median
    over rounds, each a pair of steps.
    """
    if cfg.stages[name].task.kind != "classify":
        raise InputError(f"--stage={name} does not mix or erase images; choose a stage whose task is classify")
    stage, plan, mesh = prepared(cfg, name)
    full, per_call = compile_step(plan, mesh), stage.run.steps_per_call
    stage.task.mixup = stage.task.cutmix = stage.task.erasing = 0.0
    plain = compile_step(prepared(cfg, name)[1], mesh)
    seconds: list[tuple[float, float]] = []
    for _ in range(rounds + 1):  # the first round warms up
        (arguments, with_), (plain_arguments, without) = (timed_step(*one, per_call) for one in (full, plain))
        full, plain = (full[0], arguments), (plain[0], plain_arguments)
        seconds.append((with_, without))
        print(f"{with_:.4f} s a step, {without:.4f} s without", file=sys.stderr)
    return {
        "benchmark": "augment",
        "stage": name,
        **conditions(),
        "dtype": stage.model.dtype,
        "batch_size": stage.run.batch_size,
        "step_s": statistics.median(pair[0] for pair in seconds[1:]),
        "plain_step_s": statistics.median(pair[1] for pair in seconds[1:]),
        "share": statistics.median(1 - pair[1] / pair[0] for pair in seconds[1:]),
    }


def prepared(cfg: Config, name: str) -> tuple[Stage, StageSetup, jax.sharding.Mesh]:
    """Stage `name`, its plan for any data, and the mesh."""
    stage = cfg.stages[name]
    teacher = dry_run.teacher_model(cfg, name, Path(f"runs/{cfg.name}"))
    mesh = mesh_lib.make_mesh(cfg.mesh.data, cfg.mesh.fsdp)
    return stage, make_setup(stage, teacher, num_examples=1000 * stage.run.batch_size), mesh


def compile_step(plan: StageSetup, mesh: jax.sharding.Mesh) -> tuple[Any, tuple]:
    """The compiled train step of `plan` and arguments for it: fresh weights, a random teacher, random images.

    Images are cropped already, also where the stage's data is resident.
    """
    stage: Stage = plan.stage
    mesh_lib.check_batch(stage.run.batch_size, mesh, stage.optim.accum_steps)
    batch = example_batch(stage, stage.run.batch_size)
    batch["image"] = np.random.default_rng(0).integers(0, 256, batch["image"].shape, np.uint8)
    per_call = stage.run.steps_per_call
    batch = mesh_lib.put_batch(stacked([batch] * per_call, per_call), mesh, axis=int(per_call > 1))
    key = jax.random.key(0)
    state_shapes = jax.eval_shape(lambda: create_state(plan, key))
    shardings = mesh_lib.state_sharding(mesh, (state_shapes, plan.frozen))
    state, frozen = jax.jit(
        lambda: (create_state(plan, key), plan.task.init(key, example_batch(stage))[1]), out_shardings=shardings
    )()
    arguments = (state, frozen, batch, jax.device_put(key, mesh_lib.replicated(mesh)))
    return jit_step(plan, mesh, shardings[0], per_call).lower(*arguments).compile(), arguments


def timed_step(compiled: Any, arguments: tuple, per_call: int = 1) -> tuple[tuple, float]:
    """One call: the arguments of the next, and seconds of each of its steps."""
    begin = time.perf_counter()
    state, metrics = jax.block_until_ready(compiled(*arguments))
    seconds = (time.perf_counter() - begin) / per_call
    del metrics
    return (state, *arguments[1:]), seconds


def matmul_size() -> int:
    """Rows and columns of the product that shows what this machine can do at most."""
    return MATMUL_SIZES.get(jax.default_backend(), 4096)


def matmul(dtype: str) -> Callable[[], float]:
    """A function that measures one device's FLOP/s on a large square product in `dtype`."""
    n = matmul_size()
    a = (jax.random.normal(jax.random.key(0), (n, n)) * n**-0.5).astype(dtype)  # no product grows
    product = jax.jit(lambda x: jax.lax.fori_loop(0, CALLS, lambda _, y: y @ x, x))
    jax.block_until_ready(product(a))

    def measure() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(product(a))
        return CALLS * 2 * n**3 / (time.perf_counter() - begin)

    return measure


def copying() -> Callable[[], float]:
    """A function that measures the bytes a second that one device reads and writes, half of them each."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(add(jnp.zeros(COPIED)))

    def measure() -> float:
        nonlocal x
        begin = time.perf_counter()
        for _ in range(CALLS):
            x = add(x)
        jax.block_until_ready(x)
        return CALLS * 2 * x.nbytes / (time.perf_counter() - begin)

    return measure


def peak_memory(compiled: Any) -> int:
    """Bytes: what the device counted at its peak, or where it does not count, what the compiler reserves."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
