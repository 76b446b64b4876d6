"""MAE-Lite's recipes: MAE of small ViTs, with distillation (D-MAE), decoupled (D2-MAE); MoCo v3; fine-tuning.

Sources: MAE-Lite's projects/mae_lite/{mae_lite,mae_lite_distill,mae_lite_distill_d2}_exp.py and projects/eval_tools/
{finetuning_mae,finetuning}_exp.py. It resizes training crops by a filter drawn anew each time, here they are bicubic.
"""

import dataclasses

from tinymim_jax.experiment import config, recipes
from tinymim_jax.experiment.config import Data, Decoder, Init, Optim, Run, Stage, ViT

DECODERS = {"tiny": Decoder(96, 1, 3), "small": Decoder(192, 1, 6)}
TEACHER_BLOCK = 12  # of MAE-B, whose last block it is
DECODED = 8  # D2-MAE's block that the decoder reads; those behind it learn from the teacher alone
LAYER_DECAY = {"tiny": 0.85, "small": 0.75}


def vit(size: str, **fields: object) -> ViT:
    """Tiny and Small as MAE-Lite has them, with 12 heads; raises InputError that lists the names."""
    recipes.choose(DECODERS, size)
    return recipes.vit(size, **{"num_heads": 12, "dtype": "bfloat16", **fields})


def mae(size: str, data: Data) -> Stage:
    """MAE pre-training: 400 epochs, batch 4096, lr 2.4e-3, crops from 8 % of the image, a decoder of one block."""
    stage = recipes.mae(vit(size), dataclasses.replace(data, crop_scale=(0.08, 1.0)), epochs=400)
    stage.task.decoder = DECODERS[size]
    return stage


def d_mae(size: str, teacher: Init, data: Data) -> Stage:
    """`mae`, and the attention logits of the last block match those of MAE-B's; both see the same patches."""
    stage = mae(size, data)
    last = stage.model.depth
    stage.task = distillation(teacher, config.Reconstruction(last, stage.task.decoder), last)
    return stage


def d2_mae(size: str, teacher: Init, data: Data) -> Stage:
    """`d_mae`, but pixels are restored from block 8, and the logits are those of a 13th block, which is left out later.

    Of block 13 only norm1 and the q and k of qkv matter to the loss.
    """
    stage = mae(size, data)
    stage.model.depth += 1
    stage.task = distillation(teacher, config.Reconstruction(DECODED, stage.task.decoder), stage.model.depth)
    return stage


def moco_v3(size: str, data: Data) -> Stage:
    """MoCo v3 pre-training: 400 epochs, batch 1024, lr 6e-4, all decayed by 0.1 (projects/mocov3/mocov3_exp.py)."""
    data = dataclasses.replace(data, crop_scale=(0.08, 1.0), interpolation="bilinear")
    optim = Optim(lr=1.5e-4, warmup_epochs=40, warmup_lr=1e-6, b2=0.999, weight_decay=0.1, decay=(".*",), no_decay=())
    model = vit(size, weight_init="moco")
    return Stage(config.Moco(), model, data, optim, Run(batch_size=1024, epochs=400))


def distillation(
    teacher: Init, reconstruction: config.Reconstruction, block: int, teacher_block: int = TEACHER_BLOCK,
    mask_ratio: float = 0.75,
) -> config.Distill:  # fmt: skip
    """What is restored, and the teacher's attention logits, which those of `block` match; both see the same patches."""
    targets = {"reconstruction": reconstruction, "attention": config.AttentionLogits(teacher_block, block)}
    return config.Distill(teacher, targets, color_jitter=0.0, mask_ratio=mask_ratio)


def finetune(
    size: str, init: Init | None, train: Data, val: Data, *, improved: bool = True, relative_position: bool = False,
    layer_decay: float | None = None,
) -> Stage:  # fmt: skip
    """Fine-tuning with batch 1024 and lr 4e-3, of the first 12 blocks of what `init` names, or (None) from scratch.

    improved: 300 epochs, RandAugment's magnitude 10, mixup 0.2 and no other regularisation (finetuning_exp.py); with
    relative_position 1000 epochs, and each block learns a bias by distance (finetuning_rpe_exp.py with qv_bias=False);
    else 100 epochs like MAE's. From scratch it has no layer decay, which is not published.
    """
    extra = {"num_heads": 12, "weight_init": "deit", "relative_position": relative_position}
    model = dataclasses.replace(recipes.classifier(size), **extra)
    if init is not None:
        init = dataclasses.replace(init, keep_blocks=model.depth)
    stage = recipes.finetune(model, init, train, val, code=True)
    if init is not None:
        stage.init.fresh = (*stage.init.fresh, "encoder/block.*/attn/relative_position/.*")
    decay = (1.0 if init is None else LAYER_DECAY[size]) if layer_decay is None else layer_decay
    stage.optim = dataclasses.replace(stage.optim, lr=1e-3, layer_decay=decay)
    epochs = 1000 if relative_position else 300 if improved else 100
    stage.run = dataclasses.replace(stage.run, batch_size=1024, epochs=epochs)
    if improved:
        stage.model.drop_path = 0.0
        stage.task = config.Classify(label_smoothing=0.0, mixup=0.2, cutmix=0.0, erasing=0.0, mix_group=128)
        stage.data.rand_augment = "rand-m10-mstd0.5-inc1"
    return stage
