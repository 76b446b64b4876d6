"""The shape of the house: imports go down, each module has its tests, files and functions stay small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tinymim_jax"
LAYERS = [
    ["serial", "stop", "hlo"],
    ["storage", "cluster"],
    ["agree", "config", "roll_call", "lock"],
    ["validate", "mesh", "metrics", "writer", "distributed"],
    ["optim", "checkpoint", "recipes", "progress", "models", "objectives", "data"],
    ["handoff", "tasks"],
    ["plan", "evals", "bridge"],
    ["step", "ready"],
    ["train", "outline"],
    ["chain", "report", "evaluate"],
    ["forecast"],
    ["doctor", "bench"],
    ["commands"],
    ["__main__"],
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
LONG_FUNCTIONS = {"run_stage", "get_config"}


def modules():
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


def room(path):
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tinymim_jax":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("tinymim_jax."))


def test_every_room_has_a_layer():
    assert {room(path) for path in modules()} == set(LAYER)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    own = room(path)
    for other in imported_rooms(path):
        assert other == own or LAYER[other] < LAYER[own], f"{own} imports {other}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_module_with_code_has_its_tests(path):
    if not path.read_text().strip():
        return
    relative = path.relative_to(PACKAGE)
    name = relative.stem.strip("_")
    assert (ROOT / "tests" / relative.parent / f"test_{name}.py").is_file()


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_and_files_are_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name not in LONG_FUNCTIONS:
            assert node.end_lineno - node.lineno < 50, node.name
