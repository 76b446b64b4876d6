"""Top-1 and top-5 accuracy with exact counts."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.data import corruptions
from tinymim_jax.data.config import Data
from tinymim_jax.evals import labels, subsets
from tinymim_jax.evals.contract import Batch, Batches, Context, Eval, Evaluator, Result, Variables, needs_head
from tinymim_jax.models.contract import Encoder
from tinymim_jax.objectives import losses, metrics
from tinymim_jax.objectives.metrics import Mean
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError

MAX_CONFUSION = 1000  # classes
# The columns that may win (None: all), and the column of each label (None: of that number).
Subset = tuple[np.ndarray | None, np.ndarray | None]


@dataclasses.dataclass
class Classification(Eval):
    """Top-1 and top-5 accuracy, in percent."""

    data: Data
    subset: Literal["", "imagenet_a", "imagenet_r"] = ""  # of ImageNet's 1000 classes, the 200 that may be predicted
    kind: Literal["classification"] = "classification"
    batch_size: int = ranged(256, at_least=1)

    def build(self, context: Context) -> "Accuracy":
        return Accuracy(self, context)

    def check(self, where: str, model: Encoder, training: Data) -> None:
        super().check(where, model, training)
        needs_head(where, self.kind, model)
        if self.subset and model.num_classes != 1000:
            raise InputError(f"{where}: subset {self.subset!r} needs a head of ImageNet's 1000 classes")

    def metrics(self) -> list[str]:
        return ["top1", "top5", "images"]

    def same_classes(self, training: Data | None) -> list[tuple[Data, Data]]:
        return [] if training is None or self.subset else [(training, self.data)]


class Accuracy(Evaluator):
    """{"top1", "top5"} in percent and {"images"}, the number counted."""

    def __init__(self, cfg: Classification, context: Context):
        if cfg.data.corruption:
            corruptions.check(cfg.data.corruption)
        self.predict = context.predict
        batches = Batches(cfg.data, cfg.batch_size, context.mesh)
        self.passes = {"data": batches}
        self.classes = batches.source.classes
        self.head, self.subset = context.classes, None
        if cfg.subset:
            self.subset = subsets.columns(cfg.subset), subsets.targets(cfg.subset, self.classes)

    def update(self, variables: Variables, frozen: Any, others: Any, batch: Batch) -> dict[str, Any]:
        logits, subset = self.logits(variables, frozen, batch)
        seen, label = restricted(logits, batch["label"], subset)
        pairs = jnp.stack([jnp.where(batch["is_valid"], label, -1), jnp.argmax(seen, axis=-1)])
        return {**count_correct(logits, batch["label"], batch["is_valid"], subset), "pairs": pairs}

    def logits(self, variables: Variables, frozen: Any, batch: Batch) -> tuple[jax.Array, Subset]:
        """[B, C], and which of them count; raises InputError if the model has no head."""
        logits = self.predict(variables, frozen, batch).logits
        if logits is None:
            raise InputError("a classification eval needs a model with a head; set model.num_classes")
        return logits, self.subset or (None, self._columns(logits.shape[-1]))

    def _columns(self, outputs: int) -> np.ndarray | None:
        """The output of each label; raises InputError if the model has other classes than the data."""
        data = self.passes["data"].data
        return labels.match(self.head, self.classes, outputs, f"{data.path or data.source}, split {data.split!r},")[0]

    def _names(self) -> list[str]:
        """Of the outputs, in their order; [] if they are not known."""
        if self.subset or not (self.head or self.classes):
            return []
        columns = None if self.head else self._columns(len(self.classes))
        names = list(self.head or self.classes)
        return names if columns is None else [names[i] for i in np.argsort(columns)]

    def finish(self, found: Mapping[Hashable, list[dict[str, Any]]]) -> Result:
        counts = scores(found["data"])
        names = self._names()
        by_class = per_class(np.concatenate([one["pairs"] for one in found["data"]], axis=1), len(names))
        return Result(counts, {**by_class, "classes": np.array(names, str)})


def scores(found: list[dict[str, Any]]) -> dict[str, float]:
    """Percent of all that `Accuracy.update` counted; raises InputError if a label was beyond the model's outputs."""
    total = metrics.merge({name: one[name] for name in one if name != "pairs"} for one in found)
    if not total["top1"].count:
        raise InputError("no image of the evaluation set could be read; mend the data")
    if total["beyond"].sum:
        raise InputError("the data has labels that the model's outputs leave no place for")
    percent = {name: 100 * value for name, value in metrics.to_floats(total).items() if name != "beyond"}
    return {**percent, "images": float(total["top1"].count)}


def per_class(pairs: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    """Labels and predictions, int [2, n] -> "per_class", percent [C] (NaN: no image), and "confusion", int [C, C].

    Images whose label is -1 do not count. Row i of the confusion is what images of class i were taken for; of more
    than `MAX_CONFUSION` classes there is none.
    """
    labels, predicted = pairs[:, pairs[0] >= 0]
    count = max(classes, int(labels.max()) + 1, int(predicted.max()) + 1)
    images, hits = (np.bincount(chosen, minlength=count) for chosen in (labels, labels[labels == predicted]))
    percent = 100 * np.divide(hits, images, out=np.full(count, np.nan), where=images > 0)
    if count > MAX_CONFUSION:
        return {"per_class": percent}
    table = np.bincount(labels * count + predicted, minlength=count**2).reshape(count, count)
    return {"per_class": percent, "confusion": table}


def restricted(logits: jax.Array, label: jax.Array, subset: Subset) -> tuple[jax.Array, jax.Array]:
    """logits [B, C] with -inf outside the columns that may win, and the columns of labels [B]."""
    allowed, columns = subset
    if allowed is not None:
        logits = jnp.where(jnp.zeros(logits.shape[-1], bool).at[allowed].set(True), logits, -jnp.inf)
    return logits, label if columns is None else jnp.asarray(columns)[label]


def count_correct(
    logits: jax.Array, label: jax.Array, is_valid: jax.Array, subset: Subset = (None, None)
) -> dict[str, Mean]:
    """logits [B, C], label [B] -> hits among the best 1 and the best 5, over the valid examples."""
    is_unknown = losses.is_beyond(label, logits.shape[-1])
    logits, label = restricted(logits, label, subset)
    best = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
    hits = best == label[:, None]
    beyond = Mean.of(is_unknown, is_valid)
    return {"top1": Mean.of(hits[:, 0], is_valid), "top5": Mean.of(jnp.any(hits, axis=1), is_valid), "beyond": beyond}
