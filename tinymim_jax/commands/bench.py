"""`bench`: what something costs, as one JSON object on stdout."""

import json
import os

from tinymim_jax.commands.flags import new_flags, parse, parse_positional
from tinymim_jax.runtime.errors import InputError

USAGE = """python -m tinymim_jax bench VERB --config=FILE[:options] --stage=NAME [--batch_size=N] [--rounds=N]
python -m tinymim_jax bench table FOLDER

  step      times a stage's training step on random images and weights, no data needed; a teacher named by path needs
            its stage.json
  beside    times --students of them in one program, which runs their teacher once, and one by one
  augment   times it with and without mixup, cutmix and random erasing, which the device does
  loader    times reading, decoding and augmenting; needs the stage's data
  relation  times the relation loss, ours and the plain one, and counts its memory
  table     what these but augment have printed into FOLDER/*.json, as Markdown
"""

VERBS = ("step", "beside", "augment", "loader", "relation")
FLAGS = {  # and the verbs that have them; all have --stage and --rounds
    "batch_size": ("step", "beside", "augment", "relation"),
    "students": ("beside",),
    "vs": ("step",),
    "tokens": ("relation",),
    "rows": ("relation",),
}


def main(argv: list[str]) -> None:
    """Runs the command with its arguments; raises InputError on bad ones."""
    values = new_flags(
        stage=(str, None, "the stage to measure"),
        batch_size=(int, None, "images a step, over all devices (default: the stage's)"),
        students=(int, 3, "beside: so many students in one program"),
        rounds=(int, 5, "the median of so many is reported"),
        vs=(("torch",), None, "step: in turn the same in PyTorch, eager and compiled (in a clone, with [torch])"),
        tokens=(list, [], "relation: how many tokens a side (default: the stage's)"),
        rows=(int, None, "relation: so many of its rows are worked on at a time (default: as the stage would)"),
    )
    verb = argv[0] if argv else "--help"
    if verb == "table":
        (folder,) = parse_positional(new_flags(), argv[1:], ["FOLDER"], USAGE)
        from tinymim_jax.bench import table

        print(table.table(folder))
        return
    if verb not in VERBS and verb not in ("-h", "--help"):
        raise InputError(f"unknown benchmark {verb!r}; choose one of {', '.join(VERBS)}, table")
    cfg = parse(values, argv[1:] or ["--help"], USAGE)
    if values.stage not in cfg.stages:
        given = f"--stage={values.stage}: no such stage" if values.stage else "--stage=NAME is needed"
        raise InputError(f"{given}; choose one of {', '.join(cfg.stages)}")
    for name, verbs in FLAGS.items():
        if values[name].present and verb not in verbs:
            raise InputError(f"--{name} is for bench {', '.join(verbs)}, not {verb}")
    if values.batch_size:
        cfg.stages[values.stage].run.batch_size = values.batch_size
    if values.vs:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves PyTorch room on a GPU
    from tinymim_jax.bench import beside, loader, relation, step

    given = cfg, values.stage, values.rounds
    calls = {
        "step": lambda: step.step(*given, values.vs),
        "beside": lambda: beside.beside(*given, values.students),
        "augment": lambda: step.augment(*given),
        "loader": lambda: loader.loader(*given),
        "relation": lambda: relation.relation(*given, values.tokens, values.rows),
    }
    print(json.dumps(calls[verb](), indent=2))
