"""Typed dataclasses to and from plain JSON types: strict, and every error names the field."""

import dataclasses
import itertools
import json
import math
import operator
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union

from tinymim_jax.runtime.errors import InputError

# Fields that change the speed or the bookkeeping of a stage, never its weights.
RUNTIME_FIELDS = ("threads", "workers", "prefetch", "log_every", "checkpoint_every", "keep", "num_examples")


def ranged(default: Any = dataclasses.MISSING, **bounds: float) -> Any:
    """A dataclass field of numbers that `from_dict` keeps within `bounds`: at_least, above, at_most, below.

    Of a tuple, each number is; None, where the field may hold it, is not looked at.
    """
    return dataclasses.field(default=default, metadata={"bounds": bounds})


def check_name(where: str, name: str) -> None:
    """Raises InputError if `name`, a key of the dict `where`, could not name a file and a metric."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise InputError(f"{where}.{name}: a name has letters, digits, _, ., + and - only")


def _check_bounds(where: str, value: Any, bounds: dict[str, float]) -> None:
    tests = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}
    for number in value if isinstance(value, tuple) else (value,):
        if number is not None and not all(tests[name](number, bound) for name, bound in bounds.items()):
            must = " and ".join(f"{name.replace('_', ' ')} {bound}" for name, bound in bounds.items())
            raise InputError(f"{where} is {value}; it must be {must}")


def to_dict(value: Any) -> Any:
    """A config (or any part of one) as plain JSON types; and what is no field, which `from_dict` refuses."""
    if dataclasses.is_dataclass(value):
        return {name: to_dict(v) for name, v in vars(value).items()}
    if isinstance(value, dict):
        return {k: to_dict(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_dict(v) for v in value]
    return value


def from_dict(kind: Any, value: Any, where: str = "config") -> Any:
    """The inverse of `to_dict`: builds `kind` from JSON types; raises InputError naming the field."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass_from_dict(kind, value, where)
    if origin is Literal:
        if value not in args:
            raise InputError(f"{where}: unknown choice {value!r}; choose one of {', '.join(map(repr, args))}")
        return value
    if origin in (Union, types.UnionType):
        return _union_from_dict(args, value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (args[-1] is not ... and len(value) != len(args)):
            raise InputError(f"{where}: expected a tuple {kind}, got {value!r}")
        kinds = [args[0]] * len(value) if args[-1] is ... else args
        return tuple(from_dict(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise InputError(f"{where}: expected a dict, got {value!r}")
        return {k: from_dict(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{where}: expected {kind.__name__}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise InputError(f"{where} is {value}; it must be finite")
    return value


def _dataclass_from_dict(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected the fields of {kind.__name__}, got {value!r}")
    own, hints = {field.name for field in dataclasses.fields(kind)}, typing.get_type_hints(kind)
    hints = {name: hint for name, hint in hints.items() if name in own}
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise InputError(f"{where}.{unknown[0]}: no such field; {kind.__name__} has {', '.join(hints)}")
    required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in value]
    if missing:
        raise InputError(f"{where}.{missing[0]}: {kind.__name__} needs this field")
    fields = {k: from_dict(hints[k], v, f"{where}.{k}") for k, v in value.items()}
    for field in dataclasses.fields(kind):
        if field.name in fields:
            _check_bounds(f"{where}.{field.name}", fields[field.name], field.metadata.get("bounds", {}))
    return kind(**fields)


def _union_from_dict(options: tuple, value: Any, where: str) -> Any:
    if value is None and types.NoneType in options:
        return None
    options = [o for o in options if o is not types.NoneType]
    if len(options) == 1:
        return from_dict(options[0], value, where)
    kinds = {o.kind: o for o in options}  # dataclasses told apart by their `kind`
    name = value.get("kind") if isinstance(value, dict) else value
    if not isinstance(name, str) or name not in kinds:
        raise InputError(f"{where}.kind: unknown choice {name!r}; choose one of {', '.join(map(repr, kinds))}")
    return from_dict(kinds[name], value, where)


def walk(value: Any, kind: type, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every instance of `kind` in a config, in the order of its fields, with its path "field.key.field"."""
    if isinstance(value, kind):
        yield where, value
    elif dataclasses.is_dataclass(value) or isinstance(value, dict):
        names = value if isinstance(value, dict) else [field.name for field in dataclasses.fields(value)]
        for name in names:
            inner = value[name] if isinstance(value, dict) else getattr(value, name)
            yield from walk(inner, kind, f"{where}.{name}" if where else name)


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Lines "field: old -> new" between two `to_dict` results, leaving out `RUNTIME_FIELDS`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [k for k in {**old, **new} if k not in RUNTIME_FIELDS]
        each = (differences(old.get(k), new.get(k), f"{where}.{k}" if where else k) for k in keys)
        return list(itertools.chain.from_iterable(each))
    return [] if old == new else [f"{where}: {json.dumps(old)} -> {json.dumps(new)}"]
