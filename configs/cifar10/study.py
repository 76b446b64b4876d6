"""The study of TinyMIM on CIFAR-10, a table at a time, at the sizes of chain.py: each row distils MAE-L into B.

python -m tinymim_jax run --config=configs/cifar10/study.py:table=7,short,data=PATH --workdir=runs/cifar10_study

Options: table=5|6|7|10|12|13 (default: 7), of the paper, its rows with pixel reconstruction left out; row=NAME, one of
its rows; teacher=PATH, the folder of a trained MAE-L of chain.py (without it, one is trained first); data=PATH and short
as there.
Each row is fine-tuned with three seeds. Rows that are finished are not run again.
Cost: not measured. Expected: the paper's numbers, of ImageNet, stand beside ours in the table at the end; their order is
what can be compared; the small teacher has six blocks, so that blocks 21 and 24 of Table 10 are one and the same.
"""

import copy

from tinymim_jax.experiment import config_file, recipes, study
from tinymim_jax.experiment.config import Config, Init

SEEDS = 3


def get_config(arg: str = "") -> Config:
    o = recipes.options(arg, table="7", row="", teacher="", data="", short=False)
    chosen = study.rows(o["table"], o["row"])
    chain = config_file.beside(__file__, "chain.py", data=o["data"], short=o["short"])
    stages = {} if o["teacher"] else {"mae_l": chain.stages["mae_l"]}
    for name, row in chosen.items():
        stage, tuned = copy.deepcopy(chain.stages["distill_b"]), copy.deepcopy(chain.stages["finetune_b"])
        if o["teacher"]:
            stage.task.teacher = Init(path=o["teacher"])
        stage.model.drop_path = 0.1
        row.change(stage, chain.stages["mae_l"].model.depth)
        tuned.init.stage, tuned.run.replicas = name, SEEDS
        stages |= {name: stage, f"{name}_finetuned": tuned}
    return Config("cifar10_study", stages, compare=study.compared(o["table"], chosen))
