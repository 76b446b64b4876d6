"""The shape of the house: few entries, few floors, imports that go down, kinds known where they are defined."""

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tinymim_jax"
ENTRIES, FLOORS, LINES = 16, 8, 300
FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.read_text().strip()]
LONG_FUNCTIONS = {"get_config"}
# The dicts that list kinds, and the folder that defines them.
KINDS = {
    "tasks.TASKS": "tasks",
    "tasks.targets.TARGETS": "tasks/targets",
    "models.MODELS": "models",
    "evals.EVALS": "evals",
}


def room(path):
    """A file or a folder at the top."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path):
    """Also what is imported inside functions, and what `__main__` imports by name."""
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tinymim_jax":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("tinymim_jax."))
    yield from re.findall(r"import_module\(f?\"tinymim_jax\.(\w+)", text)


@functools.cache
def arrows():
    found = {room(path): set() for path in FILES}
    for path in FILES:
        found[room(path)] |= set(imported_rooms(path)) - {room(path)}
    return found


def floor(name, above=()):
    """A room stands above all that it imports."""
    assert name not in above, f"rooms import each other in a circle: {' -> '.join([*above, name])}"
    return 1 + max((floor(other, (*above, name)) for other in arrows()[name]), default=0)


def test_few_entries_and_few_floors():
    entries = [p for p in PACKAGE.iterdir() if p.name != "__pycache__"]
    assert len(entries) <= ENTRIES, sorted(p.name for p in entries)
    assert max(map(floor, arrows())) <= FLOORS


def test_the_floors_are_those_that_the_guide_for_newcomers_names():
    floors = {}
    for name in arrows():
        floors.setdefault(floor(name), set()).add(name)
    assert floors == {
        1: {"runtime", "objectives"},
        2: {"data", "models", "weights"},
        3: {"tasks", "evals"},
        4: {"experiment"},
        5: {"training", "bridge", "__init__"},
        6: {"planning", "report", "bench"},
        7: {"commands"},
        8: {"__main__"},
    }


def test_every_folder_has_its_tests():
    for folder in {room(path) for path in FILES} - {"__init__", "__main__"}:
        assert list((ROOT / "tests" / folder).glob("test_*.py")), folder


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_and_files_are_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name not in LONG_FUNCTIONS:
            assert node.end_lineno - node.lineno < 50, node.name


def kinds():
    """(folder, names of kinds, names of their configs) of each dict."""
    for path, folder in KINDS.items():
        module, name = path.rsplit(".", 1)
        found = getattr(importlib.import_module(f"tinymim_jax.{module}"), name)
        yield folder, set(found), {config.__name__ for config in found.values()}


def branches_on(text, names, configs):
    """Lines that compare with the name of a kind, or ask whether something is of one."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Compare, ast.MatchValue)):
            strings = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            asks_kind = any(isinstance(n, ast.Attribute) and n.attr == "kind" for n in ast.walk(node))
            if asks_kind and strings & names:
                yield node.lineno
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            asked = {getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(node.args[1])}
            if asked & configs:
                yield node.lineno


def test_no_branch_on_a_kind_outside_the_folder_that_defines_it():
    found = []
    for folder, names, configs in kinds():
        for path in FILES:
            where = path.relative_to(PACKAGE)
            if not where.is_relative_to(folder):
                found += [f"{where}:{line}" for line in branches_on(path.read_text(), names, configs)]
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "if task.kind == 'mae': pass",
        "x = stage.task.kind in ('mae', 'y')",
        "isinstance(t, (int, config.Mae))",
        "isinstance(t, Mae)",
    ],
)
def test_such_a_branch_would_be_found(text):
    assert list(branches_on(text, {"mae"}, {"Mae"})) == [1]
