"""The contract between a task and the one loop."""

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import flax.struct
import jax
import numpy as np

from tinymim_jax.data.config import Data
from tinymim_jax.data.device_augment import normalize, to_float
from tinymim_jax.data.fields import IMAGE_LABEL
from tinymim_jax.models.contract import Encoder, Outputs, Pool
from tinymim_jax.objectives.metrics import Mean
from tinymim_jax.weights.parameters import matches

Params = Any  # nested dict of arrays: encoder/..., which later stages read, and pretext/..., which none does
Variables = Mapping[str, Any]  # {"params": Params, other collections}
Frozen = Any  # arrays the loss reads and nothing trains: {source: {"encoder": ...}}
Batch = Mapping[str, jax.Array]  # the fields that the task names, is_valid bool [B], index [B]; to train, stop [B]
Rngs = Mapping[str, jax.Array]  # one key per name in STREAMS

STREAMS = ("mask", "augment", "drop_path")


@flax.struct.dataclass
class Aux:
    """What a loss returns beside its value."""

    metrics: dict[str, Mean]
    model_state: Any  # the collections other than params, updated


@dataclasses.dataclass(frozen=True)
class Context:
    """What a task is told of its stage."""

    model: Encoder
    data: Data
    freeze: tuple[str, ...] = ()  # regexes of parameters that the optimiser leaves alone
    total_steps: int = 0  # of the whole run
    sources: Mapping[str, Encoder] = dataclasses.field(default_factory=dict)
    """The models of the checkpoints that the task's config names by `Init`, as they were trained, by field."""


@dataclasses.dataclass
class Panels:
    """A picture of what a task does: rows of images, float [H, W, 3] in [0, 1] or maps [h, w], each with a label.

    Two maps side by side, as of teacher and student, share a scale.
    """

    title: str
    rows: list[list[np.ndarray]]
    row_labels: list[str] = dataclasses.field(default_factory=list)
    column_labels: list[str] = dataclasses.field(default_factory=list)
    box: tuple[int, int, int] | None = None  # left, top and side in pixels, drawn on the first image of each row
    captions: list[list[str]] = dataclasses.field(default_factory=list)  # below each image, in rows as these are

    def scales(self, row: Sequence[np.ndarray]) -> Iterator[tuple[list[int], tuple[float, float]]]:
        """The maps of a row: the columns of each pair, and the lowest and highest value of its scale."""
        maps = [column for column, image in enumerate(row) if image.ndim == 2]
        for pair in (maps[i : i + 2] for i in range(0, len(maps), 2)):
            values = np.stack([row[column] for column in pair])
            yield pair, (min(0.0, float(values.min())), float(values.max()))


class Task(abc.ABC):
    """All that differs between pre-training, distillation and fine-tuning: an encoder, and what is made of it."""

    fields = IMAGE_LABEL  # what it reads of a record

    def __init__(self, context: Context):
        self.context, self.data, self.cfg = context, context.data, context.model
        self.model = context.model.build()

    def images(self, batch: Batch) -> jax.Array:
        """Normalised images [B, S, S, 3]."""
        return normalize(to_float(batch["image"]), self.data.mean, self.data.std)

    def is_untrained(self, name: str) -> bool:
        """Whether the loss does not read parameter `name`, or it is fixed: kept as it is, undecayed."""
        return matches(self.cfg.fixed, name)

    @abc.abstractmethod
    def init(self, rng: jax.Array, batch: Batch) -> tuple[Variables, Frozen]:
        """Fresh variables and frozen arrays."""

    @abc.abstractmethod
    def loss(
        self, params: Params, model_state: Any, frozen: Frozen, batch: Batch, rngs: Rngs, *, train: bool
    ) -> tuple[jax.Array, Aux]:
        """The scalar to minimise, a mean over the valid images."""

    @abc.abstractmethod
    def flops_per_image(self) -> float:
        """Matmul FLOPs of one training step, for one image."""

    def merge_state(self, before: Any, parts: Any, rows: int) -> Any:
        """The collections behind a batch, from those of its parts of `rows` rows, stacked, which began at `before`."""
        return self.cfg.merge_state(before, parts, rows)

    def shared(self, frozen: Frozen, batch: Batch, tasks: "Sequence[Task]") -> dict[str, Any]:
        """What each of `tasks`, whose configs can share with this one's, finds in its batch and need not compute."""
        return {}

    def predict(self, variables: Variables, frozen: Frozen, batch: Batch) -> Outputs:
        """Features and logits, without augmentation."""
        return self.cfg.outputs(variables, self.images(batch))

    def describe_source(self, source: str) -> str:
        """What is taken from one of the context's sources, in a few words."""
        return self.context.sources[source].summary()

    def panels(self, variables: Variables, frozen: Frozen, batch: Batch, rngs: Rngs) -> Panels | None:
        """A picture of the trained task on a few images, if there is one."""
        return None


class TaskConfig(abc.ABC):
    """The config of a task, a dataclass with a `kind` that `tasks.TASKS` lists."""

    kind: str
    gives_pixels: ClassVar[bool] = False  # whether `Task.predict` gives logits of pixels

    @abc.abstractmethod
    def build(self, context: Context) -> Task:
        """The task; raises InputError on what does not fit together."""

    @abc.abstractmethod
    def summary(self) -> str:
        """What is done, in a few words for people."""

    @abc.abstractmethod
    def check(self, where: str, model: Encoder) -> None:
        """Raises InputError, naming fields by `where`, on what cannot be done with `model`."""

    def features_pool(self) -> Pool | None:
        """The token that is trained to be the features; None: what the encoder says."""
        return None

    def can_share(self, other: "TaskConfig") -> bool:
        """Whether what `Task.shared` gives for a batch serves both, of models of one size, dtype and kind of images."""
        return False

    def has_labels(self) -> bool:
        """Whether the labels of the data are learnt."""
        return False

    def reconstruction(self) -> "TaskConfig | None":
        """Whose `decoder` to pixels, trained under pretext/decoder with `norm_pix_loss` and `mask_ratio`, it has."""
        return None
