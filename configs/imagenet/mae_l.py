"""MAE pre-training of ViT-L on ImageNet-1K, the chain's first teacher.

python -m tinymim_jax run --config=configs/imagenet/mae_l.py --workdir=runs/mae_l

Option data=PATH: an ImageFolder tree with train/ and val/; without it, tfds' imagenet2012.
Cost: not measured here. Expected: 85.9 % top-1 after fine-tuning (MAE, FINETUNE.md).
"""

from tinymim_jax.experiment import config, recipes


def get_config(arg: str = "") -> config.Config:
    o = recipes.options(arg, data="")
    model = recipes.vit("large", dtype="bfloat16")
    return config.Config("mae_l", {"mae_l": recipes.mae(model, recipes.imagenet(True, o["data"]))})
