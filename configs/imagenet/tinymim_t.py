"""TinyMIM pre-training of ViT-T on ImageNet-1K with TinyMIM-S (block 12) as the teacher, 300 epochs.

python -m tinymim_jax run --config=configs/imagenet/tinymim_t.py --workdir=runs/tinymim_t

Options: teacher=PATH, the folder of the teacher's stage (default runs/tinymim_s/distill_s); data=PATH, an ImageFolder
tree with train/ and val/ (default tfds' imagenet2012); short, 100 epochs; code, the released code's values.
Cost: not measured here. Expected: 75.8 % top-1 after configs/imagenet/finetune_t.py (TinyMIM Table 3).
"""

from tinymim_jax.experiment import config, recipes


def get_config(arg: str = "") -> config.Config:
    o = recipes.options(arg, teacher="runs/tinymim_s/distill_s", data="", short=False, code=False)
    teacher, target = config.Init(path=o["teacher"]), recipes.target("small", "tiny")
    model, data = recipes.student("tiny", code=o["code"]), recipes.imagenet(True, o["data"])
    stage = recipes.distill(model, teacher, data, **target, epochs=100 if o["short"] else 300, code=o["code"])
    return config.Config("tinymim_t", {"distill_t": stage})
