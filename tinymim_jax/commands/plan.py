"""`plan`: does a chain fit on a pod, and how long will it take at least."""

import json
import sys

from etils.epath import Path

from tinymim_jax.commands.flags import new_flags, output, parse
from tinymim_jax.runtime import storage

USAGE = """python -m tinymim_jax plan --config=FILE[:options] [--stage=NAME] [--topology=v5e:16x16] [--json=FILE]

  compiles the real training step of each stage, without data, weights or the devices, and prints memory, FLOPs,
  collectives and lower bounds for step and schedule; says what to change where a stage does not fit
"""


def main(argv: list[str]) -> None:
    """Runs the command with its arguments; raises InputError on bad ones."""
    values = new_flags(
        stage=(str, None, "this stage only"),
        topology=(str, "", "v4:4x4x4, v5e:16x16, ...; needs libtpu (pip install libtpu); default: the devices at hand"),
        json=(str, None, "the file where the numbers go as well"),
    )
    cfg = parse(values, argv, USAGE)
    out = output(values.json, [".json"], "json") if values.json else None
    if out:
        storage.check_writable(out.parent)

    from tinymim_jax.planning import estimate

    report = estimate.run(cfg, values.stage, values.topology, Path(f"runs/{cfg.name}"))
    print(estimate.table(report))
    if out:
        out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {out}", file=sys.stderr)
