"""CIFAR-10, a small Hiera from scratch, from its own MAE and from D-MAE with a larger Hiera as the teacher.

python -m tinymim_jax run --config=configs/cifar10/hiera.py:short,data=PATH --workdir=runs/cifar10_hiera

Tokens begin as single pixels, so that 32 pixels are 4 x 4 units. Each row is fine-tuned with three seeds.
Options: data=PATH and short as in chain.py, whose data, epochs and batches these are.
Cost: not measured here. Expected: no published number at these sizes.
"""

import copy
import dataclasses

from tinymim_jax.experiment import config_file, hiera, recipes
from tinymim_jax.experiment.config import Compare, Config, Hiera, Init, Mae, Stage

SIZES = {"l": (48, (1, 2, 7, 2)), "t": (24, (1, 2, 3, 2))}  # width and blocks of the stages
SHORT_SIZES = {"l": (24, (1, 1, 3, 1)), "t": (16, (1, 1, 2, 1))}
SEEDS = 3


def get_config(arg: str = "") -> Config:
    o = recipes.options(arg, data="", short=False)
    made = config_file.beside(__file__, "chain.py", **o).stages

    def model(size: str, **fields: object) -> Hiera:
        width, blocks = (SHORT_SIZES if o["short"] else SIZES)[size]
        return Hiera(width, blocks, image_size=32, stride=1, dtype=made["mae_l"].model.dtype, **fields)

    def mae(size: str) -> Stage:
        stage = copy.deepcopy(made["mae_l" if size == "l" else "mae_t"])
        stage.model = model(size, q_pool=2, fusion=True)
        stage.task = Mae(dataclasses.replace(stage.task.decoder, posembed="trainable"), hiera.MASK_RATIO["tiny"])
        return stage

    def finetune(source: str | None) -> Stage:
        stage = copy.deepcopy(made["finetune_chain_0"])
        stage.model = model("t", num_classes=10, weight_init="mae" if source else "supervised")
        stage.init = Init(source, skip=hiera.SKIP, fresh=hiera.FRESH) if source else None
        stage.optim.layer_decay, stage.run.replicas = stage.optim.layer_decay if source else 1.0, SEEDS
        return stage

    stages = {"mae_l": mae("l"), "mae": mae("t"), "d_mae": mae("t")}
    teacher = Init("mae_l")
    stages["d_mae"].task = hiera.distillation(
        stages["mae"].task, teacher, stages["mae_l"].model.depth, stages["mae"].model
    )
    rows = {"scratch": None, "mae": "mae", "d_mae": "d_mae"}
    stages |= {f"{row}_finetuned": finetune(source) for row, source in rows.items()}
    metric = next(f"{name}/top1" for name in stages["mae_finetuned"].evals)
    compared = Compare(metric, {row: (f"{row}_finetuned",) for row in rows})
    return Config("cifar10_hiera", stages, compare={"Hiera": compared})
