"""The demo: MAE-L -> B -> S -> T on scikit-learn's scanned digits, then T with ten labels a class.

bash launch/demo.sh
python -m tinymim_jax run --config=configs/digits/chain.py --workdir=runs/digits

The same fine-tuning of the same T starts from scratch, from T's own MAE pre-training and from the chain, with five
seeds (labels, order, initial head) each, which are trained at once. Cost and result: the table in README.md.
"""

import dataclasses

from tinymim_jax.experiment import recipes
from tinymim_jax.experiment.config import (
    Classify,
    Compare,
    Config,
    Data,
    Decoder,
    Init,
    Knn,
    Optim,
    Run,
    Stage,
    ViT,
)

SEEDS = 5
LABELS_PER_CLASS = 10
TRAIN = Data(
    "digits",
    image_size=16,
    crop_scale=(0.5, 1.0),
    crop_ratio=(0.8, 1.25),
    hflip=0.0,
    resident=True,
    mean=(0.3,) * 3,
    std=(0.38,) * 3,
)
TEST = dataclasses.replace(TRAIN, split="test", transform="eval", crop_pct=1.0)
BANK = dataclasses.replace(TEST, split="train")
SIZES = {
    "l": {"width": 128, "depth": 4, "num_heads": 8},
    "b": {"width": 72, "depth": 4, "num_heads": 6},
    "s": {"width": 64, "depth": 4, "num_heads": 4},
    "t": {"width": 32, "depth": 4, "num_heads": 2},
}


def vit(size: str, **fields: object) -> ViT:
    return ViT(**SIZES[size], image_size=16, patch_size=4, **fields)


def pretrained(stage: Stage, epochs: int) -> Stage:
    stage.optim = Optim(lr=3e-3, lr_batch=None, warmup_epochs=epochs / 10)
    stage.run = Run(batch_size=128, epochs=epochs, log_every=10, steps_per_call=10)
    stage.evals = {"knn": Knn(TEST, BANK, k=(10,))}
    return stage


def mae(size: str, epochs: int) -> Stage:
    stage = recipes.mae(vit(size), TRAIN)
    stage.task.decoder = Decoder(width=64, depth=1, num_heads=4)
    return pretrained(stage, epochs)


def distill(size: str, source: str, block: int, epochs: int = 40) -> Stage:
    return pretrained(recipes.distill(vit(size, last_block_heads=8), Init(source), TRAIN, block=block), epochs)


def finetune(source: str | None) -> Stage:
    model = vit("t", pool="mean", num_classes=10, posembed="trainable")
    stage = recipes.finetune(model, Init(source) if source else None, TRAIN, TEST)
    stage.task = Classify(label_smoothing=0.1, mixup=0.0, cutmix=0.0, erasing=0.0)
    stage.data = dataclasses.replace(TRAIN, per_class=LABELS_PER_CLASS, subset_seed=None)
    stage.optim = dataclasses.replace(stage.optim, lr=2e-3, lr_batch=None, warmup_epochs=12, layer_decay=1.0)
    stage.run = Run(batch_size=50, epochs=120, log_every=20, steps_per_call=20, replicas=SEEDS)
    return stage


def get_config(arg: str = "") -> Config:
    recipes.options(arg)
    stages = {
        "mae_l": mae("l", epochs=100),
        "distill_b": distill("b", "mae_l", block=4),
        "distill_s": distill("s", "distill_b", block=4),
        "distill_t": distill("t", "distill_s", block=4),
        "mae_t": mae("t", epochs=40),
    }
    starts = {"scratch": None, "mae": "mae_t", "chain": "distill_t"}
    stages |= {f"finetune_{label}": finetune(source) for label, source in starts.items()}
    rows = {label: (f"finetune_{label}",) for label in starts}
    return Config("digits", stages, compare={"T, 10 labels a class": Compare("val/top1", rows)})
