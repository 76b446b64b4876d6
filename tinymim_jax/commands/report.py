"""`report`: a run as one page, finished or under way."""

import os
import time

import jax

from tinymim_jax.commands.flags import new_flags, parse_positional
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError

EVERY = 30.0  # seconds between two pages
USAGE = """python -m tinymim_jax report WORKDIR [--compare=OTHER,...] [--watch[=SECONDS]]

  WORKDIR   the --workdir of a run, finished or under way; index.html, tables.md, and what papers show as PNG and SVG
            go to WORKDIR/report/, and with --compare WORKDIR/report/compare.html alone
"""


def main(argv: list[str]) -> None:
    """Runs the command with its arguments; raises InputError if a folder holds no run."""
    values = new_flags(
        compare=(list, [], "other workdirs, whose curves and results then stand beside those of WORKDIR"),
        watch=(float, None, f"write the page again after so many seconds ({EVERY:g}) until the run is finished"),
    )
    argv = [f"--watch={EVERY:g}" if arg == "--watch" else arg for arg in argv]
    (folder,) = parse_positional(values, argv, ["WORKDIR"], USAGE)
    if values.watch is not None and values.watch < 1:
        raise InputError(f"--watch={values.watch:g}: give it at least a second")
    if "JAX_PLATFORMS" not in os.environ:  # a run under way has the accelerator, and a few pictures need none
        jax.config.update("jax_platforms", "cpu")

    from tinymim_jax.report import page, tables
    from tinymim_jax.runtime import program_cache

    program_cache.keep()
    others, made = [storage.path(other) for other in values.compare], {}
    if values.watch is not None:
        print(f"writing {folder}/report every {values.watch:g} s until the run is finished; Ctrl-C ends it", flush=True)
    while True:
        begin = time.monotonic()
        runs = page.write(folder, others, values.watch, made)
        if values.watch is None or all(run.finished() for run in runs):
            break
        time.sleep(max(values.watch - (time.monotonic() - begin), 1))
    for run in runs:
        print(tables.text(run.results()))
        for where, text in run.notes:
            print(f"note: {where}: {text}" if where else f"note: {text}")
