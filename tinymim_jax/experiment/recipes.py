"""Published hyper-parameters, each once: functions that return a filled, fresh `Stage`.

Where the TinyMIM supplement and the released code differ, the supplement is the default and `code=True` the other.
All differ from the released code in this: configs compute in bfloat16 for float16 with a loss scaler, mixing has other
partners (`device_augment.partner`), and training crops are fast ones (`imagenet`).
"""

import dataclasses
import re
from typing import Any

from tinymim_jax.experiment import config
from tinymim_jax.experiment.config import Data, Init, Optim, Run, Stage, ViT
from tinymim_jax.runtime.errors import InputError

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 192, "depth": 12, "num_heads": 3},
    "small": {"width": 384, "depth": 12, "num_heads": 6},
    "base": {"width": 768, "depth": 12, "num_heads": 12},
    "large": {"width": 1024, "depth": 24, "num_heads": 16},
    "huge": {"width": 1280, "depth": 32, "num_heads": 16, "patch_size": 14},
}
LAST_BLOCK_HEADS = {"tiny": 12, "small": 12, "base": 16}  # of the student: those of its teacher's target block
TEACHER_BLOCK = {"large": 18, "base": 12, "small": 12}  # target block (Table 10)
FINETUNE_SKIP = ("encoder/norm/.*",)  # of the source: a mean-pooling classifier has none
FINETUNE_FRESH = ("encoder/(fc_norm|head|head_dist)/.*",)  # new in fine-tuning, whatever the source was trained to tell


def options(arg: str, **defaults: bool | str) -> dict[str, Any]:
    r"""Parses what follows the colon in --config=FILE:arg, "word,key=value"; raises InputError on an unknown one.

    A comma within a value is written `\,`.
    """
    chosen = dict(defaults)
    for part in filter(None, re.split(r"(?<!\\),", arg or "")):
        key, has_value, value = part.replace(r"\,", ",").partition("=")
        if key not in defaults or bool(has_value) == isinstance(defaults[key], bool):
            known = ", ".join(k if isinstance(v, bool) else f"{k}=..." for k, v in defaults.items())
            raise InputError(
                f"config option {part!r}: unknown; the options are: {known or 'none'}; a comma in a value is \\,"
            )
        chosen[key] = value if has_value else True
    return chosen


def choose(table: dict[str, Any], size: str) -> Any:
    """table[size]; raises InputError that lists the names."""
    if size not in table:
        raise InputError(f"unknown size {size!r}; choose one of {', '.join(table)}")
    return table[size]


def vit(size: str, **overrides: Any) -> ViT:
    """A ViT of a named size; raises InputError that lists the names."""
    return ViT(**{**choose(SIZES, size), **overrides})


SHARDS = "array_record:"  # before the path of a folder that `prepare` has written


def stored(path: str) -> dict[str, str]:
    """The fields of `Data` for an ImageFolder tree, PATH, or shards, array_record:PATH."""
    source = "array_record" if path.startswith(SHARDS) else "folder"
    return {"source": source, "path": path.removeprefix(SHARDS)}


def imagenet(train: bool, path: str = "", **overrides: Any) -> Data:
    """ImageNet-1K: `stored` as `path`, with splits train and val, or without a path tfds' imagenet2012.

    Training crops are the fast ones; those that the published numbers were made with are PIL's (fast_crop=False).
    """
    where = {**stored(path), "split": "train" if train else "val"}
    if not path:
        where = {"source": "tfds", "name": "imagenet2012", "split": "train" if train else "validation"}
    size = 1_281_167 if train else 50_000
    speed = {"threads": 16, "fast_crop": True}
    return Data(**{**where, "num_examples": size, "transform": "train" if train else "eval", **speed, **overrides})


# Small data sets: tfds' name, its splits to train and to test on with their sizes, classes.
SMALL_SETS = {
    "cifar10": ("cifar10", {"train": 50_000, "test": 10_000}, 10),
    "cifar100": ("cifar100", {"train": 50_000, "test": 10_000}, 100),
    "flowers": ("oxford_flowers102", {"train+validation": 2_040, "test": 6_149}, 102),
    "pets": ("oxford_iiit_pet", {"train": 3_680, "test": 3_669}, 37),
}


def small_set(name: str, path: str = "", **overrides: Any) -> tuple[Data, Data, int]:
    """Training data, test data and classes of one of `SMALL_SETS`; `stored` as `path`, with splits train and test.

    Raises InputError that lists the names.
    """
    if name not in SMALL_SETS:
        raise InputError(f"unknown data set {name!r}; choose one of {', '.join(SMALL_SETS)}")
    builder, splits, num_classes = SMALL_SETS[name]
    where = stored(path) if path else {"source": "tfds", "name": builder}
    fields = {**where, "threads": 16, **overrides}
    if path:
        splits = {"train": None, "test": None}
    train, test = (Data(split=split, **{"num_examples": size, **fields}) for split, size in splits.items())
    return train, dataclasses.replace(test, transform="eval"), num_classes


