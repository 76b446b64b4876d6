"""What tasks that restore pixels have to show."""

import jax
import numpy as np

from tinymim_jax.data.config import Data
from tinymim_jax.models.layers import patchify, unpatchify

GREY = 0.5  # of hidden patches
NOT_PREDICTED = "each reconstructed patch was given its true mean and contrast, which are not predicted"


def restored(
    images: np.ndarray, pred: jax.Array, is_masked: jax.Array, data: Data, *, norm_pix_loss: bool
) -> dict[str, np.ndarray]:
    """What was seen of images [B, S, S, 3] in [0, 1] and, by pred [B, L, P], what was made of it; is_masked [B, L]."""
    patch = images.shape[1] // round(pred.shape[1] ** 0.5)
    pixels, hidden, pred = np.asarray(patchify(images, patch)), np.asarray(is_masked)[..., None], np.asarray(pred)
    if norm_pix_loss:
        pred = pred * pixels.std(axis=-1, ddof=1, keepdims=True) + pixels.mean(axis=-1, keepdims=True)
    else:
        pred = pred * np.tile(data.std, patch**2) + np.tile(data.mean, patch**2)
    columns = {"masked": np.where(hidden, GREY, pixels), "reconstructed": np.where(hidden, pred, pixels)}
    return {name: np.asarray(unpatchify(column, patch)).clip(0, 1) for name, column in columns.items()}
