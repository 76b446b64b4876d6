"""Top-1 and top-5 accuracy with exact counts."""

from collections.abc import Generator

import jax
import jax.numpy as jnp

from tinymim_jax.data import corruptions
from tinymim_jax.evals import subsets
from tinymim_jax.evals.contract import Batches, Fetched, Finish, Predict
from tinymim_jax.experiment import config
from tinymim_jax.objectives import metrics
from tinymim_jax.objectives.metrics import Mean
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import Frozen, Variables


class Classification:
    """{"top1", "top5"} in percent and {"images"}, the number counted."""

    def __init__(self, cfg: config.Classification, mesh: jax.sharding.Mesh):
        if cfg.data.corruption:
            corruptions.check(cfg.data.corruption)
        self.batches = Batches(cfg.data, cfg.batch_size, mesh)
        self.subset = None  # all classes, labelled by column
        if cfg.subset:
            self.subset = subsets.columns(cfg.subset), subsets.targets(cfg.subset, self.batches.source.classes)

    @property
    def num_batches(self) -> int:
        return len(self.batches)

    def __call__(self, predict: Predict, variables: Variables, frozen: Frozen) -> Generator[None, None, Finish]:
        """Raises InputError if the model has no head, or fewer outputs than there are labels."""
        counts, outputs = Fetched(), 0
        for batch in self.batches:
            logits = predict(variables, frozen, batch).logits
            if logits is None:
                raise InputError("a classification eval needs a model with a head; set model.num_classes")
            outputs = logits.shape[-1]
            self._check_classes(outputs)
            counts.add(count_correct(logits, batch["label"], batch["is_valid"], self.subset))
            yield
        return lambda: scores(counts.all(), outputs)

    def _check_classes(self, outputs: int) -> None:
        """Labels of a folder are positions in it: with other classes they would mean something else."""
        source, data = self.batches.source, self.batches.data
        if self.subset is None and source.classes is not None and len(source.classes) != outputs:
            raise InputError(
                f"{data.path or data.source}, split {data.split!r}, has {len(source.classes)} classes and the model"
                f" {outputs}; use data with the classes that it was trained on"
            )


def scores(counts: list[dict[str, Mean]], outputs: int) -> dict[str, float]:
    """Percent of all that was counted; raises InputError if a label was beyond the `outputs` of the model."""
    total = metrics.merge(counts)
    if not total["top1"].count:
        raise InputError("no image of the evaluation set could be read; mend the data")
    if total["beyond"].sum:
        raise InputError(f"the data has labels that the model's {outputs} outputs leave no place for")
    percent = {name: 100 * value for name, value in metrics.to_floats(total).items() if name != "beyond"}
    return {**percent, "images": float(total["top1"].count)}


def restrict(logits: jax.Array, columns: jax.Array) -> jax.Array:
    """logits [B, C] with -inf outside `columns`."""
    allowed = jnp.zeros(logits.shape[-1], bool).at[columns].set(True)
    return jnp.where(allowed, logits, -jnp.inf)


@jax.jit
def count_correct(
    logits: jax.Array, labels: jax.Array, is_valid: jax.Array, subset: tuple[jax.Array, jax.Array] | None = None
) -> dict[str, Mean]:
    """logits [B, C], labels [B] -> hits among the best 1 and the best 5, over the valid examples.

    `subset`: the columns that may win, and the column of each label.
    """
    is_unknown = (labels < 0) | (labels >= logits.shape[-1])
    if subset is not None:
        logits, labels = restrict(logits, subset[0]), subset[1][labels]
    best = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
    hits = best == labels[:, None]
    beyond = Mean.of(is_unknown, is_valid)
    return {"top1": Mean.of(hits[:, 0], is_valid), "top5": Mean.of(jnp.any(hits, axis=1), is_valid), "beyond": beyond}
