"""--config=FILE[:options] and --config.PATH.TO.FIELD=VALUE, as ml_collections reads them, with one-line errors."""

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from tinymim_jax import config
from tinymim_jax.config import Config, InputError


def new_flags(usage: str) -> flags.FlagValues:
    """An empty set of flags; `usage` is shown by --help."""
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, usage, short_name="h", flag_values=values)
    return values


def parse(values: flags.FlagValues, argv: list[str]) -> Config:
    """Parses `argv` into `values` and the checked config; raises InputError, or SystemExit(0) after printing help."""
    path = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), None)
    if path is not None and not Path(path.split(":", 1)[0]).is_file():
        raise InputError(f"--config={path}: there is no file {path.split(':', 1)[0]}")
    config_flags.DEFINE_config_file("config", None, "the experiment", flag_values=values, sys_argv=["", *argv])
    try:
        if path is not None:
            _check_overrides(_load(path), argv)
        rest = values(["", *argv])[1:]
    except flags.Error as error:
        raise InputError(" ".join(str(error).split())) from None
    if values.help:
        print(values.find_module_defining_flag and values["help"].help)
        raise SystemExit(0)
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}; see --help")
    if path is None:
        raise InputError("--config=FILE is needed, e.g. --config=configs/digits/chain.py")
    return config.check(values.config)


def _load(path: str) -> Config:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["", f"--config={path}"])
    values(["", f"--config={path}"])
    return values.config


def _check_overrides(loaded: Config, argv: list[str]) -> None:
    """Raises InputError that lists the choices if an override names a field that is not there."""
    for arg in argv:
        if not arg.startswith("--config."):
            continue
        name = arg[2:].split("=", 1)[0]
        node: Any = loaded
        for part in name.split(".")[1:]:
            part = part.split("[")[0]
            fields = list(node) if isinstance(node, dict) else [f.name for f in _fields(node)]
            if part not in fields:
                raise InputError(f"--{name}: there is no {part!r}; choose one of {', '.join(fields) or 'none'}")
            node = node[part] if isinstance(node, dict) else getattr(node, part)


def _fields(node: Any) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(node) if dataclasses.is_dataclass(node) else ()
