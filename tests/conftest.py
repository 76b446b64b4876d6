"""Shared fixtures: tiny configs on the embedded digits, and one compilation cache for the whole session."""

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "tinymim_jax_test_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Programs here are small: making them takes longer than running them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from tinymim_jax.evals.contract import Evaluator, Measurement, scalars
from tinymim_jax.experiment import recipes, segmentation
from tinymim_jax.experiment.config import (
    Classification,
    Config,
    Data,
    Decoder,
    Fcn,
    Init,
    Knn,
    Masks,
    Optim,
    Run,
    Segment,
    Segmentation,
    Stage,
    UPer,
    ViT,
)
from tinymim_jax.runtime.sharding import make_mesh
from tinymim_jax.training.loop import run_stage

TRAIN = Data("digits", image_size=16, per_class=4, hflip=0.0)
TEST = dataclasses.replace(TRAIN, split="test", transform="eval", crop_pct=1.0)
IMAGE = {"image_size": 16, "patch_size": 8}


def _short(stage: Stage) -> Stage:
    stage.optim = Optim(lr=1e-3, lr_batch=None, warmup_epochs=0.2)
    stage.run = Run(batch_size=8, steps=4, log_every=3, checkpoint_every=2)
    stage.data = dataclasses.replace(TRAIN)
    return stage


def tiny_mae() -> Stage:
    """Four steps of MAE on a 2-block, 24-wide ViT."""
    stage = _short(recipes.mae(ViT(24, 3, 6, **IMAGE), TRAIN))
    stage.task.decoder = Decoder(16, 1, 2)
    stage.evals = {"knn": Knn(TEST, dataclasses.replace(TEST, split="train"), k=(3,))}
    return stage


def tiny_distill(source: str = "mae", block: int = 2) -> Stage:
    """Four steps of distillation into a narrower ViT."""
    model = ViT(16, 2, 2, last_block_heads=6, drop_path=0.1, **IMAGE)
    model.width = 12
    return _short(recipes.distill(model, Init(source), TRAIN, block=block))


def tiny_classify(source: str | None = "distill") -> Stage:
    """Four steps of fine-tuning with everything on."""
    model = ViT(12, 2, 2, pool="mean", num_classes=10, posembed="trainable", drop_path=0.1, **IMAGE)
    stage = recipes.finetune(model, Init(source) if source else None, TRAIN, TEST)
    optim = stage.optim
    stage = _short(stage)
    stage.optim = dataclasses.replace(optim, lr=1e-3, lr_batch=None, warmup_epochs=0.2)
    stage.data.rand_augment = "rand-m9-mstd0.5-inc1"
    stage.evals = {"val": Classification(TEST, batch_size=16)}
    return stage


def tiny_segment(source: str | None = None) -> Stage:
    """Four steps of segmenting scenes of digits."""
    masks = Masks(11, scale=(48, 36), ratio=(0.75, 1.5), max_share=0.95)
    train = Data("scenes", image_size=32, masks=masks)
    val = dataclasses.replace(train, split="test", transform="eval")
    model = ViT(16, 4, 2, image_size=32, patch_size=8, pool="mean", drop_path=0.1)
    task = Segment(11, UPer(8, bins=(1, 2)), taps=(1, 2, 3, 4), aux=Fcn(8))
    stage = _short(Stage(task, model, train, Optim(1e-3), Run(8), evals={"val": Segmentation(val)}))
    stage.optim.warmup_epochs = 0
    stage.data, stage.init = train, segmentation.weights(Init(source)) if source else None
    return stage


def measured(evaluator: Evaluator, variables: Any, frozen: Any = None) -> dict[str, float]:
    """All that one evaluator finds."""
    found = scalars(Measurement({"x": evaluator}).run(variables, frozen, "x")())
    return {name.removeprefix("x/"): value for name, value in found.items()}


def tiny_chain() -> Config:
    """mae -> distill -> finetune, four steps each."""
    return Config("tiny", {"mae": tiny_mae(), "distill": tiny_distill(), "finetune": tiny_classify()})


@pytest.fixture
def chain() -> Config:
    """mae -> distill -> finetune, four steps each."""
    return tiny_chain()


@pytest.fixture(scope="session")
def finished(tmp_path_factory, mesh):
    """The workdir of that chain, all of it run; to be read only."""
    workdir = tmp_path_factory.mktemp("finished")
    for name, stage in tiny_chain().stages.items():
        run_stage(stage, name, workdir, mesh)
    return workdir


@pytest.fixture(scope="session")
def mesh():
    """One device."""
    return make_mesh()


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(step): the next runs are sent Ctrl-C after that step, once."""
    import os
    import signal

    from tinymim_jax.training import progress

    def arrange(step: int) -> None:
        add = progress.Progress.add

        def interrupting(self, at, metrics, waited=0.0):
            add(self, at, metrics, waited)
            if at == step:
                monkeypatch.setattr(progress.Progress, "add", add)
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(progress.Progress, "add", interrupting)

    return arrange


@pytest.fixture
def optimised():
    """Programs compiled as users compile them."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def cudnn(monkeypatch):
    """jax as if cuDNN were there: programs can be lowered for a GPU, though not run on one."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    jax.clear_caches()  # of what was traced without it
    yield
    jax.clear_caches()
