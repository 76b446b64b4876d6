"""`analyze`: what finished models have learnt, looked into."""

import dataclasses

from tinymim_jax.commands.flags import new_flags, parse_positional
from tinymim_jax.runtime import storage

USAGE = """python -m tinymim_jax analyze CHECKPOINT [CHECKPOINT2 ...] [--data=FOLDER] [--what=cka,...] [--out=FOLDER]

  CHECKPOINT         a finished stage's folder, or a converted checkpoint
  --what=cka         similarity (linear CKA) of every layer with every other, of each two models or of one with itself
  --what=attention   how far each head looks, in pixels, and how spread its attention is, in nats
  --what=spectrum    effective rank and length of each layer's features
  --what=neighbours  the images whose features are nearest to those of some
  --what=relation    KL of each head of a student (the first) from its teacher (the second), and maps of both

  All of these, where nothing else is said; the last with --student_block and --teacher_block. Arrays go to
  OUT/NAME.npz, figures beside them, numbers to OUT/analysis.json.
"""


def main(argv: list[str]) -> None:
    """Runs the command with its arguments; raises InputError on bad ones."""
    values = new_flags(
        what=(list, [], "the analyses (default: all that go)"),
        data=(str, "", "a folder of images, in any sub-folders (default: the first checkpoint's evaluation set)"),
        images=(int, 1152, "how many are looked at"),
        spread=(bool, True, "over the whole set; --nospread: its first images, as the published plots have it"),
        batch_size=(int, 128, "images at once; CKA is a mean over such batches"),
        layers=(("norm1", "blocks"), "norm1", "what each block reads, normalised, or what it puts out"),
        cls=(bool, False, "with the class token; of the spectrum: that alone"),
        patch_px=(float, None, "attention: a patch's side in pixels (default: the model's; published plots count 14)"),
        mask_ratio=(float, 0.0, "attention: hide so much of each image"),
        student_block=(int, None, "relation: the first model's block, from 1"),
        teacher_block=(int, None, "relation: the second model's block, from 1"),
        heads=(int, None, "relation: split both into so many (default: as they were trained)"),
        on_bad_image=(("stop", "skip"), None, "skip: leave out what cannot be read (default: as in training)"),
        out=(str, None, "where files go (default: CHECKPOINT/analysis)"),
    )
    folders = parse_positional(values, argv, ["CHECKPOINT..."], USAGE)

    from tinymim_jax.evals import analyze
    from tinymim_jax.evals.relation_agreement import HEAD
    from tinymim_jax.experiment import stage_file
    from tinymim_jax.report import analyses, figures
    from tinymim_jax.runtime import program_cache
    from tinymim_jax.runtime.sharding import make_mesh

    program_cache.keep()
    fields = {f.name: getattr(values, f.name) for f in dataclasses.fields(analyze.Asked)}
    asked = analyze.Asked(**fields | {"what": tuple(values.what)})
    out = storage.path(values.out) if values.out else folders[0] / "analysis"
    report = analyze.analyze([stage_file.read_subject(folder) for folder in folders], asked, make_mesh(), out)
    for name, scalars in report["results"].items():
        shown = [f"{key} {value:.4g}" for key, value in scalars.items() if not HEAD.fullmatch(key)]
        print(f"{name}: {', '.join(shown)}")
        figures.save(analyses.analysis_charts(analyses.read(out / f"{name}.npz"), name), out)
    print(f"wrote {out}/analysis.json, and of each an .npz and figures")
