"""Masked auto-encoding: reconstruct the patches that the encoder did not see (He et al. 2022)."""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np

from tinymim_jax.data.device_augment import to_float
from tinymim_jax.models.contract import Encoder
from tinymim_jax.models.layers import patchify
from tinymim_jax.models.mae import Decoder, mask_by_noise
from tinymim_jax.objectives import losses
from tinymim_jax.objectives.metrics import Mean
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.tasks.contract import Aux, Batch, Context, Frozen, Panels, Params, Rngs, Task, TaskConfig, Variables
from tinymim_jax.tasks.pictures import NOT_PREDICTED, restored
from tinymim_jax.weights.parameters import matches


@dataclasses.dataclass
class Mae(TaskConfig):
    """Masked auto-encoding (He et al. 2022)."""

    decoder: Decoder = dataclasses.field(default_factory=Decoder)
    mask_ratio: float = ranged(0.75, above=0, below=1)
    norm_pix_loss: bool = True  # the target is each patch, normalised
    kind: Literal["mae"] = "mae"

    def build(self, context: Context) -> "MaeTask":
        return MaeTask(self, context)

    def summary(self) -> str:
        return "MAE pre-training"

    def check(self, where: str, model: Encoder) -> None:
        model.check_masked(where)
        self.decoder.check(f"{where}.decoder", model)

    def reconstruction(self) -> "Mae":
        return self


class MaeTask(Task):
    """Parameters: `encoder` and, for this task alone, `pretext/decoder`."""

    def __init__(self, cfg: Mae, context: Context):
        super().__init__(context)
        self.task, self.decoder = cfg, cfg.decoder.build(context.model)

    def is_untrained(self, name: str) -> bool:
        fixed = [f"pretext/decoder/{own}" for own in self.task.decoder.fixed]
        return matches(fixed, name) or super().is_untrained(name)

    def _noise(self, rng: jax.Array, batch: Batch) -> jax.Array:
        return jax.random.uniform(rng, (len(batch["image"]), self.cfg.units))

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Variables, Frozen]:
        encoder_rng, decoder_rng = jax.random.split(rng)
        images = self.images(batch)
        keep, restore, _ = mask_by_noise(self._noise(rng, batch), self.task.mask_ratio, self.cfg.unit)
        out, encoder = self.model.init_with_output(encoder_rng, images, keep=keep)
        decoder = self.decoder.init(decoder_rng, out.tokens, restore)
        return {"params": {"encoder": encoder["params"], "pretext": {"decoder": decoder["params"]}}}, {}

    def reconstruct(
        self, params: Params, images: jax.Array, noise: jax.Array, **train: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Normalised images and noise [B, U] -> pred [B, L, P] of every patch; is_masked [B, L], True where hidden."""
        keep, restore, is_masked = mask_by_noise(noise, self.task.mask_ratio, self.cfg.unit)
        tokens = self.model.apply({"params": params["encoder"]}, images, keep=keep, **train).tokens
        return self.decoder.apply({"params": params["pretext"]["decoder"]}, tokens, restore), is_masked

    def loss(
        self, params: Params, model_state: Any, frozen: Frozen, batch: Batch, rngs: Rngs, *, train: bool
    ) -> tuple[jax.Array, Aux]:
        images, drop = self.images(batch), {"drop_path": rngs["drop_path"]}
        pred, is_masked = self.reconstruct(params, images, self._noise(rngs["mask"], batch), train=train, rngs=drop)
        patches = patchify(images, self.cfg.patch_size)
        values = losses.reconstruction(pred, patches, is_masked, norm_pix_loss=self.task.norm_pix_loss)
        loss = Mean.of(values, batch["is_valid"])
        return loss.value(), Aux({"loss": loss}, model_state)

    def flops_per_image(self) -> float:
        visible = self.cfg.visible(self.task.mask_ratio)
        return self.cfg.train_flops(visible) + 3 * self.task.decoder.flops(self.cfg, visible)

    def panels(self, variables: Variables, frozen: Frozen, batch: Batch, rngs: Rngs) -> Panels:
        """Original, masked and reconstructed images, a row each."""
        images, noise = np.asarray(to_float(batch["image"])), self._noise(rngs["mask"], batch)
        made = jax.jit(self.reconstruct)(variables["params"], self.images(batch), noise)
        columns = {"original": images, **restored(images, *made, self.data, norm_pix_loss=self.task.norm_pix_loss)}
        title = f"{self.task.mask_ratio:.0%} of the patches masked"
        title += f"\n{NOT_PREDICTED}" if self.task.norm_pix_loss else ""
        return Panels(title, [list(column) for column in columns.values()], list(columns))
