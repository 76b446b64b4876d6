"""Supervised training: fine-tuning, training from scratch, and (with a freeze rule) linear probing."""

from typing import Any

import jax
import jax.numpy as jnp

from tinymim_jax import config
from tinymim_jax.data.device_augment import mix, normalize, random_erasing, to_float
from tinymim_jax.metrics import Mean
from tinymim_jax.models import flops, vit
from tinymim_jax.objectives import losses
from tinymim_jax.tasks.base import Aux, Batch, Frozen, Outputs, Params, Rngs, Variables


class Classify:
    """Parameters: `encoder`, a ViT with a head."""

    def __init__(self, stage: config.Stage):
        self.cfg, self.task, self.data = stage.model, stage.task, stage.data
        self.model = vit.build(stage.model)
        self.untrained = ("encoder/pos_embed",) if stage.model.posembed == "fixed" else ()

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Variables, Frozen]:
        return {"params": {"encoder": self.model.init(rng, self._clean(batch))["params"]}}, {}

    def _clean(self, batch: Batch) -> jax.Array:
        return normalize(to_float(batch["image"]), self.data.mean, self.data.std)

    def _augmented(self, batch: Batch, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images erased, then mixed, with their soft labels [B, C]; one whose partner is unreadable stays itself."""
        erase_rng, mix_rng = jax.random.split(rng)
        targets = losses.smooth_one_hot(batch["label"], self.cfg.num_classes, self.task.label_smoothing)
        images = random_erasing(erase_rng, self._clean(batch), self.task.erasing)
        if self.task.mix_prob and (self.task.mixup or self.task.cutmix):
            images, targets = (replace_by_partner(x, batch["is_valid"]) for x in (images, targets))
        return mix(mix_rng, images, targets, self.task)

    def loss(
        self, params: Params, model_state: Any, frozen: Frozen, batch: Batch, rngs: Rngs, *, train: bool
    ) -> tuple[jax.Array, Aux]:
        if train:
            images, targets = self._augmented(batch, rngs["augment"])
        else:
            images, targets = self._clean(batch), jax.nn.one_hot(batch["label"], self.cfg.num_classes)
        out = self.model.apply(
            {"params": params["encoder"]}, images, train=train, rngs={"drop_path": rngs["drop_path"]}
        )
        loss = Mean.of(losses.soft_cross_entropy(out.logits, targets), batch["is_valid"])
        beyond = Mean.of(jnp.sum(batch["label"] >= self.cfg.num_classes))
        return loss.value(), Aux({"loss": loss, "labels_beyond_head": beyond}, model_state)

    def predict(self, variables: Variables, frozen: Frozen, batch: Batch) -> Outputs:
        """Features: mean patch token, or CLS, as the head pools."""
        out = self.model.apply({"params": variables["params"]["encoder"]}, self._clean(batch))
        features = (
            out.tokens[:, vit.num_extra(self.cfg) :].mean(axis=1) if self.cfg.pool == "mean" else out.tokens[:, 0]
        )
        return Outputs(features, out.logits)

    def flops_per_image(self) -> float:
        return flops.forward_backward(self.cfg)


def replace_by_partner(values: jax.Array, is_valid: jax.Array) -> jax.Array:
    """values [B, ...] where is_valid [B], elsewhere those of the row that the flipped batch pairs with it."""
    return jnp.where(is_valid.reshape(-1, *[1] * (values.ndim - 1)), values, values[::-1])
