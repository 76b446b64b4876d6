"""How many directions features use, how long they are, and which images a model takes for alike."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.evals.analysis import Analysis, Layers, layer_names, need_images, viewers
from tinymim_jax.evals.contract import Batch, Context, Evaluator, Result, Variables
from tinymim_jax.evals.probes import stack
from tinymim_jax.models.contract import Pool
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError


@dataclasses.dataclass
class Spectrum(Analysis):
    """Effective rank (RankMe, Garrido et al. 2023) and length of each layer's features."""

    layers: Layers = "blocks"
    pool: Pool = "mean"  # of an image: the mean patch token, or the first token
    kind: Literal["spectrum"] = "spectrum"

    def build(self, context: Context) -> "Spectra":
        return Spectra(self, context)

    def metrics(self) -> list[str]:
        return ["effective_rank", "norm"]


class Spectra(Evaluator):
    """{"effective_rank", "norm"} of the last layer; arrays: of each layer, [layers]."""

    def __init__(self, cfg: Spectrum, context: Context):
        self.cfg, self.passes = cfg, {"data": cfg.batches(context)}
        self.viewer = viewers(cfg.data, context)[""]

    def update(self, variables: Variables, frozen: Any, others: Any, batch: Batch) -> Any:
        """Features [B, layers, D], mean lengths of an image's tokens [B, layers], and which are valid."""
        is_cls = self.cfg.pool == "cls"
        if is_cls and not self.viewer.model.num_prefix:
            raise InputError(f"an encoder of kind {self.viewer.model.kind!r} has no first token; set pool to 'mean'")
        layers = self.viewer.layers(variables, batch["image"], self.cfg.layers, cls=is_cls)
        tokens = [x[:, :1] if is_cls else x for x in layers]
        norms = [jnp.linalg.norm(x.astype(jnp.float32), axis=-1).mean(axis=1) for x in tokens]
        features = [x.astype(jnp.float32).mean(axis=1) for x in tokens]
        return features, jnp.stack(norms, axis=1), batch["is_valid"]

    def finish(self, found: Mapping[Hashable, list[Any]]) -> Result:
        features, norms, is_valid = jax.tree.map(lambda *parts: np.concatenate(parts), *found["data"])
        need_images("spectrum", is_valid.sum())
        ranks = np.array([effective_rank(layer[is_valid]) for layer in features])
        lengths = norms[is_valid].mean(axis=0, dtype=np.float64)
        names = layer_names(self.viewer.model, self.cfg.layers)
        arrays = {"kind": self.cfg.kind, "effective_rank": ranks, "norm": lengths, "layers": names}
        scalars = {"effective_rank": float(ranks[-1]), "norm": float(lengths[-1])}
        return Result(scalars, arrays)


def effective_rank(features: np.ndarray) -> float:
    """exp of the entropy of the singular values of features [n, D], as shares of their sum; 1 to min(n, D)."""
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


@dataclasses.dataclass
class NearestImages(Analysis):
    """The images whose features are nearest to those of some of them, by cosine."""

    queries: int = ranged(8, at_least=1)  # spread over the images
    k: int = ranged(6, at_least=1)
    kind: Literal["neighbours"] = "neighbours"

    def build(self, context: Context) -> "Nearest":
        return Nearest(self, context)

    def metrics(self) -> list[str]:
        return ["similarity"]


class Nearest(Evaluator):
    """{"similarity"}, the mean cosine of what is found; arrays: `queries`, `nearest` (pixels) and `similarity`."""

    def __init__(self, cfg: NearestImages, context: Context):
        self.cfg, self.predict, self.passes = cfg, context.predict, {"data": cfg.batches(context)}
        if (count := len(self.passes["data"].source)) <= cfg.k:
            raise InputError(f"neighbours: k {cfg.k} is not less than the {count} images; give more, or set k")

    def update(self, variables: Variables, frozen: Any, others: Any, batch: Batch) -> Any:
        return self.predict(variables, frozen, batch).features, batch["index"], batch["is_valid"]

    def finish(self, found: Mapping[Hashable, list[Any]]) -> Result:
        features, index = stack(found["data"])
        if len(features) <= self.cfg.k:
            raise InputError(f"neighbours: only {len(features)} images can be read, k is {self.cfg.k}; mend the data")
        chosen = np.linspace(0, len(features), min(self.cfg.queries, len(features)), endpoint=False).astype(int)
        cosine = features[chosen] @ features.T
        cosine[np.arange(len(chosen)), chosen] = -np.inf
        order = np.argsort(-cosine, axis=1)[:, : self.cfg.k]
        similarity = np.take_along_axis(cosine, order, axis=1)
        read = self.passes["data"].image
        arrays = {
            "kind": self.cfg.kind,
            "queries": np.stack([read(i) for i in index[chosen]]),
            "nearest": np.stack([[read(i) for i in row] for row in index[order]]),
            "similarity": similarity,
        }
        return Result({"similarity": float(similarity.mean())}, arrays)
