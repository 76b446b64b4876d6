"""MAE-Lite's study on ImageNet-1K: MAE, D-MAE and D2-MAE of a ViT-T or S, and training from scratch, each fine-tuned.

python -m tinymim_jax run --config=configs/imagenet/mae_lite.py:row=d2_mae,teacher=MAE_B --workdir=runs/mae_lite

Options: row=NAME, one of supervised, moco_v3, mae, d_mae, d2_mae and, with relative positions, mae_rpe and d2_mae_rpe
(default: all; small has supervised, mae and d_mae); size=tiny|small (default: tiny); teacher=PATH, a trained MAE-B, a
stage's folder or a PyTorch checkpoint (without it, one is trained first); data=PATH as in chain.py.
Cost: not measured here. Expected: the top-1 of MAE-Lite's README.md and SMALL.md, which stand beside ours in the table
at the end.
"""

from tinymim_jax.experiment import mae_lite, recipes
from tinymim_jax.experiment.config import Compare, Config, Init
from tinymim_jax.runtime.errors import InputError

PAPER = {
    "tiny": {
        "supervised": 75.8, "moco_v3": 76.8, "mae": 78.0, "d_mae": 78.4, "d2_mae": 78.7, "mae_rpe": 79.0,
        "d2_mae_rpe": 79.4,
    },
    "small": {"supervised": 80.2, "mae": 82.1, "d_mae": 82.5},
}  # fmt: skip
ALONE = {"mae": mae_lite.mae, "moco_v3": mae_lite.moco_v3}
DISTILLED = {"d_mae": mae_lite.d_mae, "d2_mae": mae_lite.d2_mae}


def get_config(arg: str = "") -> Config:
    o = recipes.options(arg, row="", size="tiny", teacher="", data="")
    train, val = (recipes.imagenet(is_train, o["data"]) for is_train in (True, False))
    size, paper = o["size"], recipes.choose(PAPER, o["size"])
    rows = [o["row"]] if o["row"] else list(paper)
    stages = {}
    if not o["teacher"] and any(row.startswith(tuple(DISTILLED)) for row in rows):
        stages["mae_b"] = recipes.mae(recipes.vit("base", dtype="bfloat16"), train)
    teacher = Init(path=o["teacher"]) if o["teacher"] else Init("mae_b")
    for row in rows:
        if row not in paper:
            raise InputError(f"config option row={row}: unknown for {size}; choose one of {', '.join(paper)}")
        source = row.removesuffix("_rpe")
        if source in ALONE:
            stages.setdefault(source, ALONE[source](size, train))
        elif source in DISTILLED:
            stages.setdefault(source, DISTILLED[source](size, teacher, train))
        init, relative = (Init(source) if source in stages else None), source != row
        how = {"relative_position": relative, "layer_decay": 0.75 if row == "moco_v3" else None}
        stages[f"{row}_finetuned"] = mae_lite.finetune(size, init, train, val, **how)
    compared = Compare("val/top1", {row: (f"{row}_finetuned",) for row in rows}, {row: paper[row] for row in rows})
    return Config("mae_lite", stages, compare={"MAE-Lite": compared})
