"""TinyMIM in JAX: distil a large masked-image-modelling ViT into a small one."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinymim_jax.evals.inference import TrainedModel

__version__ = "0.2.0"


def load(path: str | Path) -> "TrainedModel":
    """The trained encoder in a folder of a stage, of one of its replicas or of a converted checkpoint.

    It takes images as they come, and knows how they are made (`model.preprocess`) and its `model.classes`:

        model = tinymim_jax.load("runs/own/finetune")
        out = model(["a.jpg", PIL.Image.open("b.png"), array], capture=(12,))  # array: uint8 or in [0, 1], [H, W, 3]
        out.logits  # [B, C], of a model with a head; out.tokens [B, N, D]; out.trace[12].q [B, N, H, E]
        names, features = model.features("photos")  # of a whole folder, [n, D]

    or is Flax's module with its variables, for images float32 [B, S, S, 3] that are normalised already:

        module, variables = model
        out = module.apply(variables, model.preprocess(images), capture=(12,))

    Raises `runtime.errors.InputError` if `path` is not the folder of a finished stage.
    """
    from tinymim_jax.experiment import stage_file  # jax and orbax are imported when first needed

    return stage_file.load(path)
