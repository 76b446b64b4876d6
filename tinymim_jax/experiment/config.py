"""What an experiment is: typed dataclasses, stored as JSON.

A config file returns a `Config`. Every field has its default here and nowhere else.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from tinymim_jax.runtime.codec import from_dict, to_dict


@dataclasses.dataclass
class ViT:
    """A plain vision transformer (`models.vit.VisionTransformer`)."""

    width: int  # D
    depth: int  # number of blocks
    num_heads: int  # H of every block but the last
    last_block_heads: int | None = None  # H of the last block; None: num_heads
    mlp_ratio: float = 4.0  # hidden width of the MLP over D
    image_size: int = 224  # pixels a side
    patch_size: int = 16  # pixels a side
    posembed: Literal["fixed", "trainable"] = "fixed"  # sin-cos table, frozen or a starting point
    pool: Literal["cls", "mean"] = "cls"  # norm then CLS | mean of patch tokens then fc_norm
    num_classes: int = 0  # 0: no head
    dist_token: bool = False  # DeiT's distillation token behind CLS, with a head of its own; logits are their mean
    neck: int = 0  # width of a norm, linear and GELU before the heads (TinyMIM*-T); 0: none
    head_norm: bool = False  # BatchNorm without affine before the head (linear probing)
    drop_path: float = 0.0  # stochastic depth, per sample, per residual branch
    drop_path_shape: Literal["constant", "linear"] = "constant"  # constant: none in the last block
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters are float32
    remat: bool = False  # recompute each block in the backward pass
    attention: Literal["xla", "cudnn"] = "xla"  # cudnn: fused on Nvidia GPUs, in bfloat16; not measured yet


@dataclasses.dataclass
class Decoder:
    """The MAE decoder."""

    width: int = 512
    depth: int = 8
    num_heads: int = 16


@dataclasses.dataclass
class Data:
    """A data set, read and cropped on the host."""

    source: Literal["digits", "folder", "tfds", "array_record"]
    split: str = "train"  # digits, folder: a sub-folder; tfds: a split; array_record: a file prefix
    path: str = ""  # folder: the tree; array_record: the folder of shards; tfds: data_dir
    name: str = ""  # tfds: the builder's name
    num_examples: int | None = None  # the size, when known before the data is at hand
    per_class: int | None = None  # keep only this many images of each class
    subset_seed: int = 0  # which ones
    image_size: int = 224
    transform: Literal["train", "eval"] = "train"  # random-resized-crop and flip | resize and centre crop
    crop_scale: tuple[float, float] = (0.2, 1.0)  # train: area of the crop
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # train: aspect of the crop
    hflip: float = 0.5  # train: probability
    repeats: int = 1  # train: each image so often in a row, augmented anew; an epoch has 1 / repeats of the images
    fast_crop: bool = True  # train: JPEGs by libjpeg-turbo, as far and fine as a crop needs; False: PIL's exact pixels
    rand_augment: str = ""  # train: e.g. "rand-m9-mstd0.5-inc1"; "": none
    crop_pct: float = 0.875  # eval: the shorter side becomes image_size / crop_pct
    corruption: str = ""  # eval: one of ImageNet-C's, e.g. "gaussian_noise", made on the crop; "": none
    severity: int = 1  # eval: of the corruption, 1 to 5
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # PIL's, antialiased
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    on_bad_image: Literal["stop", "skip"] = "stop"  # skip: left out of the loss and counted
    resident: bool = False  # train: decoded once into the memory of every device, cropped and flipped there
    threads: int = 2  # batches read in parallel in each process
    workers: int = 0  # worker processes; 0: threads only
    prefetch: int = 4  # batches kept ready


@dataclasses.dataclass
class Init:
    """Where weights come from. Exactly one of `stage` and `path`."""

    stage: str | None = None  # an earlier stage of this chain
    path: str | None = None  # a stage's folder, of any run
    rename: dict[str, str] = dataclasses.field(default_factory=dict)  # regex -> replacement, on the source's keys
    skip: tuple[str, ...] = ()  # regexes: keys of the source that may be left out
    fresh: tuple[str, ...] = ()  # regexes: keys of this model that may keep their initial values
    keep_blocks: int | None = None  # take over the embeddings and the first so many blocks only; None: everything
    regroup_heads: bool = False  # re-read fused qkv channels with another number of heads
    resize_posembed: bool = False  # bicubic, to this model's grid


@dataclasses.dataclass
class Mae:
    """Masked auto-encoding (He et al. 2022)."""

    kind: Literal["mae"] = "mae"
    decoder: Decoder = dataclasses.field(default_factory=Decoder)
    mask_ratio: float = 0.75
    norm_pix_loss: bool = True  # the target is each patch, normalised


@dataclasses.dataclass
class Teacher:
    """The frozen network whose relations are matched; its sizes come from its own `stage.json`."""

    init: Init
    block: int  # target block, from 1
    heads: int | None = None  # heads of the target block; None: as it was trained


@dataclasses.dataclass
class Distill:
    """Token-relation distillation (TinyMIM, section 3.1.2)."""

    teacher: Teacher
    kind: Literal["distill"] = "distill"
    student_block: int = 12  # the block whose q, k, v are matched, from 1
    relations: tuple[Literal["qk", "vv", "qq", "kk"], ...] = ("qk", "vv")
    color_jitter: float = 0.4  # brightness, contrast, saturation of the student's view
    relation_kernel: Literal["xla", "pallas"] = "xla"  # of the loss on TPU and GPU; pallas has not been measured yet


@dataclasses.dataclass
class LabelTeacher:
    """A classifier whose labels a distillation token learns (DeiT); it sees the same mixed images."""

    init: Init
    labels: Literal["hard", "soft"] = "hard"  # its best class, or its probabilities
    weight: float = 0.5  # of the teacher's loss; 1 - weight of the labels'
    temperature: float = 1.0  # soft: of both


@dataclasses.dataclass
class Classify:
    """Supervised training or fine-tuning."""

    kind: Literal["classify"] = "classify"
    teacher: LabelTeacher | None = None  # needs model.dist_token
    label_smoothing: float = 0.1
    mixup: float = 0.8  # alpha of Beta; 0: off
    cutmix: float = 1.0  # alpha of Beta; 0: off
    mix_prob: float = 1.0  # probability that a batch is mixed
    switch_prob: float = 0.5  # probability of cutmix where both are on
    erasing: float = 0.25  # probability of random erasing, per image


@dataclasses.dataclass
class Optim:
    """AdamW, SGD or LARS with linear warm-up and cosine decay, set at each step."""

    lr: float  # peak, for a batch of lr_batch
    lr_batch: int | None = 256  # lr is multiplied by batch_size / lr_batch; None: used as it is
    min_lr: float = 0.0  # where the cosine ends; not scaled
    warmup_epochs: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.9  # sgd, lars
    trust: float = 0.001  # lars: coefficient
    weight_decay: float = 0.05
    decay: tuple[str, ...] = (".*/kernel", ".*/(cls|dist|mask)_token")  # regexes of decayed parameters
    no_decay: tuple[str, ...] = (".*/bias", ".*/scale", ".*/pos_embed")  # and of the others
    freeze: tuple[str, ...] = ()  # regexes of parameters that are not trained
    layer_decay: float = 1.0  # lr of block i times layer_decay^(depth + 1 - i)
    clip_norm: float | None = None  # of the gradient, global
    accum_steps: int = 1  # micro-batches a step
    ema: float | None = None  # decay of the averaged weights; None: off
    name: Literal["adamw", "sgd", "lars"] = "adamw"


@dataclasses.dataclass
class Run:
    """How long and how often."""

    batch_size: int  # images a step, over all devices
    epochs: float | None = None  # exactly one of epochs and steps
    steps: int | None = None
    seed: int = 0
    steps_per_call: int = 1  # scanned in one dispatch: for small models, whose step is shorter than a dispatch
    log_every: int = 50  # steps
    checkpoint_every: int = 1000  # steps
    eval_every: int = 0  # steps; 0: at the end only
    keep: int = 2  # checkpoints
    on_nan: Literal["stop", "skip"] = "stop"  # a loss or gradient that is not finite; skip: leave out the update
    max_skipped: int = 10  # updates of the stage; one more stops it


@dataclasses.dataclass
class Classification:
    """Top-1 and top-5 accuracy, in percent."""

    data: Data
    subset: Literal["", "imagenet_a", "imagenet_r"] = ""  # of ImageNet's 1000 classes, the 200 that may be predicted
    kind: Literal["classification"] = "classification"
    batch_size: int = 256


@dataclasses.dataclass
class Knn:
    """Weighted k-nearest-neighbour accuracy of frozen features, in percent."""

    data: Data  # the queries
    bank: Data  # the labelled neighbours
    kind: Literal["knn"] = "knn"
    k: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    batch_size: int = 256


@dataclasses.dataclass
class Logistic:
    """Accuracy of a logistic regression on frozen features, in percent."""

    data: Data  # the queries
    bank: Data  # what it is fitted on
    kind: Literal["logistic"] = "logistic"
    c: float = 1.0  # inverse of the L2 regularisation
    max_iter: int = 1000
    batch_size: int = 256


@dataclasses.dataclass
class Corruptions:
    """ImageNet-C: error over corruptions and severities, plain and as mCE, in percent."""

    data: Data  # clean images to corrupt, or where the stored ones are (`stored`)
    kind: Literal["corruptions"] = "corruptions"
    stored: bool = False  # folder: data.path/<corruption>/<severity>/<class>/*; tfds: data.name/<corruption>_<severity>
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    batch_size: int = 256


Task = Mae | Distill | Classify
Eval = Classification | Knn | Logistic | Corruptions


@dataclasses.dataclass
class Stage:
    """One run of the loop."""

    task: Task
    model: ViT
    data: Data
    optim: Optim
    run: Run
    init: Init | None = None  # None: from scratch
    evals: dict[str, Eval] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Mesh:
    """Devices as a grid; the batch is split over both axes, large parameters over fsdp."""

    data: int = -1  # -1: all that are left
    fsdp: int = 1


@dataclasses.dataclass
class Compare:
    """A table of one metric over groups of stages that differ by seed."""

    metric: str  # as in results.json, e.g. "test/top1"
    rows: dict[str, tuple[str, ...]]  # label -> stages


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


def sources(stage: Stage) -> Iterator[Init]:
    """Every hand-over that feeds `stage`: its initial weights, then its teacher."""
    if stage.init is not None:
        yield stage.init
    if teacher := teacher_of(stage):
        yield teacher.init


def teacher_of(stage: Stage) -> Teacher | LabelTeacher | None:
    """The frozen network that `stage` learns from, if there is one."""
    return None if isinstance(stage.task, Mae) else stage.task.teacher
