"""The study of TinyMIM on ImageNet-1K, a table at a time: each row is pre-trained and then fine-tuned.

python -m tinymim_jax run --config=configs/imagenet/study.py:table=6 --workdir=runs/study

Options: table=5|6|7|8|10|11|12|13|all (default: 7), of the paper; row=NAME, one of its rows; teacher=PATH, a trained
MAE-L, a stage's folder or a PyTorch checkpoint (without it, one is trained first); data=PATH as in chain.py. Rows that
are finished, also those of another table in the same workdir, are not run again.
Cost: not measured here. Expected: the paper's top-1 stand beside ours in the table at the end.
"""

from tinymim_jax.experiment import recipes, study
from tinymim_jax.experiment.config import Config, Init, Stage


def get_config(arg: str = "") -> Config:
    o = recipes.options(arg, table="7", row="", teacher="", data="")
    train, val = (recipes.imagenet(is_train, o["data"]) for is_train in (True, False))

    def finetune(size: str, source: str | None, epochs: int) -> Stage:
        if source is None:
            return recipes.deit(recipes.classifier(size), train, val)
        return recipes.finetune_imagenet(size, Init(source), o["data"], short=epochs == 100)

    preset = study.Preset(
        mae=lambda size: recipes.mae(recipes.vit(size, dtype="bfloat16"), train),
        distill=lambda size, teacher, epochs: recipes.distill(
            recipes.student(size), teacher, train, block=study.BLOCK, epochs=epochs
        ),
        finetune=finetune,
        depth={size: recipes.SIZES[size]["depth"] for size in ("large", "base", "small", "tiny")},
        heads=lambda teacher: 16 if teacher == "large" else 12,
        teacher=o["teacher"],
    )
    return study.experiment("study", preset, study.rows(o["table"], o["row"]))
