"""Probes of frozen features."""

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax import config
from tinymim_jax.config import InputError
from tinymim_jax.evals.base import Batches, Predict
from tinymim_jax.tasks.base import Frozen, Variables


class Knn:
    """{"top1_k<k>"} in percent: weighted k-nearest-neighbour votes (DINO, eval_knn.py)."""

    def __init__(self, cfg: config.Knn, mesh: jax.sharding.Mesh):
        self.cfg = cfg
        self.bank = Batches(cfg.bank, cfg.batch_size, mesh)
        self.queries = Batches(cfg.data, cfg.batch_size, mesh)
        if max(cfg.k) > len(self.bank.source):
            raise InputError(f"knn: k {max(cfg.k)} is more than the {len(self.bank.source)} images of the bank")

    def __call__(self, predict: Predict, variables: Variables, frozen: Frozen) -> dict[str, float]:
        """Extracts both sets' features, then votes."""
        bank, bank_labels = extract(self.bank, predict, variables, frozen)
        queries, labels = extract(self.queries, predict, variables, frozen)
        num_classes = int(max(bank_labels.max(), labels.max())) + 1
        scores = {}
        for k in self.cfg.k:
            votes = [
                knn_predict(rows, bank, bank_labels, k, self.cfg.temperature, num_classes)
                for rows in np.array_split(queries, -(-len(queries) // 1024))
            ]
            scores[f"top1_k{k}"] = 100 * float(np.mean(np.concatenate(votes) == labels))
        return scores


class Logistic:
    """{"top1"} in percent: scikit-learn's multinomial logistic regression on standardised features."""

    def __init__(self, cfg: config.Logistic, mesh: jax.sharding.Mesh):
        self.cfg = cfg
        self.bank = Batches(cfg.bank, cfg.batch_size, mesh)
        self.queries = Batches(cfg.data, cfg.batch_size, mesh)

    def __call__(self, predict: Predict, variables: Variables, frozen: Frozen) -> dict[str, float]:
        """Extracts both sets' features, fits on one, scores the other."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        bank, bank_labels = extract(self.bank, predict, variables, frozen)
        queries, labels = extract(self.queries, predict, variables, frozen)
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=self.cfg.c, max_iter=self.cfg.max_iter))
        return {"top1": 100 * float(np.mean(classifier.fit(bank, bank_labels).predict(queries) == labels))}


def extract(batches: Batches, predict: Predict, variables: Variables, frozen: Frozen) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, D] of unit length and labels [n] of the valid examples."""
    features, labels = [], []
    for batch in batches:
        rows = np.asarray(jax.device_get(predict(variables, frozen, batch).features), np.float32)
        is_valid, batch_labels = jax.device_get(batches.whole((batch["is_valid"], batch["label"])))
        features.append(rows[is_valid])
        labels.append(batch_labels[is_valid])
    stacked = np.concatenate(features)
    return stacked / np.linalg.norm(stacked, axis=1, keepdims=True), np.concatenate(labels)


def knn_predict(
    queries: np.ndarray, bank: np.ndarray, bank_labels: np.ndarray, k: int, temperature: float, num_classes: int
) -> np.ndarray:
    """Unit queries [q, D] -> classes [q]: the k most similar of bank [n, D] vote with exp(cosine / temperature)."""
    cosine = jnp.matmul(jnp.asarray(queries), jnp.asarray(bank).T, precision="highest")
    similarity, nearest = jax.lax.top_k(cosine, k)
    votes = jax.nn.one_hot(jnp.asarray(bank_labels)[nearest], num_classes)  # [q, k, C]
    return np.asarray(
        jnp.argmax(jnp.einsum("qk,qkc->qc", jnp.exp((similarity - similarity[:, :1]) / temperature), votes), axis=1)
    )
