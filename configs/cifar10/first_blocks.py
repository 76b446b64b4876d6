r"""How much of a pre-trained T is in its first k blocks: fine-tuning from those alone (D2-MAE, Fig. 4).

python -m tinymim_jax run --config=configs/cifar10/first_blocks.py:init=runs/cifar10/distill_t,data=PATH
python -m tinymim_jax run '--config=configs/cifar10/first_blocks.py:init=runs/cifar10/distill_t\,runs/cifar10/mae_t,seeds=3'

Options: init=PATH, the folder of a pre-trained T of configs/cifar10/chain.py, or several with \, between, a curve each;
seeds=N fine-tunings of each; data=PATH and short as there.
The embeddings and the first k blocks are taken over, k from 0 to all, and everything is fine-tuned as in the chain.
Cost: the chain's fine-tuning of T for each k. Expected: accuracy rises with k; the published figure is of ImageNet.
"""

import dataclasses

from tinymim_jax.experiment import config_file, recipes
from tinymim_jax.experiment.config import Compare, Config
from tinymim_jax.runtime.errors import InputError


def get_config(arg: str = "") -> Config:
    o = recipes.options(arg, init="", data="", seeds="1", short=False)
    chain = config_file.beside(__file__, "chain.py", data=o["data"], short=o["short"])
    stage = chain.stages["finetune_chain_0"]
    if not (o["seeds"].isdecimal() and int(o["seeds"])):
        raise InputError(f"config option seeds={o['seeds']}: not a number of seeds")
    stage.run = dataclasses.replace(stage.run, replicas=int(o["seeds"]))
    given = o["init"] or ("runs/cifar10_short/distill_t" if o["short"] else "runs/cifar10/distill_t")
    stages, compare, folders = {}, {}, given.split(",")
    for number, folder in enumerate(folders, 1):
        rows = {}
        for k in range(stage.model.depth + 1):
            name = f"first_{k}" if len(folders) == 1 else f"first_{k}_of_{number}"
            init = dataclasses.replace(stage.init, stage=None, path=folder, keep_blocks=k)
            stages[name], rows[str(k)] = dataclasses.replace(stage, init=init), (name,)
        compare[f"T after fine-tuning, from {folder}"] = Compare("val/top1", rows, counts="blocks taken over")
    return Config("first_blocks", stages, compare=compare)
