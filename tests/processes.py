"""Runs of `tests/tiny_chain.py` in processes of their own."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tinymim_jax.weights import checkpoint
from tinymim_jax.weights.parameters import flatten

ROOT = Path(__file__).parent.parent


def command(workdir: Path | str, options: str, *flags: str) -> list[str]:
    """`run` of the chain with the options behind its name."""
    config = f"--config={ROOT / 'tests/tiny_chain.py'}:{options}"
    return [sys.executable, "-m", "tinymim_jax", "run", config, f"--workdir={workdir}", *flags]


def environment(devices: int = 1) -> dict[str, str]:
    """Of a process with so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def connected(port: int) -> socket.socket:
    """A connection to process 0, once it is there."""
    for _ in range(3000):
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port), 1)
        time.sleep(0.02)
    raise TimeoutError


def start(
    workdir: Path | str,
    options: str,
    processes: int,
    devices: int,
    *flags: str,
    env: Mapping[str, str] | None = None,
    patches: Mapping[int, str] | None = None,
) -> list[subprocess.Popen]:
    """Starts `processes` with `devices` each, `env` beside their usual environment; `patches` are run in some first."""
    address = f"--coordinator=127.0.0.1:{free_port()}"
    running = []
    for i in range(processes):
        cluster = [address, f"--num_processes={processes}", f"--process_id={i}"] if processes > 1 else []
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        own = command(workdir, options, *cluster, *flags)
        if patch := (patches or {}).get(i):
            own[1:3] = [
                "-c",
                f"{patch}\nimport sys\nfrom tinymim_jax import __main__ as m\nsys.exit(m.main(sys.argv[1:]))",
            ]
        running.append(subprocess.Popen(own, env={**environment(devices), **(env or {})}, cwd=ROOT, **pipes))
    return running


def finish(running: list[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each."""
    try:
        ended = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(running, ended, strict=True)]


def run(workdir: Path, options: str, processes: int = 1, devices: int = 1, *flags: str) -> list[tuple[int, str, str]]:
    """Runs to the end."""
    return finish(start(workdir, options, processes, devices, *flags))


def difference(one: Path, other: Path) -> float:
    """The largest difference of a weight of two stages' folders, biases of keys apart.

    Softmax does not see these: their gradient is nothing but rounding, which Adam blows up to the size of its steps.
    """
    trees = [flatten(checkpoint.read_model(folder)["params"]) for folder in (one, other)]
    return max(float(np.max(np.abs(_seen(name, a) - _seen(name, trees[1][name])))) for name, a in trees[0].items())


def _seen(name: str, weight: np.ndarray) -> np.ndarray:
    return weight[[0, 2]] if name.endswith("qkv/bias") else weight


def log(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without speeds and times, by step: when an evaluation beside the training ends is not fixed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in ("images_per_s", "data_wait", "first_step_s")} for line in lines]
    return sorted(kept, key=lambda line: (line["step"], sorted(line)))
