"""Trees of parameters by their names, "encoder/block1/norm1/scale"."""

import functools
import itertools
import re
from collections.abc import Iterable
from typing import Any

import flax.traverse_util
import jax


def flatten(tree: Any) -> dict[str, Any]:
    """Nested dict -> {"a/b/c": leaf}."""
    return flax.traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: dict[str, Any]) -> Any:
    """The inverse of `flatten`."""
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
    """{"a/b/c": shape} of a nested dict of arrays."""
    return {key: tuple(leaf.shape) for key, leaf in flatten(tree).items()}


def paths(tree: Any) -> Any:
    """A tree like `tree` whose leaves are their own paths, "encoder/block1/norm1/scale"."""
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda path, _: name(path), tree)


def matches(patterns: tuple[str, ...], name: str) -> bool:
    """Whether any regex matches the whole of `name`."""
    return any(re.fullmatch(p, name) for p in patterns)


def fold(keys: Iterable[str], among: Iterable[str]) -> str:
    """`keys` in a line: a module whose keys `among` are all in is named alone, neighbouring blocks are a range."""
    keys = list(keys)
    others = {prefix for key in set(among) - set(keys) for prefix in _prefixes(key)}
    names = dict.fromkeys(next((p for p in _prefixes(key) if p not in others), key) for key in keys)
    groups: dict[str, list[int]] = {}
    for name in names:
        block = re.search(r"block(\d+)", name)
        groups.setdefault(re.sub(r"block\d+", "block{}", name), []).extend([int(block[1])] if block else [])
    return ", ".join(template.replace("{}", _ranges(blocks)) for template, blocks in groups.items())


def _prefixes(key: str) -> list[str]:
    """Every leading part of a path: a, a/b and a/b/c of a/b/c."""
    return list(itertools.accumulate(key.split("/"), "{}/{}".format))


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return "+".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
