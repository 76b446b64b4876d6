"""How far the attention of each head reaches, and how spread it is (Dosovitskiy et al. 2021; MAE-Lite, Fig. 5)."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.evals.analysis import Analysis, need_images, viewers
from tinymim_jax.evals.contract import Batch, Context, Evaluator, Result, Variables
from tinymim_jax.models.mae import mask_by_noise
from tinymim_jax.objectives.relations import relation_logits
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError

EPSILON = 1e-6  # within the logarithm, as MAE-Lite has it (attn_analyzer.py)


@dataclasses.dataclass
class AttentionSpan(Analysis):
    """Distance in pixels and entropy in nats of each head's attention between patches; CLS is left out."""

    patch_px: float | None = ranged(None, above=0)  # a patch's side in pixels; None: the model's; MAE-Lite counts 14
    mask_ratio: float = ranged(0.0, at_least=0, below=1)  # so much of each image is hidden from the model
    kind: Literal["attention"] = "attention"

    def build(self, context: Context) -> "Spans":
        return Spans(self, context)

    def metrics(self) -> list[str]:
        return ["distance", "entropy"]


class Spans(Evaluator):
    """{"distance", "entropy"}, means over all heads; arrays: the same of each block and head, [blocks, heads]."""

    def __init__(self, cfg: AttentionSpan, context: Context):
        self.cfg, self.passes = cfg, {"data": cfg.batches(context)}
        self.viewer, model = viewers(cfg.data, context)[""], context.model
        if odd := [i for i in range(1, model.depth + 1) if model.grid_of(i) != model.grid]:
            raise InputError(f"attention: block {odd[0]} of {model.kind!r} is not between all patches; leave it out")
        self.seen = model.visible(cfg.mask_ratio)
        if cfg.mask_ratio and (model.mask_unit != model.patch_size or not self.seen):
            raise InputError(
                f"attention: the model cannot see {1 - cfg.mask_ratio:g} of its patches; set mask_ratio to 0"
            )
        self.distances = (cfg.patch_px or model.patch_size) * grid_distances(model.grid)

    def update(self, variables: Variables, frozen: Any, others: Any, batch: Batch) -> Any:
        """Sums over images of [blocks, 2, heads], and how many these are."""
        model, numbers = self.viewer.model, range(1, self.viewer.model.depth + 1)
        far, keep = jnp.asarray(self.distances, jnp.float32), None
        if self.cfg.mask_ratio:
            keys = jax.vmap(jax.random.key)(batch["index"])  # an image is hidden alike in every batch
            noise = jax.vmap(lambda key: jax.random.uniform(key, (model.grid**2,)))(keys)
            keep = mask_by_noise(noise, self.cfg.mask_ratio)[0]
            far = far[keep[:, :, None], keep[:, None, :]]
        trace = self.viewer(variables, batch["image"], numbers, keep=keep).trace
        spans = [self._span(trace[i], model.attention_bias(variables["params"], i), far) for i in numbers]
        is_valid = batch["is_valid"]
        return [jnp.where(is_valid, span, 0).sum(axis=-1) for span in spans], is_valid.sum()

    def _span(self, trace: Any, bias: jax.Array | None, far: jax.Array) -> jax.Array:
        """Distance and entropy of one block's heads, means over queries: [2, H, B]."""
        if trace.q is None:
            raise InputError(f"an encoder of kind {self.viewer.model.kind!r} has no attention between all patches")
        front = self.viewer.model.num_prefix
        logits = relation_logits(trace.q[:, front:], trace.k[:, front:])
        if bias is not None:
            logits += bias[:, front:, front:]
        shares = jax.nn.softmax(logits)
        distance = jnp.einsum("bhqk,bqk->hb", shares, jnp.broadcast_to(far, (len(shares), *far.shape[-2:])))
        entropy = -(shares * jnp.log(shares + EPSILON)).sum(axis=(2, 3)).T
        return jnp.stack([distance, entropy]) / logits.shape[2]

    def finish(self, found: Mapping[Hashable, list[Any]]) -> Result:
        sums, counts = zip(*found["data"], strict=True)
        need_images("attention", sum(counts))
        spans = [np.sum(block, axis=0) / sum(counts) for block in zip(*sums, strict=True)]  # each [2, H]
        most = max(span.shape[1] for span in spans)
        padded = [np.pad(span, ((0, 0), (0, most - span.shape[1])), constant_values=np.nan) for span in spans]
        distance, entropy = np.stack(padded, axis=1)
        arrays = {
            "kind": self.cfg.kind,
            "distance": distance,
            "entropy": entropy,
            "blocks": range(1, len(spans) + 1),
            "uniform_distance": self._uniform_distance(),
            "uniform_entropy": np.log(self.seen),
        }
        scalars = {"distance": float(np.nanmean(distance)), "entropy": float(np.nanmean(entropy))}
        return Result(scalars, arrays)

    def _uniform_distance(self) -> float:
        """Of attention that is the same everywhere: to any of the patches that are seen, itself among them."""
        patches = len(self.distances)
        between_two = self.distances.sum() / max(patches * (patches - 1), 1)
        return between_two * (self.seen - 1) / self.seen


def grid_distances(grid: int) -> np.ndarray:
    """Between any two of grid x grid patches, in patches: [L, L]."""
    places = np.stack(np.divmod(np.arange(grid**2), grid), axis=1)
    return np.linalg.norm(places[:, None] - places[None], axis=2)
