"""TinyMIM in JAX: distil a large masked-image-modelling ViT into a small one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import flax.linen

__version__ = "0.2.0"


def load(path: str | Path) -> tuple["flax.linen.Module", dict[str, Any]]:
    """The trained encoder in a stage's folder, as (model, variables).

    `model.apply(variables, images, capture=(12,))` takes float32 [B, H, W, 3], normalised, and returns
    `tokens` [B, N, D], `trace[12].q` [B, N, H, E], and `logits` [B, C] if the model has a head.
    Raises `runtime.errors.InputError` if `path` is not the folder of a finished stage.
    """
    from tinymim_jax.experiment import stage_file  # jax and orbax are imported when first needed

    return stage_file.load(path)
