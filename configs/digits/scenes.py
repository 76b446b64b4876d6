"""Semantic segmentation without any data: scenes of scanned digits, and which digit each pixel is of.

python -m tinymim_jax run --config=configs/digits/scenes.py --workdir=runs/scenes

A small ViT is pre-trained by MAE on the scenes, and then segments them by UPerNet; beside it one that starts from scratch.
Cost: not measured undisturbed; minutes on two cores.
Expected: no published number; a pre-trained encoder should be better than one from scratch.
"""

import dataclasses

from tinymim_jax.experiment import recipes, segmentation
from tinymim_jax.experiment.config import (
    Compare,
    Config,
    Data,
    Decoder,
    Fcn,
    Init,
    Masks,
    Optim,
    Run,
    Segment,
    Segmentation,
    Stage,
    UPer,
    ViT,
)

CLASSES = 11  # the background and ten digits
PIXELS = {"image_size": 64, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def get_config(arg: str = "") -> Config:
    recipes.options(arg)
    masks = Masks(num_classes=CLASSES, scale=(128, 64), ratio=(0.75, 1.5), max_share=0.95, photometric=False)
    train = Data("scenes", "train", hflip=0.0, masks=masks, **PIXELS)
    val = dataclasses.replace(train, split="test", transform="eval")
    model = ViT(64, 4, 4, patch_size=8, image_size=64, posembed="trainable")
    plain = dataclasses.replace(train, masks=None, crop_scale=(0.3, 1.0))
    mae = recipes.mae(model, plain)
    mae.task.decoder = Decoder(32, 1, 4)
    mae.optim = dataclasses.replace(mae.optim, lr=1e-3, lr_batch=None, warmup_epochs=2)
    mae.run = Run(batch_size=50, epochs=40, log_every=16)

    def segment(init: Init | None) -> Stage:
        task = Segment(CLASSES, UPer(64), taps=(1, 2, 3, 4), aux=Fcn(64))
        optim = Optim(lr=1e-3, lr_batch=None, schedule="poly", warmup_epochs=1)
        own = segmentation.weights(init) if init else None
        run = Run(batch_size=16, epochs=12, log_every=10, replicas=3)
        return Stage(task, dataclasses.replace(model, pool="mean"), train, optim, run, own, {"val": Segmentation(val)})

    stages = {"mae": mae, "scratch": segment(None), "pretrained": segment(Init("mae"))}
    rows = {"scratch": ("scratch",), "MAE": ("pretrained",)}
    return Config("scenes", stages, compare={"start": Compare("val/mIoU", rows)})
