"""`report`: the tables and pictures of a workdir, made again."""

import argparse
import json
from pathlib import Path

from tinymim_jax.config import InputError


def main(argv: list[str]) -> None:
    """Runs the command with its arguments; raises InputError if the folder holds no finished run."""
    parser = argparse.ArgumentParser("python -m tinymim_jax report", description=__doc__)
    parser.add_argument("workdir", type=Path, help="the --workdir of a run")
    workdir = parser.parse_args(argv).workdir
    if not (workdir / "results.json").is_file():
        raise InputError(f"{workdir} has no results.json: it is not the workdir of a run with a finished stage")

    from tinymim_jax import report

    results = json.loads((workdir / "results.json").read_text())
    print(report.table(results))
    for picture in report.write(workdir, list(results["stages"])):
        print(f"wrote {picture}")
