"""The study of TinyMIM on CIFAR-10, a table at a time, at the sizes of chain.py: each row distils MAE-L into B.

python -m tinymim_jax run --config=configs/cifar10/study.py:table=7,short,data=PATH --workdir=runs/cifar10_study

Options: table=5|6|7|10|12|13 (default: 7), of the paper, its rows with pixel reconstruction left out; row=NAME, one of its rows;
teacher=PATH, the folder of a trained MAE-L of chain.py (without it, one is trained first); data=PATH and short as there.
Each row is fine-tuned with three seeds. Rows that are finished are not run again.
Cost: not measured. Expected: the paper's numbers, of ImageNet, stand beside ours in the table at the end; their order is
what can be compared; the small teacher has six blocks, so that blocks 21 and 24 of Table 10 are one and the same.
"""

import copy
import importlib.util
from pathlib import Path

from tinymim_jax.experiment import recipes, study
from tinymim_jax.experiment.config import Compare, Config, Init

SEEDS = 3


def get_config(arg: str = "") -> Config:
    o = recipes.options(arg, table="", row="", teacher="", data="", short=False)
    spec = importlib.util.spec_from_file_location("cifar10_chain", Path(__file__).with_name("chain.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    chosen = study.rows(o["table"] or "7", o["row"])
    options = [f"data={o['data']}".replace(",", r"\,")] if o["data"] else []
    chain = module.get_config(",".join([*options, *(["short"] if o["short"] else [])]))
    stages = {} if o["teacher"] else {"mae_l": chain.stages["mae_l"]}
    for name, row in chosen.items():
        stage, tuned = copy.deepcopy(chain.stages["distill_b"]), copy.deepcopy(chain.stages["finetune_b"])
        if o["teacher"]:
            stage.task.teacher = Init(path=o["teacher"])
        stage.model.drop_path = 0.1
        row.change(stage, chain.stages["mae_l"].model.depth)
        tuned.init.stage, tuned.run.replicas = name, SEEDS
        stages |= {name: stage, f"{name}_finetuned": tuned}
    rows = {name: (f"{name}_finetuned",) for name in chosen}
    paper = {name: row.paper for name, row in chosen.items()}
    return Config("cifar10_study", stages, compare={f"Table {o['table'] or 7}": Compare("val/top1", rows, paper)})