def mae(model: ViT, data: Data, *, epochs: float = 1600, warmup_epochs: float = 40) -> Stage:
    """MAE pre-training (He et al. 2022, PRETRAIN.md): batch 4096, lr 2.4e-3, decoder 512 x 8.

    Its command has 800 epochs; the released weights have had 1600 (FINETUNE.md).
    """
    return Stage(
        task=config.Mae(decoder=config.Decoder(512, 8, 16), mask_ratio=0.75, norm_pix_loss=True),
        model=model,
        data=data,
        optim=Optim(lr=1.5e-4, warmup_epochs=warmup_epochs, b1=0.9, b2=0.95, weight_decay=0.05),
        run=Run(batch_size=4096, epochs=epochs),
    )


def student(size: str, *, code: bool = False) -> ViT:
    """The ViT that is distilled: drop path 0.1 and, in its last block, its teacher's heads.

    code: ViT-T with 6 heads for 3 (models_tinymim.py).
    """
    heads = {"num_heads": 6} if code and size == "tiny" else {}
    return vit(size, last_block_heads=choose(LAST_BLOCK_HEADS, size), drop_path=0.1, dtype="bfloat16", **heads)


def distill(
    model: ViT, teacher: Init, data: Data, *, block: int, heads: int | None = None, epochs: float = 300,
    code: bool = False,
) -> Stage:  # fmt: skip
    """TinyMIM pre-training (supplement, Table 1), 300 or 100 epochs; code: min lr 0 for 1e-5 (main_pretrain.py).

    The relations of the last block match those of the teacher's `block`, whose q, k and v are split into `heads`.
    """
    min_lr, relation = 0.0 if code else 1e-5, config.Relation(block, model.depth, ("qk", "vv"), heads)
    return Stage(
        task=config.Distill(teacher, {"relation": relation}, color_jitter=0.4),
        model=model,
        data=data,
        optim=Optim(lr=1.5e-4, min_lr=min_lr, warmup_epochs=epochs / 20, b1=0.9, b2=0.95, weight_decay=0.05),
        run=Run(batch_size=4096, epochs=epochs),
    )


def target(teacher: str, student: str) -> dict[str, int | None]:
    """`block` and `heads` of `distill` for a teacher of a named size, read with the heads of `student`'s last block.

    TinyMIM-B's block 12 was trained with 16 heads and teaches S with 12, as in the released code. TinyMIM-S's has
    the 12 that T needs; the released code reads it with 6 and stops there with an error.
    """
    heads = choose(LAST_BLOCK_HEADS, student) if teacher == "base" else None
    return {"block": choose(TEACHER_BLOCK, teacher), "heads": heads}


def classifier(size: str, num_classes: int = 1000) -> ViT:
    """The ViT that is fine-tuned: 3, 6 or 12 heads in every block (models_vit.py), mean pooling, trained positions."""
    drop_path = {"drop_path": 0.2 if size == "base" else 0.1, "drop_path_shape": "linear"}
    return vit(size, posembed="trainable", pool="mean", num_classes=num_classes, dtype="bfloat16", **drop_path)


def finetune(model: ViT, init: Init | None, train: Data, val: Data, *, code: bool = False) -> Stage:
    """Fine-tuning with the values for ViT-T and S (supplement, Table 2): 200 epochs, batch 2048, lr 5e-3.

    code: Adam's b2 0.999 for 0.95 (main_finetune.py). The supplement has no min lr, and no images a process, which
    share a draw of mixing: main_finetune.py's 1e-6 and the README's 128. A dist_token decays, as timm 0.3.2 has it.
    """
    if init is not None:
        init = dataclasses.replace(init, skip=FINETUNE_SKIP, fresh=FINETUNE_FRESH, regroup_heads=True)
    mixing = {"mixup": 0.8, "cutmix": 1.0, "mix_prob": 1.0, "switch_prob": 0.5, "mix_group": 128}
    adam = {"b1": 0.9, "b2": 0.999 if code else 0.95, "weight_decay": 0.05}
    rules = {"decay": (".*/kernel", ".*/dist_token"), "no_decay": (".*/bias", ".*/scale", ".*/(pos_embed|cls_token)")}
    return Stage(
        task=config.Classify(label_smoothing=0.1, erasing=0.25, **mixing),
        model=model,
        data=dataclasses.replace(train, crop_scale=(0.08, 1.0), rand_augment="rand-m9-mstd0.5-inc1"),
        optim=Optim(lr=6.25e-4, min_lr=1e-6, warmup_epochs=5, layer_decay=0.65, **adam, **rules),
        run=Run(batch_size=2048, epochs=200),
        init=init,
        evals={"val": config.Classification(data=val)},
    )


def deit(model: ViT, train: Data, val: Data) -> Stage:
    """Supervised training from scratch (DeiT, main.py): 300 epochs, batch 1024, lr 1e-3, repeated augmentation.

    The rate changes once an epoch, from 1e-6. main.py also keeps an average of the weights, but evaluates the weights
    themselves; here none is kept. Images a process: README_deit.md's 256 for T and S, and main.py's 64 for B.
    """
    stage = finetune(dataclasses.replace(model, weight_init="deit"), None, train, val)
    stage.data.repeats = 3
    stage.task.mix_group = 64 if model.width == SIZES["base"]["width"] else 256
    stage.optim = dataclasses.replace(
        stage.optim, lr=5e-4, lr_batch=512, schedule="cosine_epochs", warmup_lr=1e-6, min_lr=1e-5, b2=0.999,
        layer_decay=1.0,
    )  # fmt: skip
    stage.run = Run(batch_size=1024, epochs=300)
    return stage


