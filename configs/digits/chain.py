"""The demo."""

import dataclasses

from tinymim_jax import recipes
from tinymim_jax.config import (
    Classification, Classify, Compare, Config, Data, Decoder, Distill, Init, Knn, Mae, Optim, Run, Stage, Teacher, ViT,
)  # fmt: skip

SEEDS = 5
GREY = {"mean": (0.3, 0.3, 0.3), "std": (0.38, 0.38, 0.38)}
TRAIN = Data("digits", split="train", image_size=16, crop_scale=(0.5, 1.0), crop_ratio=(0.8, 1.25), hflip=0.0, **GREY)
TEST = dataclasses.replace(TRAIN, split="test", transform="eval", crop_pct=1.0)
BANK = dataclasses.replace(TEST, split="train")
SIZES = {
    "l": {"width": 128, "depth": 6, "num_heads": 8},
    "b": {"width": 96, "depth": 4, "num_heads": 6},
    "s": {"width": 64, "depth": 4, "num_heads": 4},
    "t": {"width": 32, "depth": 4, "num_heads": 2},
}
IMAGE = {"image_size": 16, "patch_size": 4}


def mae(size, epochs):
    return Stage(
        Mae(decoder=Decoder(64, 2, 4)),
        ViT(**SIZES[size], **IMAGE),
        TRAIN,
        Optim(lr=3e-3, lr_batch=None, warmup_epochs=epochs / 10),
        Run(batch_size=128, epochs=epochs, log_every=10),
        evals=knn(),
    )


def knn():
    return {"knn": Knn(TEST, BANK, k=(10,))}


def distill(size, teacher, epochs):
    return Stage(
        Distill(teacher, student_block=4, color_jitter=0.4),
        ViT(**SIZES[size], last_block_heads=8, drop_path=0.0, **IMAGE),
        TRAIN,
        Optim(lr=3e-3, lr_batch=None, warmup_epochs=epochs / 10),
        Run(batch_size=128, epochs=epochs, log_every=10),
        evals=knn(),
    )


def finetune(init, seed):
    data = dataclasses.replace(TRAIN, per_class=10, subset_seed=seed)
    if init:
        init = Init(init, skip=recipes.FINETUNE_SKIP, fresh=recipes.FINETUNE_FRESH, regroup_heads=True)
    return Stage(
        Classify(mixup=0, cutmix=0, erasing=0),
        ViT(**SIZES["t"], **IMAGE, pool="mean", num_classes=10, posembed="trainable"),
        data,
        Optim(
            lr=2e-3,
            lr_batch=None,
            warmup_epochs=10,
            layer_decay=0.8,
            b2=0.999,
            decay=(".*/kernel",),
            no_decay=(".*/bias", ".*/scale", ".*/(pos_embed|cls_token)"),
        ),
        Run(batch_size=50, epochs=100, seed=seed, log_every=10),
        init=init,
        evals={"test": Classification(TEST)},
    )


def get_config(arg: str = "") -> Config:
    stages = {
        "mae_l": mae("l", 100),
        "distill_b": distill("b", Teacher(Init("mae_l"), block=5), 100),
        "distill_s": distill("s", Teacher(Init("distill_b"), block=4), 100),
        "distill_t": distill("t", Teacher(Init("distill_s"), block=4), 100),
        "mae_t": mae("t", 100),
    }
    stages["untrained_t"] = dataclasses.replace(
        stages["distill_t"], run=Run(batch_size=128, steps=0), optim=Optim(lr=1e-3)
    )
    rows = {}
    for label, init in (("scratch", None), ("MAE", "mae_t"), ("chain", "distill_t")):
        rows[label] = tuple(f"finetune_{label.lower()}_{seed}" for seed in range(SEEDS))
        stages |= {name: finetune(init, seed) for seed, name in enumerate(rows[label])}
    return Config("digits", stages, compare={"T": Compare("test/top1", rows)})
