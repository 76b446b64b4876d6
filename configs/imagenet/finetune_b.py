"""Fine-tuning of TinyMIM-B on ImageNet-1K.

python -m tinymim_jax run --config=configs/imagenet/finetune_b.py --workdir=runs/finetune_b

Options: init=PATH, the folder of the pre-trained stage (default runs/tinymim_b/distill_b); data=PATH, an ImageFolder
tree with train/ and val/ (default tfds' imagenet2012); short, for a model of 100 epochs;
code, the released code's values.
Cost: not measured here. Expected: 85.0 % top-1 (TinyMIM Table 3; users of the released code report 84.7).
"""

from tinymim_jax.experiment import config, recipes


def get_config(arg: str = "") -> config.Config:
    o = recipes.options(arg, init="runs/tinymim_b/distill_b", data="", short=False, code=False)
    stage = recipes.finetune_imagenet("base", config.Init(path=o["init"]), o["data"], short=o["short"], code=o["code"])
    return config.Config("finetune_b", {"finetune_b": stage})
