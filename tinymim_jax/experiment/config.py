"""What an experiment is: typed dataclasses, stored as JSON.

A config file returns a `Config`. Every field has its default beside it and nowhere else: those of models, data, tasks,
targets and evals stand in the modules that define these, and are handed on here.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, Union

from tinymim_jax.data.config import Data, Masks
from tinymim_jax.evals import (
    EVALS,
    AttentionSpan,
    Cka,
    Classification,
    Corruptions,
    Knn,
    Logistic,
    NearestImages,
    RelationAgreement,
    Segmentation,
    Spectrum,
)
from tinymim_jax.models import MODELS, Hiera, ViT
from tinymim_jax.models.mae import Decoder
from tinymim_jax.models.pyramid import Pyramid
from tinymim_jax.models.segment_heads import Fcn, Fpn, Linear, UPer
from tinymim_jax.runtime.codec import from_dict, ranged, to_dict, walk
from tinymim_jax.runtime.keys import SEEDS
from tinymim_jax.tasks import TASKS, Classify, Distill, Mae, Moco, Segment
from tinymim_jax.tasks.classify import LabelTeacher
from tinymim_jax.tasks.targets import AttentionLogits, ClassToken, Feature, Reconstruction, Relation
from tinymim_jax.weights.handoff import Init

__all__ = [
    "AttentionLogits", "AttentionSpan", "Cka", "ClassToken", "Classification", "Classify", "Compare", "Config",
    "Corruptions", "Data", "Decoder", "Distill", "Fcn", "Feature", "Fpn", "Hiera", "Init", "Knn", "LabelTeacher",
    "Linear", "Logistic", "Mae", "Masks", "Mesh", "Moco", "NearestImages", "Optim", "Pyramid", "Reconstruction",
    "Relation", "RelationAgreement", "Run", "Segment", "Segmentation", "Spectrum", "Stage", "UPer", "ViT",
]  # fmt: skip

Model, Task, Eval = (Union[tuple(kinds.values())] for kinds in (MODELS, TASKS, EVALS))  # noqa: UP007


@dataclasses.dataclass
class Optim:
    """AdamW, SGD or LARS, with a linear warm-up and a schedule that is set at each step."""

    lr: float = ranged(at_least=0)  # peak, for a batch of lr_batch
    lr_batch: int | None = ranged(256, at_least=1)  # lr is multiplied by batch_size / lr_batch; None: used as it is
    # Behind the warm-up; `training.optim.make_schedule` says which of them count from the first step.
    schedule: Literal["cosine", "cosine_epochs", "poly", "poly_behind", "step", "constant"] = "cosine"
    min_lr: float = ranged(0.0, at_least=0)  # where cosines and polys end; not scaled
    warmup_lr: float = ranged(0.0, at_least=0)  # where the warm-up begins; not scaled
    power: float = ranged(1.0, above=0)  # poly
    drops: tuple[float, ...] = ranged((), above=0, below=1)  # step: where, as shares of the run, lr falls ...
    drop_factor: float = ranged(0.1, above=0, at_most=1)  # ... to this share of what it was
    warmup_epochs: float = ranged(0.0, at_least=0)
    warmup_steps: int = ranged(0, at_least=0)  # as well as the epochs; one of the two is 0
    b1: float = ranged(0.9, at_least=0, below=1)
    b2: float = ranged(0.95, at_least=0, below=1)
    eps: float = ranged(1e-8, at_least=0)
    momentum: float = ranged(0.9, at_least=0, below=1)  # sgd, lars
    nesterov: bool = False  # sgd, lars
    trust: float = ranged(0.001, above=0)  # lars: coefficient
    weight_decay: float = ranged(0.05, at_least=0)
    decay: tuple[str, ...] = (".*/kernel", ".*/(cls|dist|mask)_token")  # regexes of decayed parameters
    no_decay: tuple[str, ...] = (".*/bias", ".*/scale", ".*/pos_embed")  # and of the others
    freeze: tuple[str, ...] = ()  # regexes of parameters that are not trained
    layer_decay: float = ranged(1.0, above=0, at_most=1)  # lr of block i times layer_decay^(depth + 1 - i)
    lr_scale: dict[str, float] = dataclasses.field(default_factory=dict)  # regex -> factor on the learning rate
    clip_norm: float | None = ranged(None, above=0)  # of the gradient, global
    accum_steps: int = ranged(1, at_least=1)  # micro-batches a step
    ema: float | None = ranged(None, above=0, below=1)  # decay of the averaged weights; None: off
    name: Literal["adamw", "sgd", "lars"] = "adamw"


@dataclasses.dataclass
class Run:
    """How long and how often."""

    batch_size: int = ranged(at_least=1)  # images a step, over all devices
    epochs: float | None = ranged(None, at_least=0)  # exactly one of epochs and steps
    steps: int | None = ranged(None, at_least=0)
    seed: int = ranged(0, **SEEDS)
    replicas: int = ranged(1, at_least=1)  # seeds trained at once: seed, seed + 1, ...
    data_seed: int | None = ranged(None, **SEEDS)  # of order and crops; None: seed. If set, replicas share batches
    data_name: str | None = None  # stages of one seed and name see the same batches; None: the stage's own name
    steps_per_call: int = ranged(1, at_least=1)  # scanned in one dispatch: for models whose step is shorter than one
    log_every: int = ranged(50, at_least=1)  # steps
    checkpoint_every: int = ranged(1000, at_least=1)  # steps
    eval_every: int = ranged(0, at_least=0)  # steps; 0: at the end only
    keep: int = ranged(2, at_least=1)  # checkpoints
    on_nan: Literal["stop", "skip"] = "stop"  # a loss or gradient that is not finite; skip: leave out the update
    max_skipped: int = ranged(10, at_least=0)  # updates of the stage; one more stops it


@dataclasses.dataclass
class Stage:
    """One run of the loop."""

    task: Task
    model: Model
    data: Data
    optim: Optim
    run: Run
    init: Init | None = None  # None: from scratch
    evals: dict[str, Eval] = dataclasses.field(default_factory=dict)

    def inits(self) -> Iterator[tuple[str, Init]]:
        """Every hand-over that feeds the stage, by its field: "init", "task.teacher", "evals.NAME.model", ..."""
        for where, init in walk(self, Init):
            is_wrapped = where.startswith("task.") and where.count(".") > 1  # task.teacher.init: of the teacher
            yield where.removesuffix(".init") if is_wrapped else where, init

    def task_inits(self) -> dict[str, Init]:
        """Those of the frozen networks that the task reads, by their field in the task."""
        return {where.removeprefix("task."): init for where, init in self.inits() if where.startswith("task.")}

    def eval_inits(self, name: str) -> dict[str, Init]:
        """Those of the checkpoints that eval `name` reads, by their field in it."""
        prefix = f"evals.{name}."
        return {where.removeprefix(prefix): init for where, init in self.inits() if where.startswith(prefix)}

    def data_sets(self) -> list[Data]:
        """What it reads and can be opened as it stands: its training data, then that of its evals."""
        return [self.data, *(data for cfg in self.evals.values() for data in cfg.opened())]


@dataclasses.dataclass
class Mesh:
    """Devices as a grid; the batch is split over both axes, large parameters over fsdp."""

    data: int = -1  # -1: all that are left
    fsdp: int = ranged(1, at_least=1)


@dataclasses.dataclass
class Compare:
    """A table of one metric over groups of stages that differ by seed; each replica of a stage counts as one."""

    metric: str  # as in results.json, e.g. "test/top1"
    rows: dict[str, tuple[str, ...]]  # label -> stages
    paper: dict[str, float] = dataclasses.field(default_factory=dict)  # label -> a published value, to stand beside
    counts: str = ""  # what the labels, then numbers, count: rows are drawn as a curve, beside others of these words


@dataclasses.dataclass
class Config:
    """A chain: stages in order, each fed by earlier ones."""

    name: str
    stages: dict[str, Stage]
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    compare: dict[str, Compare] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        # Stages made from the same parts must not share them: a flag that changes one would change the others.
        self.stages = from_dict(dict[str, Stage], to_dict(self.stages), "config.stages")
