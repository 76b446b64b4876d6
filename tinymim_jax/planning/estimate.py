"""What a stage's step asks of devices that need not be at hand: it is compiled for them, and not run."""

import copy
import dataclasses
import os
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from etils.epath import Path

from tinymim_jax.data import resident, sources
from tinymim_jax.experiment import config
from tinymim_jax.experiment.config import Config
from tinymim_jax.models import layers
from tinymim_jax.planning import dry_run
from tinymim_jax.planning.preflight import source_models
from tinymim_jax.runtime import hlo_stats, keys, markdown
from tinymim_jax.runtime import sharding as mesh_lib
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.progress_bar import bar
from tinymim_jax.training.setup import StageSetup, make_setup, step_batch
from tinymim_jax.training.step import create_state, host_keys, jit_step, train_step

AT_ONCE = 2  # stages: much of a compilation is one thread's, the rest libtpu spreads over the cores
TRACING = threading.Lock()  # `layers.for_other_devices` is for all threads

TOPOLOGY = re.compile(r"(v\d+[ep]?):([1-9]\d*(?:x[1-9]\d*)*)")  # libtpu divides by the numbers


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published limits of one chip; a published figure is never quite reached."""

    flops: float  # bfloat16, a second
    memory: float  # bytes
    bandwidth: float  # of that memory, bytes a second
    links: float  # to other chips, all links together, bytes a second


# cloud.google.com/tpu/docs/v4, v5e, v5p, v6e; NVIDIA's data sheets for H100 SXM and H200 (without sparsity).
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1228e9, 300e9),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9),
    "v6e": Chip(918e12, 32 * 2**30, 1640e9, 448e9),
    "H100": Chip(989e12, 80e9, 3350e9, 900e9),
    "H200": Chip(989e12, 141e9, 4800e9, 900e9),
}
SHAPES = {"v4": (3, 0), "v5e": (2, 16), "v5p": (3, 0), "v6e": (2, 16)}  # dimensions; the most chips along one, if any
KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}  # as jax calls them


def devices_of(topology: str) -> list[Any]:
    """The devices of "v5e:16x16" and the like, described by libtpu without one; "" for those at hand.

    Raises InputError if there is no such topology, or libtpu is missing.
    """
    if not topology:
        return jax.devices()
    match = TOPOLOGY.fullmatch(topology)
    if not match or match[1] not in SHAPES:
        raise InputError(f"--topology={topology}: write it like v5e:16x16; the chips are {', '.join(SHAPES)}")
    sizes, (count, most) = [int(n) for n in match[2].split("x")], SHAPES[match[1]]
    if len(sizes) != count or (most and max(sizes) > most):
        limit = f" of at most {most} chips each" if most else ""
        raise InputError(f"--topology={topology}: there is none; {match[1]} has {count} numbers{limit}")
    # This machine is none of its hosts; without these libtpu asks around, complains, and lets one process in.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    quiet["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    cores = {"chip_config_name": "megacore"} if match[1] == "v4" else {}  # a chip's two cores as one device
    try:
        found = topologies.get_topology_desc(topology_name=topology, platform="tpu", **cores)
    except Exception as error:  # what libtpu and its loader raise differs between versions
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"--topology={topology}: not known to libtpu, or libtpu is missing ({reason}); pip install libtpu, or"
            " choose a topology that exists"
        ) from None
    return list(found.devices)


def chip_of(device: Any) -> Chip | None:
    """The limits of a device, if they are known."""
    kind = KINDS.get(device.device_kind, device.device_kind)
    return next((chip for name, chip in CHIPS.items() if name in kind), None)


def plans(cfg: Config, workdir: Path, only: str | None = None) -> Iterator[tuple[str, StageSetup]]:
    """Every stage of a chain (or just `only`), worked out without data."""
    for name in [only] if only else cfg.stages:
        stage = cfg.stages[name]
        yield name, make_setup(stage, name, source_models(cfg, name, workdir), _size(stage))


def _size(stage: config.Stage) -> int:
    """Images in an epoch, if the data says so; a step is the same without."""
    try:
        return stage.data.num_examples or len(sources.open_source(stage.data))
    except InputError:
        return 1000 * stage.run.batch_size


def compile_for(setup: StageSetup, mesh: jax.sharding.Mesh) -> Any:
    """The compiled train step of `setup` on `mesh`, whose devices need not exist."""
    stage = setup.stage
    mesh_lib.check_batch(stage.run.batch_size, mesh, stage.optim.accum_steps)
    key = jax.eval_shape(lambda: host_keys(setup, keys.STEPS))
    state = jax.eval_shape(lambda: create_state(setup, host_keys(setup, keys.INIT)))
    shardings = mesh_lib.state_sharding(mesh, state)
    batch = step_batch(setup)
    if stage.data.resident:
        own = 0 if setup.shares_batches else stage.run.replicas
        batch = resident.example_batch(stage.data, stage.run.batch_size, own)
    split = mesh_lib.batch_sharding(mesh, axis=int(not setup.shares_batches))
    where = {name: mesh_lib.replicated(mesh) if name == "held" else split for name in batch}

    trees = (state, setup.frozen, batch, key)
    places = (shardings, mesh_lib.state_sharding(mesh, setup.frozen), where, mesh_lib.replicated(mesh))
    arguments = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        trees,
        jax.tree.broadcast(places, trees),
    )
    with TRACING, layers.for_other_devices():
        lowered = jit_step(train_step(setup), mesh, shardings).lower(*arguments)
    return lowered.compile()


def forecast(plan: StageSetup, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What one step of `plan` takes on each device of `mesh`, and no less than how long it and the stage take.

    Batches that wait (all of `run.steps_per_call`, and those read ahead) are not counted.

    Bytes a device (arguments, results, temporaries, total), FLOPs a step (of the model, counted by hand; of all
    devices' matmuls in the compiled program; of all that they compute, counted by XLA), collectives (as in
    `hlo_stats`), and with a known chip: fits, seconds a step (the largest of FLOPs over peak, arguments read and
    written over memory bandwidth, collectives over links), hours for the stage. Where the compiler itself runs out of
    the chip's memory, there are only fits (False) and what is known without a program.
    """
    chip = chip_of(mesh.devices.flat[0])
    known = {
        "devices": mesh.size,
        "fsdp": mesh.shape["fsdp"],
        "accum_steps": plan.stage.optim.accum_steps,
        "batch_size": plan.stage.run.batch_size,
        "model_flops": plan.flops(),
        "steps": plan.total_steps,
    }
    try:
        found = known | _counts(compile_for(plan, mesh), mesh.size)
    except jax.errors.JaxRuntimeError as error:
        if chip is None or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return known | {"memory_bytes": chip.memory, "fits": False}
    return found | (_bounds(found, chip) if chip else {})


