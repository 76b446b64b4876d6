"""The whole TinyMIM chain on ImageNet-1K: MAE-L -> B -> S -> T, then fine-tuning of each student.

python -m tinymim_jax run --config=configs/imagenet/chain.py --workdir=runs/imagenet

Options, after a colon and separated by commas:
  data=PATH     an ImageFolder tree with train/ and val/; without it, tfds' imagenet2012
  teacher=PATH  the folder of a trained MAE-L stage; the chain then starts at distill_b
  code          the released code's values where they differ from the supplement's

Cost: not measured here. By matmul FLOPs (`bench step`), mae_l is by far the longest; bring a checkpoint instead.
Expected: ImageNet top-1 85.0 (B), 83.0 (S), 75.8 (T), TinyMIM Tables 3 and 8.
"""

from tinymim_jax.experiment import config, recipes

LINKS = (("large", "mae_l", "base"), ("base", "distill_b", "small"), ("small", "distill_s", "tiny"))


def get_config(arg: str = "") -> config.Config:
    o = recipes.options(arg, data="", teacher="", code=False)
    train = recipes.imagenet(True, o["data"])
    stages = {} if o["teacher"] else {"mae_l": recipes.mae(recipes.vit("large", dtype="bfloat16"), train)}
    for teacher_size, source, size in LINKS:
        init = config.Init(path=o["teacher"]) if o["teacher"] and source == "mae_l" else config.Init(stage=source)
        student, target = recipes.student(size, code=o["code"]), recipes.target(teacher_size, size)
        stages[f"distill_{size[0]}"] = recipes.distill(student, init, train, **target, code=o["code"])
    for *_, size in LINKS:
        init = config.Init(stage=f"distill_{size[0]}")
        stages[f"finetune_{size[0]}"] = recipes.finetune_imagenet(size, init, o["data"], code=o["code"])
    return config.Config("imagenet", stages)
