"""--config=FILE[:options] and --config.PATH.TO.FIELD=VALUE, as ml_collections reads them, with one-line errors."""

import ast
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

from absl import flags
from etils.epath import Path
from ml_collections import config_flags

from tinymim_jax.experiment import config_file
from tinymim_jax.experiment.config import Config
from tinymim_jax.experiment.validate import check
from tinymim_jax.runtime import cluster, distributed, storage
from tinymim_jax.runtime.codec import differences, to_dict
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.preemption import StopRequest

CONFIG_USAGE = """
--config=FILE[:options]: the experiment; options are listed at the top of FILE
--config.stages.NAME.FIELD=VALUE: changes one field; what each means stands with the classes that
tinymim_jax/experiment/config.py names"""


class OrNone(flags.ArgumentParser):
    """Reads "none" as None, and all else as `kind`; `validate.check` knows which fields may be None."""

    def __init__(self, kind: Callable[[Any], Any], what: str):
        self.kind, self.what = kind, what

    def parse(self, argument: Any) -> Any:
        """A value of the field's type, or None; raises ValueError."""
        if argument in ("none", "None", None):
            return None
        try:
            return self.kind(argument)
        except ValueError:
            raise ValueError(f"{argument!r} is not {self.what}") from None


KINDS = {
    int: functools.partial(flags.DEFINE_integer, lower_bound=1),
    float: functools.partial(flags.DEFINE_float, lower_bound=0),
    str: flags.DEFINE_string,
    bool: flags.DEFINE_bool,
    list: flags.DEFINE_list,
}

# Of what goes over a folder of images and writes one file.
FOLDER_FLAGS = {
    "out": (str, None, "the file to write"),
    "batch_size": (int, 64, "images at once"),
    "on_bad_image": (("stop", "skip"), "stop", "skip: name and leave out what cannot be decoded"),
}

config_flags.register_flag_parser_for_type(int, OrNone(int, "a whole number"))
config_flags.register_flag_parser_for_type(float, OrNone(float, "a number"))
config_flags.register_flag_parser_for_type(str, OrNone(str, "text"))
# A field with choices is read as a string; `validate.check` knows the choices.
config_flags.register_flag_parser_for_type(Literal, flags.ArgumentParser())


def new_flags(**described: tuple[Any, Any, str]) -> flags.FlagValues:
    """Flags by name: (kind, default, help).

    A kind is int (at least 1), float (at least 0), str, bool, list, a range or some choices.
    """
    values = flags.FlagValues()
    for name, (kind, default, text) in described.items():
        if isinstance(kind, range):
            flags.DEFINE_integer(name, default, text, kind.start, kind.stop - 1, flag_values=values)
        elif isinstance(kind, tuple):
            flags.DEFINE_enum(name, default, kind, text, flag_values=values)
        else:
            KINDS[kind](name, default, text, flag_values=values)
    return values


def define_cluster(values: flags.FlagValues) -> None:
    """Adds the flags that say how several processes find each other."""
    found = "of several processes; Slurm, Open MPI, TPU pods and JAX_COORDINATOR_ADDRESS, ... are found without flags"
    flags.DEFINE_string("coordinator", None, f"HOST:PORT of process 0 {found}", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "how many there are", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "which this is, from 0", lower_bound=0, flag_values=values)
    wait = "seconds to wait for all of them"
    flags.DEFINE_float("start_timeout", 300, wait, lower_bound=1, flag_values=values)


def start_cluster(values: flags.FlagValues, stop: StopRequest, **facts: Any) -> None:
    """Joins the other processes, if there are any.

    Raises InputError if they do not come or differ in `facts`, Interrupted if one was asked to stop meanwhile.
    """
    parts = values.coordinator, values.num_processes, values.process_id
    is_given = any(part is not None for part in parts)
    own = cluster.given(*parts) if is_given else cluster.find()
    distributed.start(own, values.start_timeout, stop, **facts)


def parse(values: flags.FlagValues, argv: list[str], usage: str) -> Config:
    """Parses `argv` into `values` and the checked config; raises InputError, or SystemExit(0) after printing help."""
    argv = _joined(argv)
    path = config_path(argv)
    _help(values, argv, usage, [CONFIG_USAGE, *_header(path)])
    if path is None:
        raise InputError("--config=FILE is needed, e.g. --config=configs/digits/chain.py")
    file, *options = path.split(":", 1)
    if not Path(file).is_file():
        raise InputError(f"--config={path}: there is no file {file}")
    cfg = config_file.load(file, *options)
    _check_overrides(to_dict(cfg), argv)
    how = {"flag_values": values, "sys_argv": ["", *argv], "parse_fn": lambda _: cfg}  # the file is read once
    config_flags.DEFINE_config_dataclass("config", cfg, "the experiment", **how)
    if rest := parse_flags(values, argv):
        raise InputError(f"unexpected argument {rest[0]!r}; see --help")
    return check(values.config)


