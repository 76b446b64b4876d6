"""Small configs, among them one that has every kind of every part."""

import dataclasses

from tinymim_jax.experiment.config import (
    AttentionLogits,
    AttentionSpan,
    Cka,
    Classification,
    Classify,
    ClassToken,
    Compare,
    Config,
    Corruptions,
    Data,
    Decoder,
    Distill,
    Fcn,
    Feature,
    Fpn,
    Hiera,
    Init,
    Knn,
    LabelTeacher,
    Linear,
    Logistic,
    Mae,
    Masks,
    Mesh,
    Moco,
    NearestImages,
    Optim,
    Pyramid,
    Reconstruction,
    Relation,
    RelationAgreement,
    Run,
    Segment,
    Segmentation,
    Spectrum,
    Stage,
    UPer,
    ViT,
)

EVAL_DATA = Data("digits", split="test", image_size=8, transform="eval")
SIZE = {"image_size": 8, "patch_size": 4}


def make_stage(**changes):
    parts = {
        "task": Classify(mixup=0.0),
        "model": ViT(8, 2, 2, num_classes=10, **SIZE),
        "data": Data("digits", image_size=8),
        "optim": Optim(lr=1e-3),
        "run": Run(batch_size=4, epochs=1.0),
    }
    return Stage(**{**parts, **changes})


def make_distill(teacher, block=2, **changes):
    task = Distill(teacher, {"relation": Relation(1, block)})
    return make_stage(**{"task": task, "model": ViT(8, 2, 2, **SIZE), **changes})


def full_config():
    """Every dataclass and every kind of every union, no field at its default where that is easy."""
    mae = make_stage(
        task=Mae(decoder=Decoder(16, 1, 2), mask_ratio=0.5, norm_pix_loss=False),
        model=ViT(8, 2, 2, **SIZE),
        evals={"knn": Knn(EVAL_DATA, dataclasses.replace(EVAL_DATA, split="train"), k=(3,), temperature=0.1)},
    )
    distill = make_distill(Init("mae", rename={"a": "b"}, skip=("x", "y"), regroup_heads=True))
    distill.task.targets["feature"] = Feature(2, 1, beta=1.0, weight=0.5)
    distill.task.targets["cls"], distill.task.targets["logits"] = ClassToken(2, 1), AttentionLogits(2, 1)
    distill.task.targets["pixels"], distill.task.mask_ratio = Reconstruction(1, Decoder(16, 1, 2)), 0.5
    tuned = make_stage(
        init=Init(path="/somewhere", resize_posembed=True),
        model=ViT(8, 2, 2, num_classes=10, dist_token=True, **SIZE),
        optim=Optim(1e-3, lr_batch=None, clip_norm=1.0, ema=0.9, freeze=("q",), lr_scale={"encoder/head/.*": 10.0}),
        run=Run(4, steps=7),
        evals={
            "val": Classification(EVAL_DATA, batch_size=3),
            "logistic": Logistic(EVAL_DATA, dataclasses.replace(EVAL_DATA, split="train"), c=0.1),
            "corruptions": Corruptions(EVAL_DATA, severities=(1, 3)),
            "cka": Cka(EVAL_DATA, other=Init("mae"), images=50),
            "attention": AttentionSpan(EVAL_DATA, patch_px=14, spread=False),
            "relation": RelationAgreement(data=EVAL_DATA, teacher=Init("mae"), teacher_block=2, student_block=1),
            "spectrum": Spectrum(EVAL_DATA, pool="cls"),
            "neighbours": NearestImages(EVAL_DATA, queries=2),
        },
        task=Classify(teacher=LabelTeacher(Init("mae"), labels="soft", weight=0.3, temperature=2.0)),
    )
    moco = make_stage(task=Moco(dim=8, hidden=16), model=ViT(8, 2, 2, weight_init="moco", **SIZE))
    moco.data = Data("scenes", image_size=8, masks=Masks(11, ignored=(3,), ratio=(0.75, 1.5), stride=5))
    task = Segment(11, Fpn(8), taps=(1, 2, 3, 4), aux=Fcn(4))
    segment = make_stage(task=task, model=ViT(8, 4, 2, layer_scale=1.0, **SIZE))
    segment.evals = {"val": Segmentation(dataclasses.replace(moco.data, transform="eval"), flip=True)}
    linear = make_stage(task=Segment(11, Linear()), model=ViT(8, 12, 2, **SIZE))
    uper = make_stage(task=Segment(11, UPer(4), pyramid=Pyramid(8)), model=ViT(8, 12, 2, **SIZE))
    hiera = make_stage(model=Hiera(8, (1, 1, 1), image_size=8, stride=1, q_pool=2, num_classes=10))
    stages = {
        "mae": mae,
        "distill": distill,
        "tuned": tuned,
        "moco": moco,
        "segment": segment,
        "linear": linear,
        "uper": uper,
        "hiera": hiera,
    }
    return Config("all", stages, Mesh(2, 4), {"T": Compare("val/top1", {"row": ("tuned",)})})
