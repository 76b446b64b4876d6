"""TinyMIM pre-training of ViT-B on ImageNet-1K with MAE-L (block 18) as the teacher, 300 epochs.

python -m tinymim_jax run --config=configs/imagenet/tinymim_b.py --workdir=runs/tinymim_b

Options: teacher=PATH, the folder of the teacher's stage (default runs/mae_l/mae_l); data=PATH, an ImageFolder
tree with train/ and val/ (default tfds' imagenet2012); short, 100 epochs; code, the released code's values.
Cost: not measured here. Expected: 85.0 % top-1 after configs/imagenet/finetune_b.py (TinyMIM Table 3).
"""

from tinymim_jax.experiment import config, recipes


def get_config(arg: str = "") -> config.Config:
    o = recipes.options(arg, teacher="runs/mae_l/mae_l", data="", short=False, code=False)
    teacher, target = config.Init(path=o["teacher"]), recipes.target("large", "base")
    model, data = recipes.student("base", code=o["code"]), recipes.imagenet(True, o["data"])
    stage = recipes.distill(model, teacher, data, **target, epochs=100 if o["short"] else 300, code=o["code"])
    return config.Config("tinymim_b", {"distill_b": stage})
