"""`bench`: what a stage's step costs, as one JSON object on stdout."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from tinymim_jax.commands.flags import new_flags, parse
from tinymim_jax.config import Config, InputError, Stage

USAGE = """python -m tinymim_jax bench VERB --config=FILE[:options] --stage=NAME [--batch_size=N] [--rounds=N]

  step                              times a stage's training step on random images and weights, no data needed;
                                    a teacher named by path needs its stage.json
  augment                           times it with and without mixup, cutmix and random erasing, which the device does
  loader                            times reading, decoding and augmenting on one core; needs the stage's data
  --config.stages.NAME.FIELD=VALUE  changes one field, e.g. ....model.dtype=float32
  --batch_size=N                    over all devices (default: the stage's)
  --rounds=N                        the median of N is reported"""

LOADER_IMAGES = 200
MATMUL_SIZES = {"cpu": 2048, "gpu": 8192, "tpu": 8192}


def main(argv: list[str]) -> None:
    """Runs the command with its arguments; raises InputError on bad ones."""
    values = new_flags(USAGE)
    flags.DEFINE_string("stage", None, "the stage to measure", flag_values=values)
    flags.DEFINE_integer("batch_size", None, "images a step", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("rounds", 5, "measurements", lower_bound=1, flag_values=values)
    verb = argv[0] if argv else "--help"
    if verb not in VERBS and verb not in ("-h", "--help"):
        raise InputError(f"unknown benchmark {verb!r}; choose one of {', '.join(VERBS)}")
    cfg = parse(values, argv[1:] or ["--help"])
    if values.stage not in cfg.stages:
        given = f"--stage={values.stage}: no such stage" if values.stage else "--stage=NAME is needed"
        raise InputError(f"{given}; choose one of {', '.join(cfg.stages)}")
    if values.batch_size:
        cfg.stages[values.stage].run.batch_size = values.batch_size
    print(json.dumps(VERBS[verb](cfg, values.stage, values.rounds), indent=2))


def step(cfg: Config, name: str, rounds: int) -> dict[str, Any]:
    """Times the step of stage `name` and, in turn, the device's matmul peak.

    Returns:
      images_per_s and step_s (medians), model_flops (counted by hand, a step) and xla_flops (what the compiler
      counts), matmul_flops_per_s (measured, same dtype), model_flops_share of it, peak_memory_bytes.
    """
    import jax

    stage, plan, mesh = prepared(cfg, name)
    compiled, arguments = compile_step(plan, mesh)
    peak = matmul(stage.model.dtype)

    steps, peaks = [], []
    for _ in range(rounds + 1):  # the first round warms up
        arguments, seconds = timed_step(compiled, arguments)
        steps.append(seconds)
        peaks.append(peak())
        print(f"{seconds:.3f} s a step, {peaks[-1] / 1e9:.0f} matmul GFLOP/s", file=sys.stderr)
    seconds, flops_per_s = statistics.median(steps[1:]), statistics.median(peaks[1:]) * mesh.size
    model_flops = plan.task.flops_per_image() * stage.run.batch_size
    return {
        "benchmark": "step",
        "stage": name,
        "device": jax.devices()[0].device_kind,
        "devices": mesh.size,
        "jax": jax.__version__,
        "dtype": stage.model.dtype,
        "batch_size": stage.run.batch_size,
        "images_per_s": stage.run.batch_size / seconds,
        "step_s": seconds,
        "model_flops": model_flops,
        "xla_flops": compiled.cost_analysis()["flops"] * mesh.size,
        "matmul_flops_per_s": flops_per_s,
        "model_flops_share": model_flops / seconds / flops_per_s,
        "peak_memory_bytes": peak_memory(compiled),
    }


def augment(cfg: Config, name: str, rounds: int) -> dict[str, Any]:
    """Times the step of the classify stage `name` with and without mixup, cutmix and random erasing, in turn.

    Returns step_s and plain_step_s (medians), and share, how much of the step these augmentations take: the median
    over rounds, each a pair of steps.
    """
    import jax

    if cfg.stages[name].task.kind != "classify":
        raise InputError(f"--stage={name} does not mix or erase images; choose a stage whose task is classify")
    stage, plan, mesh = prepared(cfg, name)
    full = compile_step(plan, mesh)
    stage.task.mixup = stage.task.cutmix = stage.task.erasing = 0.0
    plain = compile_step(prepared(cfg, name)[1], mesh)
    seconds: list[tuple[float, float]] = []
    for _ in range(rounds + 1):  # the first round warms up
        (arguments, with_), (plain_arguments, without) = timed_step(*full), timed_step(*plain)
        full, plain = (full[0], arguments), (plain[0], plain_arguments)
        seconds.append((with_, without))
        print(f"{with_:.4f} s a step, {without:.4f} s without", file=sys.stderr)
    return {
        "benchmark": "augment",
        "stage": name,
        "device": jax.devices()[0].device_kind,
        "dtype": stage.model.dtype,
        "batch_size": stage.run.batch_size,
        "step_s": statistics.median(pair[0] for pair in seconds[1:]),
        "plain_step_s": statistics.median(pair[1] for pair in seconds[1:]),
        "share": statistics.median(1 - pair[1] / pair[0] for pair in seconds[1:]),
    }


def prepared(cfg: Config, name: str) -> tuple[Stage, Any, Any]:
    """Stage `name`, its plan for any data, and the mesh."""
    from tinymim_jax import chain
    from tinymim_jax.mesh import make_mesh
    from tinymim_jax.plan import make_plan

    stage = cfg.stages[name]
    teacher = chain.teacher_model(cfg, name, Path(f"runs/{cfg.name}"))
    return stage, make_plan(stage, teacher, num_examples=1000 * stage.run.batch_size), make_mesh(cfg.mesh)


def loader(cfg: Config, name: str, rounds: int) -> dict[str, Any]:
    """Times the host's work for stage `name` on one core, on the same images in turn.

    Returns:
      images/s of decode (reading and decoding alone), of random_resized_crop (PIL's decode, crop and resize, the
      baseline) and of transform (all that the stage asks for), medians, and the share of the first that the last has.
    """
    import dataclasses

    import numpy as np

    from tinymim_jax.data import sources
    from tinymim_jax.data.augment import transform
    from tinymim_jax.data.decode import decode

    data = cfg.stages[name].data
    source = sources.open_source(data)
    plain = dataclasses.replace(data, rand_augment="", transform="train")
    chosen = np.random.default_rng(0).integers(0, len(source), LOADER_IMAGES)
    work = {
        "decode": lambda image, i: np.asarray(image),
        "random_resized_crop": lambda image, i: transform(image, plain, np.random.default_rng(i)),
        "transform": lambda image, i: transform(image, data, np.random.default_rng(i)),
    }
    rates: dict[str, list[float]] = {key: [] for key in work}
    for _ in range(rounds + 1):  # the first round warms up
        for key, function in work.items():
            begin = time.perf_counter()
            for i in chosen:
                function(decode(source[int(i)]["image"], source.describe(int(i))), int(i))
            rates[key].append(LOADER_IMAGES / (time.perf_counter() - begin))
    medians = {f"{key}_images_per_s": statistics.median(values[1:]) for key, values in rates.items()}
    share = medians["transform_images_per_s"] / medians["decode_images_per_s"]
    return {"benchmark": "loader", "stage": name, "rand_augment": data.rand_augment, **medians, "of_decode": share}


VERBS = {"step": step, "augment": augment, "loader": loader}


def compile_step(plan: Any, mesh: Any) -> tuple[Any, tuple]:
    """The compiled train step of `plan` and arguments for it: fresh weights, a random teacher, random images."""
    import jax
    import numpy as np

    from tinymim_jax import mesh as mesh_lib
    from tinymim_jax.plan import example_batch
    from tinymim_jax.step import create_state, jit_step

    stage: Stage = plan.stage
    mesh_lib.check_batch(stage.run.batch_size // stage.optim.accum_steps, mesh)
    batch = example_batch(stage, stage.run.batch_size)
    batch["image"] = np.random.default_rng(0).integers(0, 256, batch["image"].shape, np.uint8)
    batch = mesh_lib.put_batch(batch, mesh)
    key = jax.random.key(0)
    state_shapes = jax.eval_shape(lambda: create_state(plan, key))
    shardings = mesh_lib.state_sharding(mesh, (state_shapes, plan.frozen))
    state, frozen = jax.jit(
        lambda: (create_state(plan, key), plan.task.init(key, example_batch(stage))[1]), out_shardings=shardings
    )()
    arguments = (state, frozen, batch, jax.device_put(key, mesh_lib.replicated(mesh)))
    return jit_step(plan, mesh, shardings[0]).lower(*arguments).compile(), arguments


def timed_step(compiled: Any, arguments: tuple) -> tuple[tuple, float]:
    """One call: the arguments of the next, and seconds."""
    import jax

    begin = time.perf_counter()
    state, metrics = jax.block_until_ready(compiled(*arguments))
    seconds = time.perf_counter() - begin
    del metrics
    return (state, *arguments[1:]), seconds


def matmul(dtype: str) -> Callable[[], float]:
    """A function that measures one device's FLOP/s on a large square product in `dtype`."""
    import jax
    import jax.numpy as jnp

    n = MATMUL_SIZES.get(jax.default_backend(), 4096)
    a = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype)
    repeats = 10
    product = jax.jit(lambda x: jax.lax.fori_loop(0, repeats, lambda _, y: (y @ x) * (1 / n), jnp.eye(n, dtype=dtype)))
    jax.block_until_ready(product(a))

    def measure() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(product(a))
        return repeats * 2 * n**3 / (time.perf_counter() - begin)

    return measure


def peak_memory(compiled: Any) -> int:
    """Bytes: what the device counted at its peak, or where it does not count, what the compiler reserves."""
    import jax

    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
