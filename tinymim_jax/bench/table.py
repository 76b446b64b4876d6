"""The measurements of a folder, beside each other."""

import json
from typing import Any

from etils.epath import Path

from tinymim_jax.runtime import markdown, storage
from tinymim_jax.runtime.errors import InputError

# By benchmark, and by column: where in its JSON the value stands, a factor and a format.
COLUMNS: dict[str, dict[str, tuple[str, float, str]]] = {
    "step": {
        "images": ("batch_size", 1, ".0f"),
        "images/s": ("images_per_s", 1, ".1f"),
        "ms": ("step_s", 1e3, ".2f"),
        "share of the floor": ("floor_share", 1, ".2f"),
        **{name: (f"torch_{name}.ratio", 1, ".2f") for name in ("eager", "compiled", "graphs")},
        "GB at the peak": ("peak_memory_bytes", 1e-9, ".2f"),
        "s to the first": ("first_step_s", 1, ".1f"),
    },
    "beside": {
        "students": ("students", 1, ".0f"),
        "ms one by one": ("alone_s", 1e3, ".2f"),
        "side by side": ("together_s", 1e3, ".2f"),
        "ratio": ("ratio", 1, ".2f"),
        "by the operations": ("flops_ratio", 1, ".2f"),
        "GB of one": ("alone_bytes", 1e-9, ".2f"),
        "of all": ("together_bytes", 1e-9, ".2f"),
    },
    "segment": {
        "images": ("batch_size", 1, ".0f"),
        "ms": ("step_s", 1e3, ".2f"),
        "transformers' ms": ("torch_step_s", 1e3, ".2f"),
        "eager": ("ratio", 1, ".2f"),
    },
    "relation": {
        "tokens": ("tokens", 1, ".0f"),
        "kernel": ("kernel", 1, ""),
        "ms": ("ours_s", 1e3, ".3f"),
        "of the plain one's time": ("time_ratio", 1, ".2f"),
        "of its bytes": ("bytes_ratio", 1, ".3f"),
    },
    "loader": {
        "images/s a core, decoding": ("decode_images_per_s", 1, ".0f"),
        "PIL": ("pil_images_per_s", 1, ".0f"),
        "here": ("transform_images_per_s", 1, ".0f"),
        "with RandAugment": ("rand_augment_images_per_s", 1, ".0f"),
        "over PIL's": ("of_pil", 1, ".2f"),
        "of decoding": ("of_decode", 1, ".2f"),
        "images/s of all cores": ("all_cores.0.transform_images_per_s", 1, ".0f"),
    },
}


def table(folder: Path) -> str:
    """Markdown of what `bench` has printed into `folder`/*.json, a table for each benchmark, the oldest first.

    Raises InputError if there is nothing.
    """
    found = sorted(((_read(file), file.stem) for file in storage.children(folder, "*.json")), key=_age)
    parts = []
    for kind, columns in COLUMNS.items():
        mine = [(row, name) for one, name in found if one.get("benchmark") == kind for row in _rows(one)]
        lines = [[name, *(_cell(row, *column) for column in columns.values())] for row, name in mine]
        parts += [markdown.table([kind, *columns], lines)] if lines else []
    if not parts:
        raise InputError(f"{folder} has no measurement; name the folder that launch/bench.sh wrote into")
    note = "eager, compiled and graphs are PyTorch's: our images/s over theirs, the median over rounds."
    return "\n\n".join([f"{_conditions([one for one, _ in found])}; {note}", *parts])


def _age(item: tuple[dict[str, Any], str]) -> tuple[str, str]:
    return item[0].get("time", ""), item[1]  # a file's own time is that of the checkout


def _conditions(found: list[dict[str, Any]]) -> str:
    """What the measurements do not differ in, or each of the values, the first to the last."""
    said = {"device": "", "python": "Python ", "jax": "jax ", "torch": "PyTorch "}
    lines = [{"torch": one.get("torch_eager", {}).get("torch"), **one} for one in found]
    lists = [[word + one[key] for one in lines if one.get(key)] for key, word in said.items()]
    days = sorted({one["time"][:10] for one in found if "time" in one})
    values = [value for values in lists for value in dict.fromkeys(values)]
    return ", ".join([*values, " to ".join(dict.fromkeys([*days[:1], *days[-1:]]))]).removesuffix(", ")


def _read(file: Path) -> dict[str, Any]:
    try:
        one = json.loads(file.read_text())
    except ValueError:
        one = None
    if not isinstance(one, dict):
        raise InputError(f"{file} is no measurement of bench; delete it, and measure again")
    return one


def _rows(one: dict[str, Any]) -> list[dict[str, Any]]:
    """A measurement of several numbers of tokens is a row for each."""
    tokens = one.get("tokens")
    return [{"tokens": int(n), **of} for n, of in tokens.items()] if isinstance(tokens, dict) else [one]


def _cell(row: Any, path: str, factor: float, form: str) -> str:
    """ "" for what an older version, or another machine, did not measure."""
    for key in path.split("."):
        row = (row[int(key)] if isinstance(row, list) else row.get(key)) if row else None
    return "" if row is None else format(row * factor, form)
