"""Probes of frozen features."""

import abc
import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.data.config import Data
from tinymim_jax.evals.contract import Batch, Batches, Context, Eval, Evaluator, Result, Variables
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError

QUERIES_AT_ONCE = 1024
Labelled = tuple[np.ndarray, np.ndarray]  # unit features [n, D], labels [n]


class Probe(Eval):
    """An eval that learns from one labelled set and is scored on another."""

    bank: Data

    def sets(self) -> dict[str, Data]:
        return {"data": self.data, "bank": self.bank}

    def same_classes(self, training: Data | None) -> list[tuple[Data, Data]]:
        return [(self.bank, self.data)]


@dataclasses.dataclass
class Knn(Probe):
    """Weighted k-nearest-neighbour accuracy of frozen features, in percent."""

    data: Data  # the queries
    bank: Data  # the labelled neighbours
    kind: Literal["knn"] = "knn"
    k: tuple[int, ...] = ranged((10, 20, 100, 200), at_least=1)
    temperature: float = ranged(0.07, above=0)
    batch_size: int = ranged(256, at_least=1)

    def build(self, context: Context) -> "Neighbours":
        return Neighbours(self, context)

    def metrics(self) -> list[str]:
        return [f"top1_k{k}" for k in self.k]


@dataclasses.dataclass
class Logistic(Probe):
    """Accuracy of a logistic regression on frozen features, in percent."""

    data: Data  # the queries
    bank: Data  # what it is fitted on
    kind: Literal["logistic"] = "logistic"
    c: float = ranged(1.0, above=0)  # inverse of the L2 regularisation
    max_iter: int = ranged(1000, at_least=1)
    batch_size: int = ranged(256, at_least=1)

    def build(self, context: Context) -> "Regression":
        return Regression(self, context)

    def metrics(self) -> list[str]:
        return ["top1"]


class FeatureEvaluator(Evaluator):
    """Features of both sets; `score` says what is made of them."""

    def __init__(self, cfg: Any, context: Context):
        self.cfg, self.predict = cfg, context.predict
        self.passes = {name: Batches(data, cfg.batch_size, context.mesh) for name, data in cfg.sets().items()}

    def update(self, variables: Variables, frozen: Any, others: Any, batch: Batch) -> tuple[jax.Array, ...]:
        """Features, labels and validity of each image."""
        return self.predict(variables, frozen, batch).features, batch["label"], batch["is_valid"]

    def finish(self, found: Mapping[Hashable, list[Any]]) -> Result:
        return Result(self.score(stack(found["bank"]), stack(found["data"])))

    @abc.abstractmethod
    def score(self, bank: Labelled, queries: Labelled) -> dict[str, float]:
        """Results of one probe, in percent."""


class Neighbours(FeatureEvaluator):
    """{"top1_k<k>"} in percent: weighted k-nearest-neighbour votes (DINO, eval_knn.py)."""

    def __init__(self, cfg: Knn, context: Context):
        super().__init__(cfg, context)
        images = len(self.passes["bank"].source)
        if not cfg.k or max(cfg.k) > images:
            raise InputError(f"knn: k {max(cfg.k, default='()')} is not among the {images} images of the bank")

    def score(self, bank: Labelled, queries: Labelled) -> dict[str, float]:
        if len(bank[0]) < max(self.cfg.k):
            raise InputError(
                f"knn: k {max(self.cfg.k)} is more than the {len(bank[0])} images of the bank that can be read"
            )
        num_classes = int(max(bank[1].max(), queries[1].max())) + 1
        vectors, labels = jnp.asarray(bank[0]), jnp.asarray(bank[1])  # on the device once
        hits = dict.fromkeys(self.cfg.k, 0)
        for start in range(0, len(queries[0]), QUERIES_AT_ONCE):
            rows, truth = (part[start : start + QUERIES_AT_ONCE] for part in queries)
            for k, votes in knn_predict(rows, vectors, labels, self.cfg.k, self.cfg.temperature, num_classes).items():
                hits[k] += int(np.sum(votes == truth))
        return {f"top1_k{k}": 100 * count / len(queries[1]) for k, count in hits.items()}


class Regression(FeatureEvaluator):
    """{"top1"} in percent: scikit-learn's multinomial logistic regression on standardised features."""

    def score(self, bank: Labelled, queries: Labelled) -> dict[str, float]:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        if len(np.unique(bank[1])) < 2:
            raise InputError("logistic: the images to fit on are all of one class; a classifier needs two")
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=self.cfg.c, max_iter=self.cfg.max_iter))
        return {"top1": 100 * float(np.mean(classifier.fit(*bank).predict(queries[0]) == queries[1]))}


def stack(found: list[tuple[np.ndarray, ...]]) -> Labelled:
    """Features [n, D] of unit length and labels [n] of the valid examples."""
    features, labels, is_valid = (np.concatenate(parts) for parts in zip(*found, strict=True))
    if not is_valid.any():
        raise InputError("no image of a set could be read; mend the data")
    features = features[is_valid].astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True), labels[is_valid]


def knn_predict(
    queries: np.ndarray, bank: jax.Array, bank_labels: jax.Array, ks: tuple[int, ...], temperature: float, classes: int
) -> dict[int, np.ndarray]:
    """Unit queries [q, D] -> for each k classes [q]: the k most similar of bank [n, D] vote.

    A vote weighs exp(cosine / temperature).
    """
    cosine = jnp.matmul(jnp.asarray(queries), jnp.asarray(bank).T, precision="highest")
    similarity, nearest = jax.lax.top_k(cosine, max(ks))
    weights = jnp.exp((similarity - similarity[:, :1]) / temperature)
    labels, rows = jnp.asarray(bank_labels)[nearest], jnp.arange(len(queries))[:, None]
    votes = {k: jnp.zeros((len(queries), classes)).at[rows, labels[:, :k]].add(weights[:, :k]) for k in ks}
    return {k: np.asarray(jnp.argmax(sums, axis=1)) for k, sums in votes.items()}
