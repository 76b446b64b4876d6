"""Hiera-Tiny on ImageNet-1K: MAE and D-MAE from Hiera-B (MAE-Lite), each fine-tuned; or any size from one's own weights.

python -m tinymim_jax run --config=configs/imagenet/hiera.py:row=d_mae,teacher=PATH --workdir=runs/hiera

Options: row=mae|d_mae|finetune (default: mae and d_mae); size=tiny|tiny_96|small|base|base_plus|large|huge (default: tiny,
46 wide); teacher=PATH, a stage's folder of a Hiera-B that was trained by MAE (without it, one is trained first);
init=PATH, what row=finetune starts from (without it, from scratch); data=PATH as in chain.py.
Cost: not measured here. Expected: 78.5 % top-1 after MAE, 78.9 after D-MAE (MAE-Lite, HIERA.md), which stand beside ours
in the table at the end.
"""

from tinymim_jax.experiment import hiera, recipes
from tinymim_jax.experiment.config import Compare, Config, Init
from tinymim_jax.runtime.errors import InputError

PAPER = {"mae": 78.5, "d_mae": 78.9}
ROWS = (*PAPER, "finetune")


def get_config(arg: str = "") -> Config:
    o = recipes.options(arg, row="", size="tiny", teacher="", init="", data="")
    rows, size = [o["row"]] if o["row"] else list(PAPER), o["size"]
    if o["row"] not in ("", *ROWS):
        raise InputError(f"config option row={o['row']}: unknown; choose one of {', '.join(ROWS)}")
    train, val = (recipes.imagenet(is_train, o["data"]) for is_train in (True, False))
    if rows == ["finetune"]:
        init = Init(path=o["init"]) if o["init"] else None
        return Config("hiera", {"finetune": hiera.finetune(size, init, train, val)})
    stages = {}
    if "d_mae" in rows and not o["teacher"]:
        stages["mae_b"] = hiera.mae("base", train)
    teacher = Init(path=o["teacher"]) if o["teacher"] else Init("mae_b")
    made = {"mae": lambda: hiera.mae(size, train), "d_mae": lambda: hiera.d_mae(size, teacher, 24, train)}
    for row in rows:
        stages[row] = made[row]()
        stages[f"{row}_finetuned"] = hiera.finetune(size, Init(row), train, val)
    paper = {row: PAPER[row] for row in rows if size == "tiny"}
    compared = Compare("val/top1", {row: (f"{row}_finetuned",) for row in rows}, paper)
    return Config("hiera", stages, compare={"MAE-Lite": compared})
