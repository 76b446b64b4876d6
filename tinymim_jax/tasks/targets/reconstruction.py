"""The pixels of the patches that are hidden, restored by MAE's decoder (TinyMIM Tables 5 and 12; D-MAE, D2-MAE)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.data.config import Data
from tinymim_jax.models.contract import Encoder
from tinymim_jax.models.layers import patchify
from tinymim_jax.models.mae import Decoder
from tinymim_jax.objectives import losses
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.pictures import restored
from tinymim_jax.tasks.targets.contract import Captures, Pass, Target, TargetLoss


@dataclasses.dataclass
class Reconstruction(Target):
    """MAE's loss: nothing of the teacher is read, and what the student sees is masked."""

    student_block: int = ranged(12, at_least=1)  # that the decoder reads, behind the encoder's norm, from 1
    decoder: Decoder = dataclasses.field(default_factory=Decoder)
    norm_pix_loss: bool = True  # what is restored is each patch, normalised
    weight: float = ranged(1.0, above=0)
    kind: Literal["reconstruction"] = "reconstruction"

    needs_mask: ClassVar[bool] = True

    def captures(self) -> tuple[Captures, Captures]:
        return Captures(), Captures((self.student_block,), normed=(self.student_block,))

    def build(self, where: str, teacher: Encoder, student: Encoder) -> "ReconstructionLoss":
        return ReconstructionLoss(self, where, teacher, student)

    def summary(self, teacher: Encoder) -> str:
        return f"reconstruction of pixels from the student's block {self.student_block}"


class ReconstructionLoss(TargetLoss):
    """`Reconstruction` by one student; its parameters are the decoder's."""

    def __init__(self, cfg: Reconstruction, where: str, teacher: Encoder, student: Encoder):
        super().__init__(cfg, teacher, student)
        if student.mask_unit is None:
            raise InputError(f"{where}: a decoder restores hidden patches, and this encoder's cannot be masked")
        cfg.decoder.check(f"{where}.decoder", student)
        self.decoder, self.fixed = cfg.decoder.build(student), cfg.decoder.fixed

    def init(self, rng: jax.Array) -> Any:
        patches, width = self.student.grid**2, self.student.width_of(self.cfg.student_block)
        tokens = jnp.zeros((1, self.student.num_prefix + patches, width), jnp.dtype(self.student.dtype))
        return self.decoder.init(rng, tokens, jnp.arange(patches)[None])["params"]

    def _restore(self, params: Any, student: Pass) -> jax.Array:
        return self.decoder.apply({"params": params}, student[self.cfg.student_block].normed, student.restore)

    def loss(self, params: Any, teacher: Pass, student: Pass) -> dict[str, jax.Array]:
        pred = self._restore(params, student)
        patches, normalised = patchify(student.images, self.student.patch_size), self.cfg.norm_pix_loss
        return {"reconstruction": losses.reconstruction(pred, patches, student.is_masked, norm_pix_loss=normalised)}

    def pictures(self, params: Any, student: Pass, images: np.ndarray, data: Data) -> dict[str, np.ndarray]:
        """Masked and reconstructed."""
        pred = self._restore(params, student)
        return restored(images, pred, student.is_masked, data, norm_pix_loss=self.cfg.norm_pix_loss)

    def flops(self, patches: int) -> float:
        return 3 * self.cfg.decoder.flops(self.student, patches)
