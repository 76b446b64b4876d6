"""CIFAR-10, the chain MAE-L -> B -> S -> T with fine-tuning of each student, at 32 px in patches of 4.

T is fine-tuned in the same way from scratch, from its own MAE pre-training (as long as its distillation) and from the
chain, with three seeds (order, initial head) each.

python -m tinymim_jax run --config=configs/cifar10/chain.py:data=PATH --workdir=runs/cifar10
python -m tinymim_jax run --config=configs/cifar10/chain.py:short,data=PATH --workdir=runs/cifar10_short

Options: data=PATH, an ImageFolder tree with train/ and test/ (default: tfds' cifar10); short, for a CPU: 5,000 training
images and narrow models.
Cost: the preset is sized for one GPU and was not measured; `short` takes about an hour on two cores, result in README.md.
Expected: no published number at these sizes.
"""

import dataclasses

from tinymim_jax.experiment import recipes
from tinymim_jax.experiment.config import Classify, Compare, Config, Data, Decoder, Init, Knn, Stage, ViT

SIZES = {"l": (384, 12, 12), "b": (288, 12, 6), "s": (192, 12, 6), "t": (96, 12, 3)}  # width, blocks, heads
SHORT_SIZES = {"l": (96, 6, 8), "b": (72, 6, 6), "s": (64, 6, 4), "t": (48, 6, 3)}
PER_CALL = 5  # steps in one dispatch, of the small models: fine-tuning is a third faster (BENCHMARKS.md)
MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


def vit(size: str, short: bool, **fields: object) -> ViT:
    width, depth, heads = (SHORT_SIZES if short else SIZES)[size]
    dtype = "float32" if short else "bfloat16"
    return ViT(width, depth, heads, image_size=32, patch_size=4, dtype=dtype, **fields)


def data(path: str, short: bool, split: str, per_class: int | None) -> Data:
    where = recipes.stored(path) if path else {"source": "tfds", "name": "cifar10"}
    pixels = {"image_size": 32, "crop_pct": 1.0, "mean": MEAN, "std": STD}
    return Data(split=split, per_class=per_class, prefetch=4 * (PER_CALL if short else 1), **pixels, **where)


def evaluation(source: Data) -> Data:
    return dataclasses.replace(source, transform="eval")


def get_config(arg: str = "") -> Config:
    o = recipes.options(arg, data="", short=False)
    short = o["short"]
    batch_size = 128 if short else 1024
    called = {"log_every": 20, "steps_per_call": PER_CALL if short else 1}
    mae_epochs, distill_epochs = (60, 15) if short else (200, 200)
    lr = 2e-3 if short else 1e-3
    train = data(o["data"], short, "train", 500 if short else None)
    test = evaluation(data(o["data"], short, "test", None))
    knn = Knn(test, evaluation(train), k=(20,))

    def pretrained(stage: Stage, epochs: float) -> Stage:
        warmup = min(epochs / 10, 4) if short else epochs / 10
        stage.optim = dataclasses.replace(stage.optim, lr=lr, lr_batch=None, warmup_epochs=warmup, min_lr=0.0)
        stage.run = dataclasses.replace(stage.run, batch_size=batch_size, epochs=epochs, **called)
        stage.evals = {"knn": knn}
        # 154 MB; a GPU takes more crops a second than a host makes.
        stage.data = dataclasses.replace(stage.data, resident=not short)
        return stage

    def mae(size: str, epochs: float) -> Stage:
        stage = recipes.mae(vit(size, short), train)
        stage.task.decoder = Decoder(64, 2, 4) if short else Decoder(192, 4, 6)
        return pretrained(stage, epochs)

    def distill(size: str, source: str, block: int, heads: int) -> Stage:
        model = vit(size, short, last_block_heads=heads, drop_path=0.0 if short else 0.1)
        return pretrained(recipes.distill(model, Init(source), train, block=block), distill_epochs)

    def finetune(size: str, source: str | None, seed: int = 0, layer_decay: float = 0.8) -> Stage:
        model = vit(size, short, pool="mean", num_classes=10, posembed="trainable")
        stage = recipes.finetune(model, Init(source) if source else None, train, test)
        stage.optim = dataclasses.replace(stage.optim, lr=1e-3, lr_batch=None, warmup_epochs=2, layer_decay=layer_decay)
        epochs = 10 if short else 100
        stage.run = dataclasses.replace(stage.run, batch_size=batch_size, epochs=epochs, seed=seed, **called)
        stage.data.workers = 0 if short else 8  # RandAugment is the host's
        if short:  # too few steps for strong augmentation
            stage.task, stage.data.rand_augment = Classify(mixup=0.0, cutmix=0.0, erasing=0.0), ""
        return stage

    depth, heads, block = (6, 8, 5) if short else (12, 12, 9)
    stages = {
        "mae_l": mae("l", mae_epochs),
        "distill_b": distill("b", "mae_l", block, heads),
        "distill_s": distill("s", "distill_b", depth, heads),
        "distill_t": distill("t", "distill_s", depth, heads),
        "mae_t": mae("t", distill_epochs),
        **{f"finetune_{size}": finetune(size, f"distill_{size}") for size in "bs"},
    }
    rows = {}
    for label, source in (("scratch", None), ("mae", "mae_t"), ("chain", "distill_t")):
        rows[label] = tuple(f"finetune_{label}_{seed}" for seed in range(3))
        # Layer-wise decay would hold back the T that starts from scratch.
        stages |= {name: finetune("t", source, seed, layer_decay=1.0) for seed, name in enumerate(rows[label])}
    # T as it is before anything is learnt, for comparison.
    stages["untrained_t"] = distill("t", "distill_s", depth, heads)
    stages["untrained_t"].run = dataclasses.replace(stages["untrained_t"].run, epochs=0)
    return Config("cifar10", stages, compare={"T after fine-tuning": Compare("val/top1", rows)})
