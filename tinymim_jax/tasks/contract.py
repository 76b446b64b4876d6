"""The contract between a task and the one loop."""

from collections.abc import Mapping
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from tinymim_jax.experiment import config
from tinymim_jax.models import vit
from tinymim_jax.objectives.metrics import Mean

Params = Any  # nested dict of arrays
Variables = Mapping[str, Any]  # {"params": Params, other collections}
Frozen = Any  # arrays the loss reads and nothing trains: the teacher
# image uint8 [B, S, S, 3], label int32 [B], is_valid bool [B], index int32 [B]; to train, stop bool [B]
Batch = Mapping[str, jax.Array]
Rngs = Mapping[str, jax.Array]  # one key per name in STREAMS

STREAMS = ("mask", "augment", "drop_path")


@flax.struct.dataclass
class Aux:
    """What a loss returns beside its value."""

    metrics: dict[str, Mean]
    model_state: Any  # the collections other than params, updated


@flax.struct.dataclass
class Outputs:
    """What evaluators read: features [B, D] of frozen-feature probes, logits [B, C] if there is a head."""

    features: jax.Array
    logits: jax.Array | None = None


class Task(Protocol):
    """All that differs between pre-training, distillation and fine-tuning."""

    untrained: tuple[str, ...]
    """Regexes of fixed positions and of the parameters that the loss does not read: kept as they are, undecayed."""

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Variables, Frozen]:
        """Fresh variables and frozen arrays."""

    def loss(
        self, params: Params, model_state: Any, frozen: Frozen, batch: Batch, rngs: Rngs, *, train: bool
    ) -> tuple[jax.Array, Aux]:
        """The scalar to minimise, a mean over the valid images."""

    def predict(self, variables: Variables, frozen: Frozen, batch: Batch) -> Outputs:
        """Features and logits, without augmentation."""

    def flops_per_image(self) -> float:
        """Matmul FLOPs of one training step, for one image (`models.flops`)."""


def encode(cfg: config.ViT, variables: Variables, images: jax.Array, block: int | None = None) -> Outputs:
    """What evaluators read of the ViT `encoder` in `variables`, for normalised images [B, S, S, 3].

    Features are the mean patch token, or CLS for a classifier on CLS: of the last block (normed if pool is "cls"), or
    as they leave `block`, and then there are no logits.
    """
    encoder = {**variables, "params": variables["params"]["encoder"]}
    out = vit.build(cfg).apply(encoder, images, capture=() if block is None else (block,))
    tokens = (out.tokens if block is None else out.trace[block].out).astype(jnp.float32)
    is_on_cls = cfg.num_classes and cfg.pool == "cls"
    features = tokens[:, 0] if is_on_cls else tokens[:, vit.num_extra(cfg) :].mean(axis=1)
    return Outputs(features, out.logits if block is None else None)
