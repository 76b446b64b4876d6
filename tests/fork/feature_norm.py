"""A fork's evaluator, whole: how long features are. It becomes tinymim_jax/evals/feature_norm.py."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import jax.numpy as jnp

from tinymim_jax.data.config import Data
from tinymim_jax.evals.contract import Batch, Batches, Context, Eval, Result, Variables
from tinymim_jax.objectives.metrics import Mean, merge, to_floats
from tinymim_jax.runtime.codec import ranged


@dataclasses.dataclass
class FeatureNorm(Eval):
    """The mean length of the features that probes read."""

    data: Data
    batch_size: int = ranged(256, at_least=1)
    kind: Literal["feature_norm"] = "feature_norm"

    def build(self, context: Context) -> "Norms":
        return Norms(self, context)

    def metrics(self) -> list[str]:
        return ["norm"]


class Norms:
    """{"norm"}, over all images."""

    others: Mapping[str, Variables] = {}

    def __init__(self, cfg: FeatureNorm, context: Context):
        self.predict = context.predict
        self.passes = {"data": Batches(cfg.data, cfg.batch_size, context.mesh)}

    def update(self, variables: Variables, frozen: Any, others: Mapping[str, Variables], batch: Batch) -> Mean:
        features = self.predict(variables, frozen, batch).features
        return Mean.of(jnp.linalg.norm(features, axis=-1), batch["is_valid"])

    def finish(self, found: Mapping[Hashable, list[Any]]) -> Result:
        return Result(to_floats(merge({"norm": one} for one in found["data"])))
