"""Masked auto-encoding: reconstruct the patches that the encoder did not see."""

from typing import Any

import jax

from tinymim_jax.data.device_augment import normalize, to_float
from tinymim_jax.experiment import config
from tinymim_jax.models import flops, mae
from tinymim_jax.models.layers import patchify
from tinymim_jax.objectives import losses
from tinymim_jax.objectives.metrics import Mean
from tinymim_jax.tasks.contract import Aux, Batch, Frozen, Outputs, Params, Rngs, Variables, encode


class Mae:
    """Parameters: `encoder` (a ViT) and `decoder`."""

    untrained = ("decoder/pos_embed",)

    def __init__(self, stage: config.Stage):
        self.cfg, self.task, self.data = stage.model, stage.task, stage.data
        self.model = mae.build(stage.model, stage.task)
        if stage.model.posembed == "fixed":
            self.untrained = ("(encoder|decoder)/pos_embed",)

    def _images(self, batch: Batch) -> jax.Array:
        return normalize(to_float(batch["image"]), self.data.mean, self.data.std)

    def _noise(self, rng: jax.Array, batch: Batch) -> jax.Array:
        return jax.random.uniform(rng, (len(batch["image"]), flops.num_tokens(self.cfg) - 1))

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Variables, Frozen]:
        return self.model.init(rng, self._images(batch), self._noise(rng, batch)), {}

    def reconstruct(self, params: Params, batch: Batch, rngs: Rngs, *, train: bool) -> tuple[mae.MAEOutput, jax.Array]:
        """The model's output and its target [B, L, P]."""
        images = self._images(batch)
        noise = self._noise(rngs["mask"], batch)
        out = self.model.apply({"params": params}, images, noise, train=train, rngs={"drop_path": rngs["drop_path"]})
        target = patchify(images, self.cfg.patch_size)
        return out, losses.normalize_patches(target) if self.task.norm_pix_loss else target

    def loss(
        self, params: Params, model_state: Any, frozen: Frozen, batch: Batch, rngs: Rngs, *, train: bool
    ) -> tuple[jax.Array, Aux]:
        out, target = self.reconstruct(params, batch, rngs, train=train)
        loss = Mean.of(losses.masked_mse(out.pred, target, out.is_masked), batch["is_valid"])
        return loss.value(), Aux({"loss": loss}, model_state)

    def predict(self, variables: Variables, frozen: Frozen, batch: Batch) -> Outputs:
        return encode(self.cfg, variables, self._images(batch))

    def flops_per_image(self) -> float:
        patches, dec = flops.num_tokens(self.cfg) - 1, self.task.decoder
        visible = int(patches * (1 - self.task.mask_ratio)) + 1
        decoder = config.ViT(dec.width, dec.depth, dec.num_heads)
        blocks = flops.forward(decoder, tokens=patches + 1) - flops.embed(decoder, patches + 1)
        ends = 2.0 * dec.width * (visible * self.cfg.width + patches * 3 * self.cfg.patch_size**2)
        return flops.forward_backward(self.cfg, tokens=visible) + 3 * (blocks + ends)
