"""`bench`: what something costs, as one JSON object on stdout."""

import json
import os

from absl import flags

from tinymim_jax.commands.flags import new_flags, parse
from tinymim_jax.runtime.errors import InputError

USAGE = """python -m tinymim_jax bench VERB --config=FILE[:options] --stage=NAME [--batch_size=N] [--rounds=N]

  step                              times a stage's training step on random images and weights, no data needed;
                                    a teacher named by path needs its stage.json
  step --vs=torch                   and, in turn, the same in PyTorch, eager and compiled (needs .[torch])
  augment                           times it with and without mixup, cutmix and random erasing, which the device does
  loader                            times reading, decoding and augmenting; needs the stage's data
  relation [--tokens=N,N] [--rows=N]
                                    times the relation loss, ours and the plain one, and counts its memory; N rows of
                                    a relation are worked on at a time (default: as the stage would)
  --config.stages.NAME.FIELD=VALUE  changes one field, e.g. ....model.dtype=float32
  --batch_size=N                    over all devices (default: the stage's)
  --rounds=N                        the median of N is reported"""

VERBS = ("step", "augment", "loader", "relation")
FLAGS = {  # and the verbs that have them; all have --stage and --rounds
    "batch_size": ("step", "augment", "relation"),
    "vs": ("step",),
    "tokens": ("relation",),
    "rows": ("relation",),
}


def main(argv: list[str]) -> None:
    """Runs the command with its arguments; raises InputError on bad ones."""
    values = new_flags(USAGE)
    flags.DEFINE_string("stage", None, "the stage to measure", flag_values=values)
    flags.DEFINE_integer("batch_size", None, "images a step", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("rounds", 5, "measurements", lower_bound=1, flag_values=values)
    flags.DEFINE_enum("vs", None, ["torch"], "what else to measure", flag_values=values)
    flags.DEFINE_integer("rows", None, "of a relation", lower_bound=1, flag_values=values)
    flags.DEFINE_list("tokens", [], "how many tokens a side", flag_values=values)
    verb = argv[0] if argv else "--help"
    if verb not in VERBS and verb not in ("-h", "--help"):
        raise InputError(f"unknown benchmark {verb!r}; choose one of {', '.join(VERBS)}")
    cfg = parse(values, argv[1:] or ["--help"])
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
    from tinymim_jax.bench import loader, relation, step

    given = cfg, values.stage, values.rounds
    calls = {
        "step": lambda: step.step(*given, values.vs),
        "augment": lambda: step.augment(*given),
        "loader": lambda: loader.loader(*given),
        "relation": lambda: relation.relation(*given, values.tokens, values.rows),
    }
    print(json.dumps(calls[verb](), indent=2))
