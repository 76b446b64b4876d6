"""The study of TinyMIM on CIFAR-10, a table at a time, at the sizes of chain.py: each row is pre-trained and fine-tuned.

python -m tinymim_jax run --config=configs/cifar10/study.py:table=7,short,data=PATH --workdir=runs/cifar10_study

Options: table=5|6|7|8|10|11|12|13|all (default: 7), of the paper; row=NAME, one of its rows; teacher=PATH, the folder of
a trained MAE-L of chain.py (without it, one is trained first); data=PATH and short as there.
Each row is fine-tuned with three seeds. Rows that are finished, also those of another table in the same workdir, are not
run again. All are distilled equally long; the paper's rows of Tables 8 and 11 are not.
Cost: docs/study.md. Expected: the paper's numbers, of ImageNet, stand beside ours in the table at the end; their order is
what can be compared. The short teacher has six blocks, so that blocks 21 and 24 of Table 10 are both its last one, and one row.
"""

import copy
import dataclasses

from tinymim_jax.experiment import config_file, recipes, study
from tinymim_jax.experiment.config import Config, Init, Stage

SEEDS = 3


def get_config(arg: str = "") -> Config:
    o = recipes.options(arg, table="7", row="", teacher="", data="", short=False)
    made = config_file.beside(__file__, "chain.py", data=o["data"], short=o["short"]).stages
    tuned = {"base": made["finetune_b"], "small": made["finetune_s"], "tiny": made["finetune_chain_0"]}
    students = {size: made[f"distill_{size[0]}"] for size in tuned}

    def mae(size: str) -> Stage:
        stage = copy.deepcopy(made["mae_l"])
        if size in students:
            stage.model = dataclasses.replace(students[size].model, last_block_heads=None, drop_path=0.0)
        return stage

    def distill(size: str, teacher: Init, epochs: int) -> Stage:
        stage = copy.deepcopy(students[size])
        stage.task.teacher, stage.model.drop_path = teacher, 0.1
        return stage

    def finetune(size: str, source: str | None, epochs: int) -> Stage:
        stage = copy.deepcopy(tuned[size])
        stage.run.replicas, stage.init.stage = SEEDS, source
        if source is None:
            stage.init, stage.optim.layer_decay = None, 1.0
        stage.evals = {"val": stage.evals["val"]}
        return stage

    preset = study.Preset(
        mae, distill, finetune,
        depth={"large": made["mae_l"].model.depth, **{size: stage.model.depth for size, stage in students.items()}},
        heads=lambda teacher: made["distill_b"].model.last_block_heads,
        teacher=o["teacher"],
    )  # fmt: skip
    return study.experiment("cifar10_study", preset, study.rows(o["table"], o["row"], long=100))
