"""`report`: the tables and pictures of a workdir, made again."""

import json

from tinymim_jax.commands.flags import new_flags, parse_positional
from tinymim_jax.runtime.errors import InputError

USAGE = """python -m tinymim_jax report WORKDIR

  WORKDIR   the --workdir of a run; pictures and tables.md go to WORKDIR/report/
"""


def main(argv: list[str]) -> None:
    """Runs the command with its arguments; raises InputError if the folder holds no finished run."""
    (workdir,) = parse_positional(new_flags(), argv, ["WORKDIR"], USAGE)
    if (workdir / "stage.json").is_file():
        raise InputError(f"{workdir} is the folder of a stage; give the folder above, {workdir.parent}")
    if not (workdir / "results.json").is_file():
        why = "no run ended there" if workdir.is_dir() else "there is no such folder"
        if (workdir / "chain.json").is_file():
            why = "the run is not at its end; the same run command goes on with it"
        raise InputError(f"{workdir} has no results.json: {why}")

    from tinymim_jax.report import figures, tables

    try:
        results = json.loads((workdir / "results.json").read_text())
        table = tables.text(results)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{workdir / 'results.json'} is damaged; the run command makes it anew") from None
    print(table)
    for file in [*tables.write(workdir, results), *figures.write(workdir, results)]:
        print(f"wrote {file}")
