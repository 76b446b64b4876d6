"""Fine-tuning of TinyMIM-B on ImageNet-1K.

python -m tinymim_jax run --config=configs/imagenet/finetune_b.py --workdir=runs/imagenet

Options: init=PATH, the folder of the pre-trained stage (default runs/imagenet/distill_b); data=PATH, an ImageFolder
tree with train/ and val/ (default tfds' imagenet2012); code, the released code's values.
Cost: not measured here. Expected: 85.0 % top-1 (TinyMIM Table 3; users of the released code report 84.7).
"""

from tinymim_jax import config, recipes


def get_config(arg: str = "") -> config.Config:
    o = recipes.options(arg, init="runs/imagenet/distill_b", data="", code=False)
    stage = recipes.finetune_imagenet("base", config.Init(path=o["init"]), o["data"], code=o["code"])
    return config.Config("imagenet", {"finetune_b": stage})
