"""`doctor`: what is wrong with this machine or cluster, and the fix."""

import os

from tinymim_jax.commands.flags import define_cluster, new_flags, parse, parse_flags, start_cluster
from tinymim_jax.commands.run import check_workdir
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.codec import to_dict
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.preemption import StopRequest

USAGE = """python -m tinymim_jax doctor [--config=FILE[:options]] [--workdir=DIR]

  looks at versions, devices, processes, free disk and, with a config, at its mesh and data; started in every process of
  a cluster, as `run` would be, it also finds missing processes, hosts that differ in code, packages or config, and what
  only some of them lack
"""


def main(argv: list[str]) -> None:
    """Runs the command with its arguments; raises InputError if something needs mending."""
    values = new_flags(workdir=(str, None, "where results would go (default: runs/ and the config's name)"))
    define_cluster(values)
    if any(arg.startswith("--config") or arg in ("--help", "-h") for arg in argv):
        cfg = parse(values, argv, USAGE)
    else:
        cfg = None
        if rest := parse_flags(values, argv):
            raise InputError(f"unexpected argument {rest[0]!r}; see --help")
    workdir = storage.path(values.workdir or (f"runs/{cfg.name}" if cfg else "runs"))
    check_workdir(workdir)
    with StopRequest() as stop:
        start_cluster(values, stop, config=to_dict(cfg), workdir=str(workdir))
    if stop.asked:
        raise KeyboardInterrupt("stopped before anything was looked at")

    import jax

    from tinymim_jax.planning import doctor

    bad = doctor.report(cfg, workdir, os.environ)
    if bad:
        where = " (as process 0 says, if not above)" if jax.process_index() else ""
        raise InputError(f"{bad} of these need mending{where}")
