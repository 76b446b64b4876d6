"""Hiera's recipes: MAE-Lite's Tiny with MAE and D-MAE (hiera_mae_exp.py, hiera_mae_distill_exp.py), fine-tuning."""

import dataclasses

from tinymim_jax.experiment import config, mae_lite, recipes
from tinymim_jax.experiment.config import Data, Decoder, Hiera, Init, Stage

SIZES = {  # MAE-Lite's Tiny; Meta's
    "tiny": {"width": 46},
    "tiny_96": {"width": 96},
    "small": {"width": 96, "stages": (1, 2, 11, 2)},
    "base": {"width": 96, "stages": (2, 3, 16, 3)},
    "base_plus": {"width": 112, "stages": (2, 3, 16, 3), "num_heads": 2},
    "large": {"width": 144, "stages": (2, 6, 36, 4), "num_heads": 2},
    "huge": {"width": 256, "stages": (2, 6, 36, 4), "num_heads": 4},
}
MASK_RATIO = {"tiny": 0.4}  # MAE-Lite's; 0.6 elsewhere
# What an auto-encoder has behind its blocks, and what a classifier has there, which are not the same norm.
SKIP, FRESH = ("encoder/(norm|fuse\\d+)/.*",), ("encoder/(norm|head)/.*",)


def hiera(size: str, **fields: object) -> Hiera:
    """A Hiera of a named size; raises InputError that lists the names."""
    return Hiera(**{**recipes.choose(SIZES, size), "dtype": "bfloat16", **fields})


def decoder(size: str) -> Decoder:
    """MAE-Lite's for its Tiny, else Meta's; both learn their positions."""
    return Decoder(96, 1, 3, posembed="trainable") if size == "tiny" else Decoder(posembed="trainable")


def mae(size: str, data: Data) -> Stage:
    """MAE of units of 32 pixels, 400 epochs as MAE-Lite has it; weight decay reaches positions and mask token."""
    data = dataclasses.replace(data, crop_scale=(0.08, 1.0))
    stage = recipes.mae(hiera(size, q_pool=2, fusion=True), data, epochs=400)
    stage.task = config.Mae(decoder(size), MASK_RATIO.get(size, 0.6))
    rules = {"decay": (".*/kernel", ".*/(mask_token|pos_embed)"), "no_decay": (".*/bias", ".*/scale")}
    stage.optim = dataclasses.replace(stage.optim, **rules)
    return stage


def d_mae(size: str, teacher: Init, teacher_block: int, data: Data) -> Stage:
    """`mae`, and the attention logits of the last block match those of the teacher's block; both see the same units."""
    stage = mae(size, data)
    stage.task = distillation(stage.task, teacher, teacher_block, stage.model)
    return stage


def distillation(task: config.Mae, teacher: Init, teacher_block: int, student: Hiera) -> config.Distill:
    """What `task` restores, and the teacher's attention logits."""
    restored = config.Reconstruction(student.depth, task.decoder)
    return mae_lite.distillation(teacher, restored, student.depth, teacher_block, task.mask_ratio)


def finetune(size: str, init: Init | None, train: Data, val: Data) -> Stage:
    """MAE-Lite's improved fine-tuning, layer decay 0.85 and no drop path, or (None) training from scratch."""
    stage = mae_lite.finetune("tiny", init, train, val)
    start = "mae" if init else "supervised"
    stage.model = hiera(size, num_classes=stage.model.num_classes, weight_init=start)
    if init is not None:
        stage.init = dataclasses.replace(init, skip=SKIP, fresh=FRESH)
    return stage
