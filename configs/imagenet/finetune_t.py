"""Fine-tuning of TinyMIM-T on ImageNet-1K.

python -m tinymim_jax run --config=configs/imagenet/finetune_t.py --workdir=runs/finetune_t

Options: init=PATH, the folder of the pre-trained stage (default runs/tinymim_t/distill_t); data=PATH, an ImageFolder
tree with train/ and val/ (default tfds' imagenet2012); code, the released code's values.
Cost: not measured here. Expected: 75.8 % top-1 (TinyMIM Table 3).
"""

from tinymim_jax.experiment import config, recipes


def get_config(arg: str = "") -> config.Config:
    o = recipes.options(arg, init="runs/tinymim_t/distill_t", data="", code=False)
    stage = recipes.finetune_imagenet("tiny", config.Init(path=o["init"]), o["data"], code=o["code"])
    return config.Config("finetune_t", {"finetune_t": stage})
