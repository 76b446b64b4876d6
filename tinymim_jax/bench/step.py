"""What a training step costs."""

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path

from tinymim_jax.bench import torch_baseline
from tinymim_jax.bench.timing import Clock, clock_of, heading, in_turn, ratio
from tinymim_jax.data.pipeline import stacked
from tinymim_jax.experiment.config import Config, Stage
from tinymim_jax.models.contract import Encoder
from tinymim_jax.runtime import codec, hlo_stats, keys, sharding
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.training.setup import StageSetup, example_batch, make_setup, step_batch
from tinymim_jax.training.start import source_model
from tinymim_jax.training.step import create_state, host_keys, jit_step, stage_keys, train_step

MATMUL_SIZES = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
CALLS = 10  # of a measurement of a peak: a GPU takes less for one than Python for asking
COPIED = 2**27  # numbers, more than caches hold


def step(cfg: Config, name: str, rounds: int, vs: str | None = None) -> dict[str, Any]:
    """Times the step of stage `name` and, in turn, the device's matmul peak and, with `vs` "torch", PyTorch's steps.

    Returns:
      images_per_s and step_s (medians), first_step_s (compiling included, but for what JAX's cache has), model_flops
      (counted by hand, a step) and xla_flops (what the compiler counts), matmul_flops_per_s (measured, same dtype),
      model_flops_share of it, memory_bytes_per_s (measured, as a large array is read and written), floor_s, what the
      two allow at best (model_flops at that peak, or the state read and written once, frozen networks and images read),
      floor_share of step_s, peak_memory_bytes. With `vs`, torch_matmul_flops_per_s, and for each of
      `torch_baseline.VARIANTS` its images_per_s and ratio, ours over theirs: the median over rounds.
    """
    begin = time.perf_counter()
    stage, setup, mesh = prepared(cfg, name)
    if vs:
        torch_baseline.check(name, stage, jax.default_backend(), mesh.size)
    compiled, arguments = compile_step(setup, mesh)
    clock = step_clock(compiled, arguments, stage.run.steps_per_call)
    moved = least_bytes(*arguments[:3], stage.run.steps_per_call)
    clock()
    first = time.perf_counter() - begin
    memory = peak_memory(compiled)  # before anything else takes some
    peaks = _peaks(stage.model.dtype, vs)
    others = torch_baseline.steps(stage, sources_of(cfg, name)) if vs else {}

    def ours() -> float:
        if others:
            clock()  # as in `torch_baseline.timed`
        return clock()

    theirs = {f"torch_{variant}_s": functools.partial(torch_baseline.timed, others, variant) for variant in others}
    found = in_turn({"step_s": ours, **theirs, **peaks}, rounds)
    seconds = statistics.median(found["step_s"])
    measured = {name: statistics.median(found[name]) * mesh.size for name in peaks}
    model_flops = setup.flops()
    return {
        **heading("step", name, stage),
        "task": codec.to_dict(stage.task),
        "attention": stage.model.attention,
        **{field: getattr(stage.run, field) for field in ("steps_per_call", "replicas")},
        "devices": mesh.size,
        "images_per_s": stage.run.batch_size / seconds,
        "step_s": seconds,
        "first_step_s": first,
        "model_flops": model_flops,
        "xla_flops": hlo_stats.all_flops(compiled) * mesh.size / stage.run.steps_per_call,
        **measured,
        **_shares(seconds, model_flops, moved * mesh.size, measured),
        "peak_memory_bytes": memory,
        **{f"torch_{variant}": _compared(other, found, variant, stage) for variant, other in others.items()},
    }


def _shares(seconds: float, flops: float, moved: float, measured: dict[str, float]) -> dict[str, float]:
    busy = flops / measured["matmul_flops_per_s"]
    floor = max(busy, moved / measured["memory_bytes_per_s"])
    return {"model_flops_share": busy / seconds, "floor_s": floor, "floor_share": floor / seconds}


def _peaks(dtype: str, vs: str | None) -> dict[str, Clock]:
    theirs = {"torch_matmul_flops_per_s": torch_baseline.matmul(dtype, matmul_size(), CALLS)} if vs else {}
    return {"matmul_flops_per_s": matmul(dtype), "memory_bytes_per_s": copying(), **theirs}


