"""The measurements of a folder, beside each other."""

import json
from typing import Any

from etils.epath import Path

from tinymim_jax.runtime import markdown, storage
from tinymim_jax.runtime.errors import InputError

STEPS = "step", "images", "images/s", "ms", "share of the floor", "eager", "compiled", "graphs", "GB at the peak"
RATIOS = "time_ratio", "bytes_ratio"
RELATIONS = "relation loss", "tokens", "kernel", "ms", "of the plain one's time", "of its bytes"


def table(folder: Path) -> str:
    """Markdown of what `bench step` and `bench relation` have printed into `folder`/*.json, the oldest first.

    Raises InputError if there is nothing.
    """
    files = sorted(storage.children(folder, "*.json"), key=lambda file: file.stat().mtime)
    found = [(file.stem, _read(file)) for file in files]
    steps = [_step(name, one) for name, one in found if one.get("benchmark") == "step"]
    relations = [row for name, one in found if one.get("benchmark") == "relation" for row in _relation(name, one)]
    if not steps and not relations:
        raise InputError(f"{folder} has no measurement; name the folder that launch/bench.sh wrote into")
    devices = ", ".join(dict.fromkeys(one["device"] for _, one in found if "device" in one))
    parts = [markdown.table(head, rows) for head, rows in ((STEPS, steps), (RELATIONS, relations)) if rows]
    note = "eager, compiled and graphs are PyTorch's: our images/s over theirs, the median over rounds."
    return "\n\n".join([f"{devices}; {note}", *parts])


def _read(file: Path) -> dict[str, Any]:
    try:
        one = json.loads(file.read_text())
    except ValueError:
        one = None
    if not isinstance(one, dict):
        raise InputError(f"{file} is no measurement of bench; delete it, and measure again")
    return one


def _step(name: str, one: dict[str, Any]) -> list[str]:
    ratios = [f"{one[f'torch_{v}']['ratio']:.2f}" if f"torch_{v}" in one else "" for v in STEPS[5:8]]
    share = f"{one['floor_share']:.2f}" if "floor_share" in one else ""  # version 0.2 has none
    memory = f"{one['peak_memory_bytes'] / 1e9:.2f}"
    speed = f"{one['images_per_s']:.1f}", f"{1e3 * one['step_s']:.2f}"
    return [name, str(one["batch_size"]), *speed, share, *ratios, memory]


def _relation(name: str, one: dict[str, Any]) -> list[list[str]]:
    return [
        [name, tokens, of["kernel"], f"{1e3 * of['ours_s']:.3f}", *(f"{of[k]:.2f}" if k in of else "" for k in RATIOS)]
        for tokens, of in one["tokens"].items()
    ]
