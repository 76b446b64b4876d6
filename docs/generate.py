"""Writes docs/reference/ from the code and the tables of docs/BENCHMARKS.md from files: python docs/generate.py."""

import contextlib
import dataclasses
import importlib
import inspect
import io
import re
import tokenize
from pathlib import Path
from typing import Any

from etils import epath

from tinymim_jax.__main__ import COMMANDS
from tinymim_jax.bench import table
from tinymim_jax.evals import EVALS
from tinymim_jax.experiment import config
from tinymim_jax.models import MODELS
from tinymim_jax.tasks import TASKS
from tinymim_jax.tasks.targets import TARGETS

DOCS = Path(__file__).parent
FOLDER = DOCS / "reference"
MADE = "<!-- Made by docs/generate.py from the code. -->\n"
MEASURED = re.compile(r"(<!-- bench table (\S+) -->\n).*?(<!-- end of it -->)", re.DOTALL)


def commands() -> str:
    """Every command's --help."""
    parts = ["# Commands\n", MADE]
    for name, what in COMMANDS.items():
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            importlib.import_module(f"tinymim_jax.commands.{name}").main(["--help"])
        parts += [f"## {name}\n", f"{what[0].upper()}{what[1:]}.\n", f"```\n{said.getvalue().strip()}\n```\n"]
    return "\n".join(parts)


def fields() -> str:
    """Every class of which configs are made, with its fields."""
    parts = ["# Config fields\n", MADE]
    kinds = {cls: kind for kinds in (TASKS, TARGETS, EVALS, MODELS) for kind, cls in kinds.items()}
    first = [config.Config, config.Stage, config.Run, config.Optim, config.Data, config.Init]
    exported = [getattr(config, name) for name in config.__all__]
    for cls in dict.fromkeys([*first, *kinds, *exported]):
        kind = f', kind="{kinds[cls]}"' if cls in kinds else ""
        parts += [f"## {cls.__name__}{kind}\n", f"{inspect.getdoc(cls)}\n"]
        parts += ["| field | type | default | what it is |", "|---|---|---|---|"]
        notes = comments(cls)
        for field in dataclasses.fields(cls):
            if field.name != "kind":
                cells = [f"`{field.name}`", f"`{type_of(cls, field)}`", default_of(field), notes.get(field.name, "")]
                parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        parts.append("")
    return "\n".join(parts)


def source(cls: type) -> str:
    """Of a dataclass, then of those that it has fields from."""
    return "".join(inspect.getsource(one) for one in cls.__mro__ if "__dataclass_fields__" in vars(one))


def comments(cls: type) -> dict[str, str]:
    """What stands behind each field in the source, or in the lines above it."""
    lines = io.StringIO(source(cls))
    found, above = {}, []
    for token in tokenize.generate_tokens(lines.readline):
        is_note = token.type == tokenize.COMMENT and not token.string.startswith("# noqa")
        if is_note and token.line.lstrip().startswith("#"):
            above.append(token.string.removeprefix("# "))
        elif match := re.match(r"    (\w+): ", token.line):
            if is_note or above:
                found.setdefault(match[1], token.string.removeprefix("# ") if is_note else " ".join(above))
            above = []
    return found


def type_of(cls: type, field: dataclasses.Field) -> str:
    """As it is written in the source."""
    return re.search(rf"    {field.name}: (.*?)(?: = | +#|$)", source(cls), re.MULTILINE)[1]


def default_of(field: dataclasses.Field) -> str:
    """Its default, and the range it lies in."""
    value: Any = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    shown = "needed" if value is dataclasses.MISSING else f"`{value!r}`"
    signs = {"at_least": "≥", "above": ">", "at_most": "≤", "below": "<"}
    return ", ".join([shown, *(f"{signs[name]} {limit:g}" for name, limit in field.metadata.get("bounds", {}).items())])


def benchmarks(page: str, root: Path = DOCS.parent) -> str:
    """`page` with what `bench table` prints of each folder of measurements that it names; without that, as it is."""

    def fill(match: re.Match) -> str:
        folder = root / match[2]
        return f"{match[1]}\n{table.table(epath.Path(folder))}\n\n{match[3]}" if folder.exists() else match[0]

    return MEASURED.sub(fill, page)


def main() -> None:
    page = DOCS / "BENCHMARKS.md"
    page.write_text(benchmarks(page.read_text()))
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "commands.md").write_text(commands())
    (FOLDER / "config.md").write_text(fields())


if __name__ == "__main__":
    main()
