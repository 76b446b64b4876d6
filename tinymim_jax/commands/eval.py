"""`eval`: a finished model on everything."""

import dataclasses

from absl import flags

from tinymim_jax.commands.flags import new_flags, parse_positional
from tinymim_jax.runtime import storage

USAGE = """python -m tinymim_jax eval CHECKPOINT [--suite=imagenet|robust|probe|all] [--data=PATH] ...

  CHECKPOINT         a finished stage's folder, or a converted checkpoint
  --suite=imagenet   top-1 and top-5 on the clean evaluation set (of the checkpoint's own stage, whatever data that is)
  --suite=robust     ImageNet-C: made from the clean set, or stored; ImageNet-A and -R where their sets are given
  --suite=probe      kNN and logistic regression on frozen features
  --suite=all        all of these (default); without a head, the probes
  --data=PATH        an ImageFolder tree to take instead, with train/ and val/ (or test/)
  --imagenet_a=PATH  the archive's folder of 200 wnids; likewise --imagenet_r
  --imagenet_c=PATH  holds <corruption>/<severity>/<wnid>/*
  --per_class=N      measure on so many images of each class only (of stored corruptions: of each folder)
  --bank_per_class=N what kNN and logistic regression learn from; on all of ImageNet the latter takes hours
  --out=DIR          where eval.json and eval.md go (default: CHECKPOINT/eval)"""


def main(argv: list[str]) -> None:
    """Runs the command with its arguments; raises InputError on bad ones."""
    values = new_flags(USAGE)
    flags.DEFINE_string("suite", "all", "what to measure", flag_values=values)
    flags.DEFINE_string("out", None, "where to write", flag_values=values)
    for name in ("data", "imagenet_a", "imagenet_r", "imagenet_c"):
        flags.DEFINE_string(name, "", "an ImageFolder tree", flag_values=values)
    for name in ("per_class", "bank_per_class"):
        flags.DEFINE_integer(name, None, "images", lower_bound=1, flag_values=values)
    (folder,) = parse_positional(values, argv, ["CHECKPOINT"])

    from tinymim_jax.evals import suite
    from tinymim_jax.runtime.sharding import make_mesh

    sets = suite.Sets(**{f.name: getattr(values, f.name) for f in dataclasses.fields(suite.Sets)})
    out = storage.path(values.out) if values.out else folder / "eval"
    report = suite.evaluate(folder, values.suite, sets, make_mesh(), out)
    print(suite.table(report))
    print(f"wrote {out}/eval.json and {out}/eval.md")
