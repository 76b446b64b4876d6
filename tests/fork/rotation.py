"""A fork's task, whole: which of four ways is up (Gidaris et al. 2018). It becomes tinymim_jax/tasks/rotation.py."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tinymim_jax.models.contract import Encoder
from tinymim_jax.objectives.metrics import Mean
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.tasks.contract import Aux, Batch, Context, Panels, Rngs, Task, TaskConfig


@dataclasses.dataclass
class Rotation(TaskConfig):
    """Images are turned by a multiple of 90 degrees, and a linear head says by which."""

    turns: int = ranged(4, at_least=2, at_most=4)
    kind: Literal["rotation"] = "rotation"

    def build(self, context: Context) -> "RotationTask":
        return RotationTask(self, context)

    def summary(self) -> str:
        return "rotation prediction"

    def check(self, where: str, model: Encoder) -> None:
        pass


class RotationTask(Task):
    """Parameters: `encoder` and `pretext/head`."""

    def __init__(self, cfg: Rotation, context: Context):
        super().__init__(context)
        self.task, self.head = cfg, nn.Dense(cfg.turns)

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Any, Any]:
        out, encoder = self.model.init_with_output(rng, self.images(batch))
        head = self.head.init(jax.random.fold_in(rng, 1), out.tokens.mean(axis=1))
        return {"params": {"encoder": encoder["params"], "pretext": {"head": head["params"]}}}, {}

    def _logits(self, params: Any, images: jax.Array, **apply: Any) -> jax.Array:
        tokens = self.model.apply({"params": params["encoder"]}, images, **apply).tokens
        return self.head.apply({"params": params["pretext"]["head"]}, tokens.mean(axis=1))

    def loss(self, params: Any, model_state: Any, frozen: Any, batch: Batch, rngs: Rngs, *, train: bool) -> Any:
        images = self.images(batch)
        turns = jax.random.randint(rngs["augment"], (len(images),), 0, self.task.turns)
        turned = jnp.stack([jnp.rot90(images, k, axes=(1, 2)) for k in range(self.task.turns)])
        logits = self._logits(
            params, turned[turns, jnp.arange(len(images))], train=train, rngs={"drop_path": rngs["drop_path"]}
        )
        values = optax.softmax_cross_entropy(logits, jax.nn.one_hot(turns, self.task.turns))
        loss = Mean.of(values, batch["is_valid"])
        hits = Mean.of(jnp.argmax(logits, axis=-1) == turns, batch["is_valid"])
        return loss.value(), Aux({"loss": loss, "accuracy": hits}, model_state)

    def flops_per_image(self) -> float:
        return self.cfg.train_flops() + 6.0 * self.cfg.width_of(self.cfg.depth) * self.task.turns

    def panels(self, variables: Any, frozen: Any, batch: Batch, rngs: Rngs) -> Panels:
        images = self.images(batch)
        rows = [[np.asarray(jnp.rot90(x, k) / 255.0) for x in batch["image"]] for k in range(self.task.turns)]
        said = jnp.argmax(self._logits(variables["params"], images), axis=-1)
        return Panels("turned images", rows, [f"{90 * k}" for k in range(self.task.turns)], [f"says {k}" for k in said])
