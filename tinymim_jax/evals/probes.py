"""Probes of frozen features."""

import abc
from collections.abc import Generator

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.evals.contract import Batches, Fetched, Finish, Predict
from tinymim_jax.experiment import config
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import Frozen, Variables

QUERIES_AT_ONCE = 1024
Labelled = tuple[np.ndarray, np.ndarray]  # unit features [n, D], labels [n]


class Probe(abc.ABC):
    """Features of two labelled sets, one to learn from and one to score on; `score` says how."""

    def __init__(self, cfg: config.Knn | config.Logistic, mesh: jax.sharding.Mesh):
        self.cfg = cfg
        self.bank = Batches(cfg.bank, cfg.batch_size, mesh)
        self.queries = Batches(cfg.data, cfg.batch_size, mesh)

    @property
    def num_batches(self) -> int:
        return len(self.bank) + len(self.queries)

    def __call__(self, predict: Predict, variables: Variables, frozen: Frozen) -> Generator[None, None, Finish]:
        """Extracts both sets' features; what is left is `score`."""
        bank = yield from extract(self.bank, predict, variables, frozen)
        queries = yield from extract(self.queries, predict, variables, frozen)
        return lambda: self.score(stack(bank), stack(queries))

    @abc.abstractmethod
    def score(self, bank: Labelled, queries: Labelled) -> dict[str, float]:
        """Results of one probe, in percent."""


class Knn(Probe):
    """{"top1_k<k>"} in percent: weighted k-nearest-neighbour votes (DINO, eval_knn.py)."""

    def __init__(self, cfg: config.Knn, mesh: jax.sharding.Mesh):
        super().__init__(cfg, mesh)
        if max(cfg.k) > len(self.bank.source):
            raise InputError(f"knn: k {max(cfg.k)} is more than the {len(self.bank.source)} images of the bank")

    def score(self, bank: Labelled, queries: Labelled) -> dict[str, float]:
        num_classes = int(max(bank[1].max(), queries[1].max())) + 1
        vectors, labels = jnp.asarray(bank[0]), jnp.asarray(bank[1])  # on the device once
        hits = dict.fromkeys(self.cfg.k, 0)
        for start in range(0, len(queries[0]), QUERIES_AT_ONCE):
            rows, truth = (part[start : start + QUERIES_AT_ONCE] for part in queries)
            for k, votes in knn_predict(rows, vectors, labels, self.cfg.k, self.cfg.temperature, num_classes).items():
                hits[k] += int(np.sum(votes == truth))
        return {f"top1_k{k}": 100 * count / len(queries[1]) for k, count in hits.items()}


class Logistic(Probe):
    """{"top1"} in percent: scikit-learn's multinomial logistic regression on standardised features."""

    def score(self, bank: Labelled, queries: Labelled) -> dict[str, float]:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        if len(np.unique(bank[1])) < 2:
            raise InputError("logistic: the images to fit on are all of one class; a classifier needs two")
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=self.cfg.c, max_iter=self.cfg.max_iter))
        return {"top1": 100 * float(np.mean(classifier.fit(*bank).predict(queries[0]) == queries[1]))}


def extract(batches: Batches, predict: Predict, variables: Variables, frozen: Frozen) -> Generator[None, None, Fetched]:
    """Features, labels and validity of each batch, for `stack`."""
    found = Fetched()
    for batch in batches:
        features = predict(variables, frozen, batch).features
        found.add((features, *batches.whole((batch["label"], batch["is_valid"]))))
        yield
    return found


def stack(found: Fetched) -> Labelled:
    """Features [n, D] of unit length and labels [n] of the valid examples."""
    features, labels, is_valid = (np.concatenate(parts) for parts in zip(*found.all(), strict=True))
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
