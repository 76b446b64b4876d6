"""Recipes of semantic segmentation: TinyMIM's UPerNet and MAE-Lite's Semantic-FPN on ADE20K.

Sources: TinyMIM's Segmentation/TinyMIM (configs and logs) and MAE-Lite's projects/eval_tools/seg. Both add to the ViT a
bias by distance and a factor on each branch, and resize its positions. Both mean to leave positions and class tokens
undecayed, and decay them; so do these recipes. The original computes in float16.
"""

import dataclasses

from tinymim_jax.experiment import recipes
from tinymim_jax.experiment.config import (
    Data,
    Fcn,
    Fpn,
    Init,
    Masks,
    Optim,
    Pyramid,
    Run,
    Segment,
    Segmentation,
    Stage,
    UPer,
    ViT,
)

CLASSES = 150
TRAIN_IMAGES = 20_210
# What becomes of the neck of the fine-tuned TinyMIM*-T: the layer of 1280 channels of its pyramid.
NECK = {"encoder/neck_norm/": "pretext/pyramid/fc_norm/", "encoder/neck/": "pretext/pyramid/fc/"}
LAYER_DECAY = {"base": 0.75, "small": 0.75, "tiny": 0.75, "t_star": 0.8}


def ade20k(train: bool, path: str) -> Data:
    """ADEChallengeData2016 at `path`: training crops of 512, or whole images whose shorter side becomes 512."""
    return Data(
        "pairs",
        "train" if train else "val",
        path,
        num_examples=TRAIN_IMAGES if train else 2_000,
        transform="train" if train else "eval",
        image_size=512,
        masks=Masks(num_classes=CLASSES, zero_is_ignored=True),
        threads=16,
    )


def encoder(size: str, **fields: object) -> ViT:
    """A ViT of a named size as both papers segment with it; it has no norm behind its blocks."""
    added = {"relative_position": True, "layer_scale": 1.0, "posembed": "trainable", "pool": "mean"}
    drop = {"drop_path": 0.1, "drop_path_shape": "linear"}
    return recipes.vit(size, **{**added, **drop, "image_size": 512, "dtype": "bfloat16", **fields})


def weights(source: Init, *, with_distances: bool = False) -> Init:
    """`source` for `encoder`: what it has behind its blocks is left out, factors are new, positions resized.

    with_distances: the source has a bias by distance, which is resized, too.
    """
    new = "gamma\\d" if with_distances else "(gamma\\d|attn/relative_position)"
    skip = ("encoder/(norm|fc_norm|head|head_dist|head_norm|neck|neck_norm)/.*",)
    fresh = (f"encoder/block\\d+/{new}/.*",)
    return dataclasses.replace(source, skip=skip, fresh=fresh, regroup_heads=True, resize_posembed=True)


def segment(model: ViT, task: Segment, init: Init | None, train: Data, val: Data, *, layer_decay: float) -> Stage:
    """160,000 steps of 16 crops: AdamW, lr 1e-4, warm-up in 1,500 steps, then linearly to 0."""
    return Stage(
        task=task,
        model=model,
        data=train,
        optim=Optim(
            lr=1e-4, lr_batch=None, schedule="poly", warmup_steps=1500, warmup_lr=1e-10, b1=0.9, b2=0.999,
            weight_decay=0.05, decay=(".*/kernel", ".*/((cls|dist)_token|pos_embed)"), no_decay=(".*/(bias|scale)",),
            layer_decay=layer_decay,
        ),
        run=Run(batch_size=16, steps=160_000, eval_every=16_000, checkpoint_every=4_000),
        init=init,
        evals={"val": Segmentation(val)},
    )  # fmt: skip


def upernet(size: str, init: Init | None, path: str) -> Stage:
    """TinyMIM's UPerNet of a named size, or of "t_star", TinyMIM*-T with its second token and its 1280-wide map.

    The layer of 1280 channels is that of the fine-tuned TinyMIM*-T, where `init` has it.
    """
    is_star = size == "t_star"
    init = dataclasses.replace(init, rename={**NECK, **init.rename}) if init and is_star else init
    model = encoder("tiny", num_heads=12, dist_token=True) if is_star else encoder(size)
    width = 768 if is_star else model.width
    pyramid = Pyramid(width=width, hidden=width // 2, fc=1280) if is_star else Pyramid()
    task = Segment(CLASSES, UPer(width), pyramid=pyramid, aux=Fcn())
    train, val = ade20k(True, path), ade20k(False, path)
    return segment(model, task, init, train, val, layer_decay=LAYER_DECAY[size])


def semantic_fpn(init: Init | None, path: str) -> Stage:
    """MAE-Lite's Semantic-FPN with ViT-T of 12 heads, which has 42.8 mIoU with D2-MAE's weights, in float32."""
    model = encoder("tiny", num_heads=12, dtype="float32")
    task = Segment(CLASSES, Fpn(128), pyramid=Pyramid(width=48, hidden=48))
    stage = segment(model, task, init, ade20k(True, path), ade20k(False, path), layer_decay=0.8)
    stage.optim.schedule = "poly_behind"  # mmengine's; mmcv 1, which TinyMIM has, counts from the first step
    return stage
