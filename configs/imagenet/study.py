"""The study of TinyMIM on ImageNet-1K, a table at a time: each row distils MAE-L into B for 100 epochs and fine-tunes it.

python -m tinymim_jax run --config=configs/imagenet/study.py:table=6 --workdir=runs/study

Options: table=5|6|7|10|12|13 (default: 7), of the paper, its rows with pixel reconstruction left out; row=NAME, one of
its rows; teacher=PATH, a trained MAE-L, a stage's folder or a PyTorch checkpoint (without it, one is trained first);
data=PATH as in chain.py. Rows that are finished are not run again.
Cost: not measured here. Expected: the paper's top-1 stand beside ours in the table at the end.
"""

from tinymim_jax.experiment import recipes, study
from tinymim_jax.experiment.config import Config, Init


def get_config(arg: str = "") -> Config:
    o = recipes.options(arg, table="7", row="", teacher="", data="")
    chosen, train = study.rows(o["table"], o["row"]), recipes.imagenet(True, o["data"])
    stages = {} if o["teacher"] else {"mae_l": recipes.mae(recipes.vit("large", dtype="bfloat16"), train)}
    teacher = {"path": o["teacher"]} if o["teacher"] else {"stage": "mae_l"}
    for name, row in chosen.items():
        stage = recipes.distill(recipes.student("base"), Init(**teacher), train, block=study.BLOCK, epochs=100)
        row.change(stage, study.DEPTH)
        stages[name] = stage
        stages[f"{name}_finetuned"] = recipes.finetune_imagenet("base", Init(name), o["data"], short=True)
    return Config("study", stages, compare=study.compared(o["table"], chosen))
