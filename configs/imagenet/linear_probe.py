"""Linear probe on ImageNet-1K: a linear classifier on frozen CLS features, trained with LARS (MAE's recipe).

python -m tinymim_jax run --config=configs/imagenet/linear_probe.py:init=runs/imagenet/mae_l,size=large --workdir=runs/probe

Options: init=PATH, the pre-trained stage or checkpoint; size=tiny, small, base, large or huge; data=PATH, an ImageFolder
tree with train/ and val/ (default: tfds' imagenet2012).
Cost: not measured. Expected: 67.8, 76.0 and 77.2 % top-1 for MAE-B, L and H (MAE, FINETUNE.md). A distilled student's last block is half trained: use
`eval --suite=probe` for it, which takes the block before.
"""

from tinymim_jax.experiment import config, recipes


def get_config(arg: str = "") -> config.Config:
    o = recipes.options(arg, init="runs/imagenet/mae_l", size="large", data="")
    train, val = recipes.imagenet(True, o["data"]), recipes.imagenet(False, o["data"])
    model = recipes.vit(o["size"], dtype="bfloat16")
    stage = recipes.linear_probe(model, config.Init(path=o["init"]), train, val)
    return config.Config("linear_probe", {"linear_probe": stage})
