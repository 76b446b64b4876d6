"""Semantic segmentation of CamVid's streets (Brostow et al. 2008) by a narrow ViT, from three starts, on a CPU.

python -m tinymim_jax run --config=configs/camvid/segment.py:data=PATH --workdir=runs/camvid

Options: data=PATH, with train/, trainannot/, val/ and valannot/ as SegNet's copy has them (default: camvid); images=PATH, the
images to pre-train on, in a folder of any kind (default: those of data's train/).
A teacher and a narrow student are pre-trained by MAE, a second student learns the teacher's relations, and the students
segment, each with three seeds, beside one that starts from scratch.
Cost: by its steps 1.6 hours on two cores; not run whole yet. Expected: no published number at these sizes.
"""

import dataclasses

from tinymim_jax.experiment import recipes, segmentation
from tinymim_jax.experiment.config import (
    Compare,
    Config,
    Data,
    Decoder,
    Fpn,
    Init,
    Masks,
    Optim,
    Pyramid,
    Run,
    Segment,
    Segmentation,
    Stage,
    ViT,
)

CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "cyclist")
UNLABELLED = 11
SIDE = 224
TAPS = (2, 3, 4, 6)
EPOCHS = {"mae": 200, "distill": 100, "segment": 30}


def get_config(arg: str = "") -> Config:
    o = recipes.options(arg, data="camvid", images="")
    teacher = ViT(192, 8, 8, image_size=SIDE)
    student = ViT(96, 6, 4, image_size=SIDE, last_block_heads=8)
    images = Data("folder", "" if o["images"] else "train", o["images"] or o["data"], image_size=SIDE, threads=2)

    def pretrained(stage: Stage, epochs: int) -> Stage:
        stage.optim = dataclasses.replace(stage.optim, lr=2e-3, lr_batch=None, warmup_epochs=epochs / 10)
        stage.run = Run(batch_size=64, epochs=epochs, log_every=20)
        return stage

    def mae(model: ViT) -> Stage:
        stage = recipes.mae(model, dataclasses.replace(images, crop_scale=(0.2, 1.0)))
        stage.task.decoder = Decoder(64, 2, 4)
        return pretrained(stage, EPOCHS["mae"])

    def segment(init: str | None) -> Stage:
        masks = Masks(num_classes=len(CLASSES), ignored=(UNLABELLED,), scale=(480, 360), ratio=(0.75, 1.5))
        train = Data("pairs", "train", o["data"], image_size=SIDE, masks=masks)
        val = dataclasses.replace(train, split="val", transform="eval")
        model = dataclasses.replace(student, last_block_heads=None, posembed="trainable", pool="mean")
        task = Segment(len(CLASSES), Fpn(64), taps=TAPS, pyramid=Pyramid(width=48, hidden=48), average="counted")
        optim = Optim(lr=1e-3, lr_batch=None, schedule="poly", warmup_epochs=2, layer_decay=0.8 if init else 1.0)
        run = Run(batch_size=16, epochs=EPOCHS["segment"], log_every=11, replicas=3)
        own = segmentation.weights(Init(init)) if init else None
        return Stage(task, model, train, optim, run, own, {"val": Segmentation(val)})

    stages = {
        "teacher": mae(teacher),
        "student_mae": mae(dataclasses.replace(student, last_block_heads=None)),
        "student": pretrained(recipes.distill(student, Init("teacher"), images, block=6), EPOCHS["distill"]),
        "scratch": segment(None),
        "from_mae": segment("student_mae"),
        "from_relations": segment("student"),
    }
    rows = {"scratch": ("scratch",), "MAE": ("from_mae",), "relations": ("from_relations",)}
    return Config("camvid", stages, compare={"start of the student": Compare("val/mIoU", rows)})
