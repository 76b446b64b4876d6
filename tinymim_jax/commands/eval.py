"""`eval`: a finished model on everything."""

import dataclasses

from tinymim_jax.commands.flags import new_flags, parse_positional
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError

USAGE = """python -m tinymim_jax eval CHECKPOINT [--suite=imagenet|robust|probe|segmentation|all] [--data=PATH] ...

  CHECKPOINT        a finished stage's folder, or a converted checkpoint
  --suite=imagenet  top-1 and top-5 on the clean evaluation set (of the checkpoint's own stage, whatever data that is)
  --suite=robust    ImageNet-C: made from the clean set, or stored; ImageNet-A and -R where their sets are given
  --suite=probe     kNN and logistic regression on frozen features
  --suite=segmentation  mean IoU of a model that gives each pixel a class
  --suite=all       all of these; without a head, the probes; of a model that segments, its mean IoU
"""


def main(argv: list[str]) -> None:
    """Runs the command with its arguments; raises InputError on bad ones."""
    values = new_flags(
        suite=(str, "all", "what to measure"),
        data=(str, "", "an ImageFolder tree to take instead: val/ (or test/) and, for probes, train/; or not split"),
        val_fraction=(float, None, "the part of a tree without splits that is measured on (default: as in training)"),
        on_bad_image=(("stop", "skip"), None, "skip: leave out what cannot be read (default: as in training)"),
        imagenet_a=(str, "", "the archive's folder of 200 wnids"),
        imagenet_r=(str, "", "likewise"),
        imagenet_c=(str, "", "holds <corruption>/<severity>/<wnid>/*"),
        direct=(bool, False, "corrupt the evaluation's own crops; else images are resized and stored as ImageNet-C's"),
        per_class=(int, None, "measure so many images of each class only (of stored corruptions: of each folder)"),
        bank_per_class=(int, None, "of each class, for kNN and logistic regression to learn from; all take hours"),
        ratios=(list, None, "of a model that segments: sizes of images, as factors, e.g. 0.5,0.75,1,1.25,1.5,1.75"),
        flip=(bool, False, "of a model that segments: mirror images, too; the mean probability of all counts"),
        out=(str, None, "where eval.json and eval.md go (default: CHECKPOINT/eval)"),
    )
    (folder,) = parse_positional(values, argv, ["CHECKPOINT"], USAGE)

    from tinymim_jax.evals import suite
    from tinymim_jax.experiment import stage_file
    from tinymim_jax.report import analyses, figures
    from tinymim_jax.runtime import program_cache
    from tinymim_jax.runtime.sharding import make_mesh

    program_cache.keep()
    sets = suite.Sets(**{f.name: getattr(values, f.name) for f in dataclasses.fields(suite.Sets)})
    sets.ratios = _ratios(values.ratios) if values.ratios else None
    out = storage.path(values.out) if values.out else folder / "eval"
    report = suite.evaluate(stage_file.read_subject(folder), values.suite, sets, make_mesh(), out)
    print(suite.table(report))
    print(f"wrote {out}/eval.json and {out}/eval.md")
    for file in storage.children(out, "*.npz"):
        for picture in figures.save(analyses.analysis_charts(analyses.read(file), file.stem), out):
            print(f"wrote {picture}")


def _ratios(given: list[str]) -> tuple[float, ...]:
    try:
        ratios = tuple(map(float, given))
        if all(0 < ratio < 100 for ratio in ratios):
            return ratios
    except ValueError:
        pass
    raise InputError(f"--ratios={','.join(given)}: give numbers above 0, e.g. 0.5,0.75,1,1.25,1.5,1.75")