def config_path(argv: Sequence[str]) -> str | None:
    """What --config names, FILE[:options]."""
    return next((a.split("=", 1)[1] for a in _joined(list(argv)) if a.startswith("--config=")), None)


def recipe(argv: Sequence[str], cfg: Config) -> dict[str, Any]:
    """What --config names, and in what `cfg` differs from what it gives: lines "field: old -> new"."""
    path = config_path(argv)
    return {"config": path, "changed": differences(to_dict(config_file.load(*path.split(":", 1))), to_dict(cfg))}


def parse_positional(values: flags.FlagValues, argv: list[str], names: list[str], usage: str) -> list[Path]:
    """Parses `argv` into `values` and one path for each of `names`; raises InputError, or SystemExit(0) after help.

    Where the last of `names` ends in "...", there may be several of it.
    """
    _help(values, argv, usage)
    rest, several = parse_flags(values, argv), names[-1].endswith("...")
    if len(rest) < len(names) or (len(rest) > len(names) and not several):
        raise InputError(f"expected {' '.join(names)}, got {' '.join(rest) or 'nothing'}; see --help")
    paths = [storage.path(path) for path in rest]
    for path in paths:
        storage.check(path)
    return paths


def output(name: str | None, suffixes: Collection[str], flag: str = "out") -> Path:
    """The file that a flag names; raises InputError if it ends in none of `suffixes`."""
    path = storage.path(name or "")
    if path.suffix not in suffixes:
        raise InputError(f"--{flag}={name or ''}: name a file that ends in {' or '.join(suffixes)}")
    if path.is_dir():
        raise InputError(f"--{flag}={path} is a folder; name a file")
    return path


def parse_flags(values: flags.FlagValues, argv: list[str]) -> list[str]:
    """Parses `argv` into `values`; returns what is no flag. Raises InputError."""
    try:
        return values(["", *argv])[1:]
    except (flags.Error, TypeError, ValueError) as error:  # the last two: a value that does not suit a config's field
        raise InputError(f"{' '.join(str(error).split())}; see --help") from None


def _help(values: flags.FlagValues, argv: list[str], usage: str, more: Sequence[str] = ()) -> None:
    """Prints `usage` and every flag if that is asked for, and raises SystemExit(0)."""
    if not argv or "--help" in argv or "-h" in argv:
        known = values.get_help(include_special_flags=False).strip().removeprefix(__name__)
        print("\n".join([usage, f"flags{known}" if known else "", *more]))
        raise SystemExit(0)


def _header(path: str | None) -> list[str]:
    """The text at the top of the config file that is named, if there is one."""
    file = Path((path or "").split(":", 1)[0])
    if not file.is_file():
        return []
    return ["", f"{file}:", ast.get_docstring(ast.parse(file.read_text())) or "(it says nothing of itself)"]


def _joined(argv: list[str]) -> list[str]:
    """`--config FILE` as `--config=FILE`, the form that is looked for."""
    if "--config" in argv[:-1]:
        i = argv.index("--config")
        return [*argv[:i], f"--config={argv[i + 1]}", *argv[i + 2 :]]
    return argv


def _check_overrides(fields: dict[str, Any], argv: list[str]) -> None:
    """Raises InputError that lists the choices if an override names none of the `fields` of a config."""
    for arg in argv:
        name, _, value = arg[2:].partition("=")
        if arg.startswith(tuple(f"--{field}." for field in fields)):
            raise InputError(f"{arg}: fields of the config begin with config: --config.{arg[2:]}")
        node: Any = fields
        for part in name.split(".")[1:] if arg.startswith("--config.") else ():
            if node is None:
                break  # an optional part that ml_collections will create
            part, known = part.split("[")[0], node if isinstance(node, dict) else {}
            if part not in known:
                raise InputError(f"--{name}: there is no {part!r}; choose one of {', '.join(known) or 'none'}")
            node = known[part]
        if node and node is not fields and isinstance(node, dict) and value not in ("none", "None"):
            raise InputError(
                f"--{name} holds {', '.join(node)}; set one of these, e.g. --{name}.{next(iter(node))}=..."
            )