def _counts(compiled: Any, devices: int) -> dict[str, Any]:
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "total_bytes": hlo_stats.memory_bytes(compiled),
        "matmul_flops": hlo_stats.matmul_flops(text)[0] * devices,
        "xla_flops": hlo_stats.all_flops(compiled) * devices,
        "collectives": hlo_stats.collectives(text),
    }


def _bounds(found: dict[str, Any], chip: Chip) -> dict[str, Any]:
    bounds = {
        "compute": found["model_flops"] / found["devices"] / chip.flops,
        "memory": (found["argument_bytes"] + found["output_bytes"]) / chip.bandwidth,
        "links": sum(c["sent_bytes"] for c in found["collectives"].values()) / chip.links,
    }
    seconds = max(bounds.values())
    return {
        "memory_bytes": chip.memory,
        "fits": found["total_bytes"] <= chip.memory,
        "bounds_s": bounds,
        "step_s": seconds,
        "hours": seconds * found["steps"] / 3600,
    }


def advise(cfg: Config, name: str, workdir: Path, devices: list[Any]) -> str:
    """The first change that makes stage `name` fit into the memory of `devices`, each tried by compiling it."""
    for words, fields in changes(cfg, name, len(devices)):
        other = copy.deepcopy(cfg)
        stage = other.stages[name]
        owners = {"accum_steps": stage.optim, "remat": stage.model, "fsdp": other.mesh}
        for field, value in fields.items():
            setattr(owners[field], field, value)
        ((_, plan),) = plans(other, workdir, name)
        if forecast(plan, mesh_lib.make_mesh(other.mesh.data, other.mesh.fsdp, devices))["fits"]:
            return words
    return "more or larger devices, or a smaller batch"


