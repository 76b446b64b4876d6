"""Every fine-tuning row of the paper's Tables 1, 3, 4 and 8 whose method is here, as one stage each.

python -m tinymim_jax run --config=configs/imagenet/tables.py:row=tinymim_t,init=runs/imagenet/distill_t --workdir=runs/tinymim_t

Options: row=NAME, one of EXPECTED below; init=PATH, what is fine-tuned (not for deit_*); teacher=PATH, the classifier
whose labels tinymim_star_t learns; data=PATH, an ImageFolder tree (default: tfds' imagenet2012); code, the released
code's values where they differ from the supplement's.
Cost: not measured. Expected: EXPECTED; users have reproduced 84.7 for B instead of 85.0 (TinyMIM issue 2), hence the
tolerance. Table 4's robustness is measured by `eval --suite=robust` on the same checkpoints. Table 8's class-token and
feature distillation are not here.
"""

import dataclasses

from tinymim_jax.experiment import recipes
from tinymim_jax.experiment.config import Config, Init
from tinymim_jax.runtime.errors import InputError

EXPECTED = {  # row: top-1 on ImageNet-1K, tolerance, source
    "deit_t": (72.2, 0.3, "Table 8"),
    "deit_s": (79.9, 0.3, "Table 8"),
    "deit_b": (81.2, 0.5, "Table 8"),
    "mae_t": (71.6, 0.3, "Tables 3 and 8"),
    "mae_s": (80.6, 0.3, "Tables 3 and 8"),
    "mae_b": (83.6, 0.3, "Tables 3 and 8"),
    "tinymim_t": (75.8, 0.3, "Tables 3 and 8"),
    "tinymim_s": (83.0, 0.3, "Tables 3 and 8"),
    "tinymim_b": (85.0, 0.3, "Tables 3 and 8; 84.7 reproduced by users"),
    "tinymim_star_t": (79.6, 0.5, "Tables 1 and 3; teacher and learning rate unpublished"),
}
SIZE = {"t": "tiny", "s": "small", "b": "base"}


def get_config(arg: str = "") -> Config:
    o = recipes.options(arg, row="", init="", teacher="", data="", code=False)
    row = o["row"] or "tinymim_t"
    if row not in EXPECTED:
        raise InputError(f"config option row={row}: unknown; choose one of {', '.join(EXPECTED)}")
    method, size = row.rsplit("_", 1)
    train, val = recipes.imagenet(True, o["data"]), recipes.imagenet(False, o["data"])
    init = Init(path=o["init"] or f"runs/imagenet/{'mae' if method == 'mae' else 'distill'}_{size}")
    if method == "deit":
        model = dataclasses.replace(recipes.classifier(SIZE[size]), pool="cls", drop_path=0.1)
        stage = recipes.deit(model, train, val)
    elif method == "tinymim_star":
        stage = recipes.tinymim_star(init, Init(path=o["teacher"] or "runs/teacher"), train, val)
    else:
        stage = recipes.finetune_imagenet(
            SIZE[size], init, o["data"], short=method == "mae", code=o["code"] or method == "mae"
        )
        if row == "mae_b":
            stage.task.mix_group = 32  # images a process of MAE's FINETUNE.md
    return Config(row, {row: stage})
