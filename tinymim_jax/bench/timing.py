"""How things are timed here: in turn; and what two measurements may differ in."""

import datetime
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import jax

from tinymim_jax.experiment.config import Stage

Clock = Callable[[], float]  # measures once
SETTING = re.compile("XLA_|LIBTPU_|NVIDIA_TF32|LD_PRELOAD|TCMALLOC_|MALLOC_|GLIBC_TUNABLES|JAX_(DEFAULT|CPU|DISABLE)")


def clock_of(call: Callable[[], Any], calls: int = 1, now: Clock = time.perf_counter) -> Clock:
    """Seconds of each of `calls`, of which only the last is waited for."""

    def clock() -> float:
        begin = now()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        return (now() - begin) / calls

    return clock


def in_turn(clocks: Mapping[str, Clock], rounds: int, turns: int = 1) -> dict[str, list[float]]:
    """What each measures in each round, one after the other: what disturbs one disturbs all.

    A round sums up `turns` measurements of each. A first round, which warms up, is left out.
    """
    found: dict[str, list[float]] = {name: [] for name in clocks}
    for number in range(rounds + 1):
        measured = [{name: clock() for name, clock in clocks.items()} for _ in range(turns)]
        for name, values in found.items():
            values.append(sum(one[name] for one in measured))
        line = ", ".join(f"{name} {values[-1]:.4g}" for name, values in found.items())
        print(f"round {number} of {rounds}: {line}", file=sys.stderr)
    return {name: values[1:] for name, values in found.items()}


def ratio(values: list[float], others: list[float]) -> float:
    """The median over rounds."""
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def heading(benchmark: str, name: str, stage: Stage) -> dict[str, Any]:
    """What a measurement of stage `name` begins with."""
    asked = {"dtype": stage.model.dtype, "batch_size": stage.run.batch_size}
    return {"benchmark": benchmark, "stage": name, **conditions(), **asked}


def conditions() -> dict[str, Any]:
    """What numbers of two runs may differ in: device, versions, variables that set how memory and XLA work."""
    kind = jax.devices()[0].device_kind
    return {
        "device": f"{processor()}, {os.cpu_count()} cores" if kind == "cpu" else kind,
        **software("jax", "jaxlib"),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if SETTING.match(name)},
    }


def software(*packages: str) -> dict[str, str]:
    """The command that runs, the time, and versions of Python and of those packages that are installed."""
    installed = {d.name.lower(): d.version for d in distributions() if d.name}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    found = {name: installed[name] for name in packages if name in installed}
    command = shlex.join(["python", *sys.orig_argv[1:]])
    return {"command": command, "time": now, "python": platform.python_version(), **found}


def processor() -> str:
    """What the system calls the host's."""
    return of_linux("cpuinfo", r"model name\s*: (.*)") or platform.processor() or platform.machine()


def of_linux(file: str, pattern: str) -> str:
    """The group of `pattern` in a file of /proc; "" where there is none."""
    path = Path("/proc") / file
    found = re.search(pattern, path.read_text()) if path.exists() else None
    return found[1] if found else ""
