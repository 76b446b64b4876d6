"""How much of a pre-trained T is in its first k blocks: fine-tuning from those alone (D2-MAE, Fig. 4).

python -m tinymim_jax run --config=configs/cifar10/first_blocks.py:init=runs/cifar10/distill_t,data=PATH

Options: init=PATH, the folder of a pre-trained T of configs/cifar10/chain.py; data=PATH and short as there.
The embeddings and the first k blocks are taken over, k from 0 to all, and everything is fine-tuned as in the chain.
Cost: the chain's fine-tuning of T for each k. Expected: accuracy rises with k; the published figure is of ImageNet.
"""

import dataclasses

from tinymim_jax.experiment import config_file, recipes
from tinymim_jax.experiment.config import Compare, Config


def get_config(arg: str = "") -> Config:
    o = recipes.options(arg, init="", data="", short=False)
    chain = config_file.beside(__file__, "chain.py", data=o["data"], short=o["short"])
    stage = chain.stages["finetune_chain_0"]
    folder = o["init"] or ("runs/cifar10_short/distill_t" if o["short"] else "runs/cifar10/distill_t")
    stages = {}
    for k in range(stage.model.depth + 1):
        init = dataclasses.replace(stage.init, stage=None, path=folder, keep_blocks=k)
        stages[f"first_{k}"] = dataclasses.replace(stage, init=init)
    rows = {f"first {k} blocks": (name,) for k, name in enumerate(stages)}
    return Config("first_blocks", stages, compare={"T after fine-tuning": Compare("val/top1", rows)})
