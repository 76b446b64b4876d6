"""TinyMIM pre-training of ViT-S on ImageNet-1K with TinyMIM-B (block 12) as the teacher, 300 epochs.

python -m tinymim_jax run --config=configs/imagenet/tinymim_s.py --workdir=runs/tinymim_s

Options: teacher=PATH, the folder of the teacher's stage (default runs/tinymim_b/distill_b); data=PATH, an ImageFolder
tree with train/ and val/ (default tfds' imagenet2012); short, 100 epochs; code, the released code's values.
Cost: not measured here. Expected: 83.0 % top-1 after configs/imagenet/finetune_s.py (TinyMIM Table 3).
"""

from tinymim_jax.experiment import config, recipes


def get_config(arg: str = "") -> config.Config:
    o = recipes.options(arg, teacher="runs/tinymim_b/distill_b", data="", short=False, code=False)
    teacher, target = config.Init(path=o["teacher"]), recipes.target("base", "small")
    model, data = recipes.student("small", code=o["code"]), recipes.imagenet(True, o["data"])
    stage = recipes.distill(model, teacher, data, **target, epochs=100 if o["short"] else 300, code=o["code"])
    return config.Config("tinymim_s", {"distill_s": stage})
