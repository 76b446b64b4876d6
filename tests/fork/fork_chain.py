"""The config of a fork's chain: its own task and encoder go through all of today's, with its own target and eval."""

from tinymim_jax.evals.feature_norm import FeatureNorm
from tinymim_jax.experiment import recipes
from tinymim_jax.experiment.config import Classify, Config, Data, Init, Knn, Optim, Run, Stage, ViT
from tinymim_jax.models.two_widths import TwoWidths
from tinymim_jax.tasks.rotation import Rotation
from tinymim_jax.tasks.targets.mean_token import MeanToken

TRAIN = Data("digits", image_size=16, per_class=4, hflip=0.0)
TEST = Data("digits", split="test", image_size=16, per_class=4, transform="eval", crop_pct=1.0)
BANK = Data("digits", image_size=16, per_class=4, transform="eval", crop_pct=1.0)


def short(stage: Stage) -> Stage:
    stage.optim.lr_batch, stage.optim.warmup_epochs = None, 0.0
    stage.run = Run(batch_size=8, steps=4, log_every=2, checkpoint_every=2)
    return stage


def get_config(arg: str = "") -> Config:
    vit = {"width": 24, "depth": 2, "num_heads": 2, "image_size": 16, "patch_size": 8}
    rotation = Stage(Rotation(), ViT(**vit), TRAIN, Optim(1e-3), Run(8), evals={"knn": Knn(TEST, BANK, k=(3,))})
    finetuned = recipes.finetune(ViT(**vit, num_classes=10, pool="mean"), Init("rotation"), TRAIN, TEST)
    labelled = Stage(Classify(mixup=0.0, cutmix=0.0), TwoWidths(16, num_classes=10), TRAIN, Optim(1e-3), Run(8))
    small = recipes.distill(TwoWidths(8), Init("labelled"), TRAIN, block=3)
    small.task.targets["relation"].student_block = 3
    small.task.targets["mean"] = MeanToken(teacher_block=3, student_block=4, weight=0.5)
    small.evals = {"norm": FeatureNorm(TEST)}
    head = recipes.finetune(TwoWidths(8, num_classes=10), Init("small"), TRAIN, TEST)
    stages = {"rotation": rotation, "finetuned": finetuned, "labelled": labelled, "small": small, "head": head}
    return Config("fork", {name: short(stage) for name, stage in stages.items()})