def tinymim_star(init: Init, teacher: Init, train: Data, val: Data) -> Stage:
    """TinyMIM*-T (supplement, section A): 1000 epochs with a distillation token, 12 heads and a layer 192 -> 1280.

    Learning rate and teacher are not published; those of T's fine-tuning and of DeiT's hard labels are taken.
    """
    model = dataclasses.replace(classifier("tiny"), num_heads=12, dist_token=True, neck=1280)
    stage = finetune(model, init, train, val)
    stage.init.fresh = (*FINETUNE_FRESH, "encoder/(dist_token|pos_embed|neck.*)")
    stage.task.teacher = config.LabelTeacher(teacher, labels="hard", weight=0.5)
    stage.run.epochs = 1000
    return stage


def finetune_small(model: ViT, init: Init | None, train: Data, val: Data) -> Stage:
    """Fine-tuning on a small data set with AdamW: 100 epochs, batch 512, lr 1e-3, layer decay 0.75.

    The values are this project's, for want of published ones.
    """
    stage = finetune(model, init, train, val)
    stage.optim = dataclasses.replace(stage.optim, lr=1e-3, lr_batch=512, layer_decay=0.75)
    stage.run = Run(batch_size=512, epochs=100)
    return stage


def transfer(model: ViT, init: Init, train: Data, val: Data) -> Stage:
    """Fine-tuning on a small data set with SGD (MAE-Lite, transfer.sh): 50 epochs, batch 512, lr 0.1.

    Its values are those for CIFAR-100. Neither smoothing, drop path nor mixing (finetuning_transfer_exp.py); min lr
    1e-6 (finetuning_mae_exp.py) and Nesterov's momentum (util/lr_decay.py); the head starts from timm 0.4.12's N(0,
    0.02). MAE-Lite's T and S have 12 heads, those of `classifier` 3 and 6; it keeps a classifier's fc_norm.
    """
    model = dataclasses.replace(model, drop_path=0.0, weight_init="deit")
    stage = finetune(model, init, train, val)
    stage.task = config.Classify(label_smoothing=0.0, mixup=0.0, cutmix=0.0, erasing=0.0)
    stage.data.rand_augment = ""
    sgd = {"name": "sgd", "lr": 0.1, "lr_batch": None, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0}
    stage.optim = dataclasses.replace(stage.optim, **sgd, warmup_epochs=10, layer_decay=0.75, clip_norm=1.0)
    stage.run = Run(batch_size=512, epochs=50)
    return stage


def linear_probe(model: ViT, init: Init, train: Data, val: Data) -> Stage:
    """A linear classifier on frozen CLS features (MAE, main_linprobe.py): LARS, batch 16384, lr 6.4.

    90 epochs for ViT-B and smaller, 50 for L and H (FINETUNE.md). `model` as it was pre-trained, with its final norm.
    MAE draws its crops once and cuts them, here they are drawn as torchvision does: again, if one does not fit; and its
    BatchNorm has the statistics of one process' 512 images, this one of all 16384.
    """
    model = dataclasses.replace(model, pool="cls", num_classes=model.num_classes or 1000, head_norm=True, drop_path=0.0)
    stage = finetune(model, init, train, val)
    stage.init = dataclasses.replace(init, fresh=("encoder/(head|head_dist|fc_norm)/.*",), regroup_heads=True)
    stage.task = config.Classify(label_smoothing=0.0, mixup=0.0, cutmix=0.0, erasing=0.0)
    stage.data.rand_augment = ""
    frozen = ("encoder/(block.*|norm/.*|patch_embed/.*|cls_token|dist_token|pos_embed)",)
    stage.optim = Optim(lr=0.1, warmup_epochs=10, weight_decay=0.0, freeze=frozen, name="lars")
    stage.run = Run(batch_size=16384, epochs=90 if model.depth <= 12 else 50)
    return stage


def finetune_imagenet(size: str, init: Init, path: str = "", *, short: bool = False, code: bool = False) -> Stage:
    """ImageNet fine-tuning of a 300-epoch or (short) 100-epoch model (supplement, Table 2); `path` as in `imagenet`.

    ViT-B differs: 100 epochs, batch 1024, lr 2e-3, drop path 0.2, or 0.1 if short.
    """
    stage = finetune(classifier(size), init, imagenet(True, path), imagenet(False, path), code=code)
    if size == "base":
        stage.optim.lr, stage.run.batch_size, stage.run.epochs = 5e-4, 1024, 100
        stage.model.drop_path = 0.1 if short else 0.2
    stage.run.eval_every = 10 * (stage.data.num_examples // stage.run.batch_size)
    return stage
