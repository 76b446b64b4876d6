"""Top-1 and top-5 accuracy with exact counts."""

import jax
import jax.numpy as jnp

from tinymim_jax import config, metrics
from tinymim_jax.config import InputError
from tinymim_jax.evals import subsets
from tinymim_jax.evals.base import Batches, Predict
from tinymim_jax.metrics import Mean
from tinymim_jax.tasks.base import Frozen, Variables


class Classification:
    """{"top1", "top5"} in percent and {"images"}, the number counted."""

    def __init__(self, cfg: config.Classification, mesh: jax.sharding.Mesh):
        self.batches = Batches(cfg.data, cfg.batch_size, mesh)
        self.columns, self.targets = None, None  # all classes, labelled by column
        if cfg.subset:
            self.columns = subsets.columns(cfg.subset)
            self.targets = subsets.targets(cfg.subset, self.batches.source.classes)

    def __call__(self, predict: Predict, variables: Variables, frozen: Frozen) -> dict[str, float]:
        """Raises InputError if the model has no head, or fewer outputs than there are labels."""
        counts = []
        for batch in self.batches:
            logits = predict(variables, frozen, batch).logits
            if logits is None:
                raise InputError("a classification eval needs a model with a head; set model.num_classes")
            labels = batch["label"] if self.targets is None else jnp.asarray(self.targets)[batch["label"]]
            if self.columns is not None:
                logits = restrict(logits, jnp.asarray(self.columns))
            counts.append(jax.device_get(count_correct(logits, labels, batch["is_valid"])))
        total = metrics.merge(counts)
        if total["beyond"].sum:
            raise InputError(f"the data has labels that the model's {logits.shape[-1]} outputs leave no place for")
        scores = {name: 100 * value for name, value in metrics.to_floats(total).items() if name != "beyond"}
        return {**scores, "images": float(total["top1"].count)}


def restrict(logits: jax.Array, columns: jax.Array) -> jax.Array:
    """logits [B, C] with -inf outside `columns`."""
    allowed = jnp.zeros(logits.shape[-1], bool).at[columns].set(True)
    return jnp.where(allowed, logits, -jnp.inf)


@jax.jit
def count_correct(logits: jax.Array, labels: jax.Array, is_valid: jax.Array) -> dict[str, Mean]:
    """logits [B, C], labels [B] -> hits among the best 1 and the best 5, over the valid examples."""
    best = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
    hits = best == labels[:, None]
    beyond = Mean.of(labels >= logits.shape[-1], is_valid)
    return {"top1": Mean.of(hits[:, 0], is_valid), "top5": Mean.of(jnp.any(hits, axis=1), is_valid), "beyond": beyond}