def _compared(
    other: torch_baseline.TorchStep, found: dict[str, list[float]], variant: str, stage: Stage
) -> dict[str, Any]:
    theirs = found[f"torch_{variant}_s"]
    seconds = statistics.median(theirs)
    return {
        "ratio": ratio(theirs, found["step_s"]),
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
    if not all(hasattr(cfg.stages[name].task, field) for field in ("mixup", "cutmix", "erasing")):
        raise InputError(f"--stage={name} does not mix or erase images; choose a stage whose task is classify")
    stage, setup, mesh = prepared(cfg, name)
    clocks = {"step_s": step_clock(*compile_step(setup, mesh), stage.run.steps_per_call)}
    stage.task.mixup = stage.task.cutmix = stage.task.erasing = 0.0
    clocks["plain_step_s"] = step_clock(*compile_step(prepared(cfg, name)[1], mesh), stage.run.steps_per_call)
    seconds = in_turn(clocks, rounds)
    return {
        **heading("augment", name, stage),
        **{key: statistics.median(values) for key, values in seconds.items()},
        "share": 1 - ratio(seconds["plain_step_s"], seconds["step_s"]),
    }


def prepared(cfg: Config, name: str) -> tuple[Stage, StageSetup, jax.sharding.Mesh]:
    """Stage `name`, its setup for any data, and the mesh."""
    stage = cfg.stages[name]
    setup = make_setup(stage, name, sources_of(cfg, name), num_examples=1000 * stage.run.batch_size)
    return stage, setup, sharding.make_mesh(cfg.mesh.data, cfg.mesh.fsdp)


def sources_of(cfg: Config, name: str) -> dict[str, Encoder]:
    """The models that the task of stage `name` reads, by field; no weights are needed."""
    workdir = Path(f"runs/{cfg.name}")
    return {field: source_model(cfg, init, workdir) for field, init in cfg.stages[name].task_inits().items()}


def compile_step(setup: StageSetup, mesh: jax.sharding.Mesh) -> tuple[Any, tuple]:
    """The compiled train step of `setup` and arguments for it: fresh weights, random frozen networks, random images.

    Images are cropped already, also where the stage's data is resident.
    """
    stage: Stage = setup.stage
    sharding.check_batch(stage.run.batch_size, mesh, stage.optim.accum_steps)
    batch = step_batch(setup)
    draws = np.random.default_rng(0)
    for field, zero in setup.task.fields.empty(stage.data).items():
        if zero.dtype == np.uint8:
            batch[field] = draws.integers(0, 256, batch[field].shape, np.uint8)
    per_call = stage.run.steps_per_call
    axis = int(per_call > 1) + (not setup.shares_batches)
    batch = sharding.put_batch(stacked([batch] * per_call, per_call), mesh, axis=axis)
    key = host_keys(setup, keys.INIT)
    state_shapes = jax.eval_shape(lambda: create_state(setup, key))
    shardings = sharding.state_sharding(mesh, (state_shapes, setup.frozen))
    one = jax.random.key(0)
    state, frozen = jax.jit(
        lambda: (create_state(setup, key), setup.task.init(one, example_batch(setup.task, stage))[1]),
        out_shardings=shardings,
    )()
    arguments = (state, frozen, batch, stage_keys(setup, keys.STEPS, mesh))
    return jit_step(train_step(setup), mesh, shardings[0], per_call).lower(*arguments).compile(), arguments


def step_clock(compiled: Any, arguments: tuple, per_call: int = 1) -> Clock:
    """Seconds of each step of the next call of what `compile_step` returns."""
    state, *others = arguments

    def call() -> Any:
        nonlocal state
        state, metrics = compiled(state, *others)
        return state, metrics

    clock = clock_of(call)
    return lambda: clock() / per_call


def matmul_size() -> int:
    """Rows and columns of the product that shows what this machine can do at most."""
    return MATMUL_SIZES.get(jax.default_backend(), 4096)


def matmul(dtype: str) -> Clock:
    """A function that measures one device's FLOP/s on a large square product in `dtype`."""
    n = matmul_size()
    a = (jax.random.normal(jax.random.key(0), (n, n)) * n**-0.5).astype(dtype)  # no product grows
    product = jax.jit(lambda x: jax.lax.fori_loop(0, CALLS, lambda _, y: y @ x, x))
    clock = clock_of(functools.partial(product, a))
    clock()  # compiles
    return lambda: CALLS * 2 * n**3 / clock()


def copying() -> Clock:
    """A function that measures the bytes a second that one device reads and writes, half of them each."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(add(jnp.zeros(COPIED)))

    def call() -> jax.Array:
        nonlocal x
        x = add(x)
        return x

    clock = clock_of(call, CALLS)
    return lambda: 2 * x.nbytes / clock()


def least_bytes(state: Any, frozen: Any, batch: Any, per_call: int) -> float:
    """Bytes that one device must read and write in a step, if nothing stays in its caches."""

    def held(tree: Any) -> int:
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    return 2 * held(state) + held(frozen) + held(batch) / per_call


def peak_memory(compiled: Any) -> int:
    """Bytes: what the device counted at its peak, or where it does not count, what the compiler reserves."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return hlo_stats.memory_bytes(compiled)
