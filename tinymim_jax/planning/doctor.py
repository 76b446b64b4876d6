"""What is wrong with a machine or a cluster, and the fix: one finding a line."""

import collections
import dataclasses
import json
import math
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata

import jax
import numpy as np
from etils.epath import Path

from tinymim_jax.data import sources
from tinymim_jax.data.decode import decode
from tinymim_jax.experiment.config import Config
from tinymim_jax.planning import dry_run
from tinymim_jax.planning.estimate import plans
from tinymim_jax.runtime import distributed, multihost
from tinymim_jax.runtime.cluster import number
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.sharding import check_batch, make_mesh
from tinymim_jax.weights.parameters import flatten

JAX = ((0, 10), (0, 13))  # from, and before; setup.py says the same
IMAGES = 20  # read from each data set
MAX_NAMED = 8  # processes
ADAM_COPIES = 3  # of the parameters in a checkpoint: themselves and two moments


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `fix` is empty if it is well."""

    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"FIX  {self.what}: {self.fix}" if self.fix else f"ok   {self.what}"


def examine(cfg: Config | None, workdir: Path, env: Mapping[str, str]) -> Iterator[Finding]:
    """Everything, in the order in which a run would meet it."""
    yield from versions()
    yield from devices(env)
    yield from processes(env)
    if cfg is not None:
        yield mesh(cfg)
        fixes = []
        for finding in data(cfg):
            yield finding
            fixes += [finding.fix] if finding.fix else []
        try:
            dry_run.describe_chain(cfg, workdir)
        except InputError as error:
            if not any(fix in str(error) for fix in fixes):
                yield Finding(f"the stages of {cfg.name}", str(error))
            cfg = None  # whose checkpoints have no size
    yield from room(cfg, workdir)


def versions() -> Iterator[Finding]:
    """Python and the packages that decide."""
    names = ", ".join(f"{name} {metadata.version(name)}" for name in distributed.VERSIONED)
    yield Finding(f"Python {'.'.join(map(str, sys.version_info[:3]))}, {names}")
    found = tuple(int(n) for n in jax.__version__.split(".")[:2])
    if not JAX[0] <= found < JAX[1]:
        yield Finding(f"jax {jax.__version__}", "it was tried with 0.10 to 0.12: pip install 'jax>=0.10,<0.13'")


def devices(env: Mapping[str, str]) -> Iterator[Finding]:
    """What jax computes on, and accelerators that it does not see."""
    kinds = {d.device_kind for d in jax.local_devices()}
    yield Finding(f"{jax.local_device_count()} local devices ({', '.join(sorted(kinds))}), {jax.device_count()} in all")
    on_cpu = jax.default_backend() == "cpu"
    forced = env.get("JAX_PLATFORMS", "")
    has = {"NVIDIA GPU": Path("/dev/nvidia0"), "TPU": Path("/dev/accel0"), "TPU v5 or newer": Path("/dev/vfio/0")}
    for name, path in has.items():
        if on_cpu and path.exists():
            extra = "cuda" if "GPU" in name else "tpu"
            fix = f"unset JAX_PLATFORMS={forced}" if forced else f"pip install -e '.[{extra}]'"
            yield Finding(f"this machine has an {name} that jax does not use", fix)
    if env.get("CUDA_VISIBLE_DEVICES") in ("", "-1") and Path("/dev/nvidia0").exists():
        yield Finding("CUDA_VISIBLE_DEVICES hides every GPU", "unset it, or name the GPUs of this process")
    if "xla_force_host_platform_device_count" in env.get("XLA_FLAGS", "") and not on_cpu:
        yield Finding("XLA_FLAGS asks for several CPU devices", "unset it: it is for tests")


def processes(env: Mapping[str, str]) -> Iterator[Finding]:
    """How many there are, and whether they share their devices well."""
    count = jax.process_count()
    yield Finding(f"process {jax.process_index()} of {count}")
    tasks = number(env, "SLURM_NTASKS")
    if count == 1 and tasks > 1:
        yield Finding(f"Slurm gave {tasks} tasks, and this process is on its own", "start with srun inside the job")
    variable = "SLURM_NTASKS_PER_NODE" if env.get("SLURM_NTASKS_PER_NODE") else "OMPI_COMM_WORLD_LOCAL_SIZE"
    per_host = number(env, variable)
    if jax.default_backend() == "gpu" and per_host > 1 and jax.local_device_count() > 1:
        yield Finding(
            f"{per_host} processes on this host, each with {jax.local_device_count()} GPUs",
            "one process for each GPU (--gpus-per-task=1), or one for each host",
        )
    if not _is_even():
        yield Finding("processes have different numbers of devices", "give each the same")
    proxies = [name for name in env if name.lower() in ("http_proxy", "https_proxy", "grpc_proxy")]
    if count > 1 and proxies:
        yield Finding(f"{proxies[0]} is set", "unset it if processes hang at the start")


def room(cfg: Config | None, workdir: Path) -> Iterator[Finding]:
    """Whether the workdir is free, can be written to, and has room."""
    try:
        dry_run.check_workdir(workdir, jax.process_index() == 0)
    except InputError as error:
        yield Finding(f"workdir {workdir}", str(error))
    yield disk(cfg, workdir, next(p for p in (workdir, *workdir.parents) if p.exists()))


def disk(cfg: Config | None, workdir: Path, at: Path) -> Finding:
    """Room at `at` for the checkpoints of all stages."""
    try:
        free = shutil.disk_usage(at).free
        what = f"{_size(free)} free at {at}"
    except FileNotFoundError:
        free, what = math.inf, f"{at} is in a bucket, which has no size"
    if cfg is None:
        return Finding(what)
    need = 0
    for _, plan in plans(cfg, workdir):
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in flatten(plan.params).values())
        copies = ADAM_COPIES + bool(plan.stage.optim.ema)
        need += size * copies * plan.stage.run.replicas * (plan.stage.run.keep + 1)  # one more while it is written
    fix = "make room, or choose another --workdir" if need > free else ""
    return Finding(f"{what}, checkpoints of all stages take up to {_size(need)}", fix)


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def mesh(cfg: Config) -> Finding:
    """Whether the devices fill the grid and share each batch."""
    what = f"mesh {cfg.mesh.data} x {cfg.mesh.fsdp}"
    try:
        grid = make_mesh(cfg.mesh.data, cfg.mesh.fsdp)
        for name, stage in cfg.stages.items():
            what = f"mesh {grid.shape['data']} x {grid.shape['fsdp']}, stage {name}"
            check_batch(stage.run.batch_size, grid, stage.optim.accum_steps)
    except InputError as error:
        return Finding(what, str(error))
    return Finding(f"mesh {grid.shape['data']} x {grid.shape['fsdp']}")


def data(cfg: Config) -> Iterator[Finding]:
    """Each data set: is it there, can its images be decoded, how fast by one thread."""
    seen = set()
    for stage in cfg.stages.values():
        for one in stage.data_sets():
            what = f"{one.source} {one.path or one.name}".rstrip() + f", split {one.split}"
            if what in seen:
                continue
            seen.add(what)
            try:
                source = sources.open_source(one)
                begin = time.perf_counter()
                count = min(IMAGES, len(source))
                chosen = [i * len(source) // count for i in range(count)]
                shapes = {np.shape(decode(source[i]["image"], source.describe(i))) for i in chosen}
                rate = len(chosen) / (time.perf_counter() - begin)
                yield Finding(f"{what}: {len(source):,} images, {rate:.0f} read and decoded a second by one thread")
                if one.resident and len(shapes) > 1:
                    yield Finding(f"{what}: images differ in size", "set data.resident=False, which needs one size")
            except (InputError, OSError) as error:
                yield Finding(what, str(error))


def report(cfg: Config | None, workdir: Path, env: Mapping[str, str]) -> int:
    """Prints every finding of this process as it is made, then what the others must mend; returns how much all must."""
    bad = []
    for finding in examine(cfg, workdir, env):
        print(finding, flush=True)
        bad += [finding] if finding.fix else []
    if jax.process_count() == 1:
        return len(bad)
    if not _is_even():
        for finding in bad if jax.process_index() else []:  # whose standard output nobody sees
            print(finding, file=sys.stderr)
        return len(bad)
    found = _grouped(multihost.gather(json.dumps([socket.gethostname(), [str(finding) for finding in bad]])))
    for finding, where in found.items():
        if any(where):
            print(f"{_named(where)}: {finding}", flush=True)
    return len(found)


def _is_even() -> bool:
    """Whether all have equally many devices, without which nothing can be gathered; each then speaks for itself."""
    return len(set(collections.Counter(device.process_index for device in jax.devices()).values())) == 1


def _grouped(told: list[str]) -> dict[str, dict[int, str]]:
    """Each finding once, with the processes that have it and their hosts."""
    found = collections.defaultdict(dict)
    for index, (host, lines) in enumerate(map(json.loads, told)):
        for line in lines:
            found[line][index] = host
    return found


def _named(where: Mapping[int, str]) -> str:
    """Process 3 (host), or processes 1, 2 (one host, another)."""
    numbers, hosts = (
        ", ".join(map(str, values[:MAX_NAMED])) + (" ..." if len(values) > MAX_NAMED else "")
        for values in (list(where), list(dict.fromkeys(where.values())))
    )
    return f"process{'es' if len(where) > 1 else ''} {numbers} ({hosts})"