def changes(cfg: Config, name: str, devices: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What can be tried, in the order of what it costs: flags, and the fields that they set."""
    stage = cfg.stages[name]
    at = f"--config.stages.{name}"
    for accum in (2, 4, 8):
        if accum > stage.optim.accum_steps and stage.run.batch_size % (accum * devices) == 0:
            yield f"{at}.optim.accum_steps={accum}", {"accum_steps": accum}
    yield f"{at}.model.remat=True", {"remat": True}
    for fsdp in (4, 16):
        if devices % fsdp == 0:
            yield f"--config.mesh.fsdp={fsdp} {at}.model.remat=True", {"fsdp": fsdp, "remat": True}


def table(report: dict[str, Any]) -> str:
    """The forecasts as a Markdown table."""
    columns = [
        f"stage on {report['topology'] or 'the devices at hand'}",
        "batch a device",
        "memory a device, GB",
        "model FLOPs",
        "XLA's over them",
        "collectives a step",
        "at least, ms a step",
        "at least, hours",
    ]
    lines = [markdown.table(columns, [_row(name, f) for name, f in report["stages"].items()])]
    if not all("memory_bytes" in f for f in report["stages"].values()):
        lines += ["", f"no bounds: the limits of {report['device']} are not known here; --topology has chips that are"]
    return "\n".join(lines)


def _decimals(value: float, digits: int) -> str:
    """As many as `digits` behind the point, and two that are not 0 where that would be 0."""
    return f"{value:.{digits}f}" if round(value, digits) or not value else f"{value:.2g}"


def _row(name: str, f: dict[str, Any]) -> list[str]:
    start = [name, f"{f['batch_size'] / f['devices']:g}"]
    flops = f"{f['model_flops']:.3g}"
    if "total_bytes" not in f:
        return [*start, f"**over {f['memory_bytes'] / 1e9:.0f}**; {f['advice']}", flops, *[""] * 4]
    fits = "" if f.get("fits", True) else f" **of {f['memory_bytes'] / 1e9:.0f}**; {f.get('advice', '')}"
    collectives = [f"{c['count']} {kind} ({_decimals(c['bytes'] / 1e6, 0)} MB)" for kind, c in f["collectives"].items()]
    times = [_decimals(1e3 * f["step_s"], 1), _decimals(f["hours"], 2)] if "step_s" in f else ["", ""]
    share = f"{f['xla_flops'] / f['model_flops']:.3f}"
    return [*start, _decimals(f["total_bytes"] / 1e9, 1) + fits, flops, share, ", ".join(collectives) or "none", *times]


def run(cfg: Config, only: str | None, topology: str, workdir: Path) -> dict[str, Any]:
    """Forecasts of every stage of `cfg` (or just `only`) on `topology`; advice where one does not fit."""
    dry_run.check_stage_name(cfg, only)
    devices = devices_of(topology)
    mesh = mesh_lib.make_mesh(cfg.mesh.data, cfg.mesh.fsdp, devices)
    names, stages = [only] if only else list(cfg.stages), {}

    def one(name: str) -> dict[str, Any]:
        try:
            ((_, plan),) = plans(cfg, workdir, name)
            found = forecast(plan, mesh)
            return found if found.get("fits", True) else found | {"advice": advise(cfg, name, workdir, devices)}
        except InputError as error:
            raise InputError(f"stage {name}: {error}") from None

    pool = ThreadPoolExecutor(AT_ONCE)
    waiting = {name: pool.submit(one, name) for name in names}
    try:
        with bar("plan", len(names), "stage", first="compiling", leave=False) as shown:
            for name, found in waiting.items():
                shown.write(f"{name}: compiling for {len(devices)} devices ...", file=sys.stderr)
                stages[name] = found.result()
                shown.update()
    finally:
        pool.shutdown(cancel_futures=True)
    return {"config": cfg.name, "topology": topology, "device": devices[0].device_kind, "stages": stages}
