"""Fine-tuning of TinyMIM-S on ImageNet-1K.

python -m tinymim_jax run --config=configs/imagenet/finetune_s.py --workdir=runs/finetune_s

Options: init=PATH, the folder of the pre-trained stage (default runs/tinymim_s/distill_s); data=PATH, an ImageFolder
tree with train/ and val/ (default tfds' imagenet2012); code, the released code's values.
Cost: not measured here. Expected: 83.0 % top-1 (TinyMIM Table 3).
"""

from tinymim_jax.experiment import config, recipes


def get_config(arg: str = "") -> config.Config:
    o = recipes.options(arg, init="runs/tinymim_s/distill_s", data="", code=False)
    stage = recipes.finetune_imagenet("small", config.Init(path=o["init"]), o["data"], code=o["code"])
    return config.Config("finetune_s", {"finetune_s": stage})
