"""The contract between a task and the one loop."""

from collections.abc import Mapping
from typing import Any, Protocol

import flax.struct
import jax

from tinymim_jax.metrics import Mean

Params = Any  # nested dict of arrays
Variables = Mapping[str, Any]  # {"params": Params, other collections}
Frozen = Any  # arrays the loss reads and nothing trains: the teacher
Batch = Mapping[str, jax.Array]  # image uint8 [B, S, S, 3], label int32 [B], is_valid bool [B], index int32 [B]
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
