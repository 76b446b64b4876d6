"""What analyses of representations share: which images they look at, and an encoder's layers."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from tinymim_jax.data.config import Data
from tinymim_jax.data.device_augment import normalize, to_float
from tinymim_jax.data.sources import Chosen, open_source
from tinymim_jax.evals.contract import Batches, Context, Eval, Other, Variables
from tinymim_jax.models.contract import Encoder, EncoderOutput
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError

# What each block reads, through its norm1, then the last block's output through the norm behind it (MAE-Lite,
# forward_hook.py); or what each block puts out.
Layers = Literal["norm1", "blocks"]


@dataclasses.dataclass
class Analysis(Eval, abc.ABC):
    """An evaluator that looks at representations, and at labels never."""

    data: Data
    images: int = ranged(1152, at_least=1)  # so many of them, or all there are
    spread: bool = True  # over the whole set; False: its first, as MAE-Lite takes
    batch_size: int = ranged(128, at_least=1)

    def batches(self, context: Context) -> Batches:
        """The images that it looks at."""
        source = open_source(self.data)
        count = min(self.images, len(source))
        numbers = np.linspace(0, len(source), count, endpoint=False).astype(int) if self.spread else np.arange(count)
        return Batches(self.data, self.batch_size, context.mesh, is_labelled=False, source=Chosen(source, numbers))


@dataclasses.dataclass(frozen=True)
class Viewer:
    """An encoder that sees 8-bit images in its own size and normalisation."""

    model: Encoder
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, variables: Variables, images: jax.Array, capture: Sequence[int], **kwargs: Any) -> EncoderOutput:
        """What it makes of uint8 images [B, S, S, 3], which are resized if its own are of another size."""
        pixels, side = to_float(images), self.model.image_size
        if pixels.shape[1] != side:
            pixels = jax.image.resize(pixels, (len(pixels), side, side, 3), "cubic")
        return self.model.encode(variables, normalize(pixels, self.mean, self.std), tuple(capture), **kwargs)

    def layers(self, variables: Variables, images: jax.Array, kind: Layers, *, cls: bool) -> list[jax.Array]:
        """[B, N, D] of each of `layer_names`, with the tokens in front of the patches if `cls`."""
        depth = self.model.depth
        trace = self(variables, images, range(1, depth + 1)).trace
        if kind == "norm1":
            last = trace[depth].out if trace[depth].normed is None else trace[depth].normed
            tokens = [*(trace[i].norm1 for i in range(1, depth + 1)), last]
        else:
            tokens = [trace[i].out for i in range(1, depth + 1)]
        if any(x is None for x in tokens):
            raise InputError(f"an encoder of kind {self.model.kind!r} has no layers {kind!r}; choose another")
        return [x if cls else x[:, self.model.num_prefix :] for x in tokens]


def viewers(data: Data, context: Context) -> dict[str, Viewer]:
    """Of what is measured (""), and of the checkpoints that the eval names, by field."""
    others = {field: Viewer(other.model, other.mean, other.std) for field, other in context.others.items()}
    return {"": Viewer(context.model, data.mean, data.std), **others}


def variables_of(others: Mapping[str, Other]) -> dict[str, Variables]:
    """Those of each checkpoint, by field."""
    return {field: other.variables for field, other in others.items()}


def layer_names(model: Encoder, kind: Layers) -> list[str]:
    """What the layers are called: each after the block that it is the output of."""
    blocks = [f"block {i}" for i in range(1, model.depth + 1)]
    return ["patches", *blocks] if kind == "norm1" else blocks


def need_images(kind: str, count: int) -> None:
    """Raises InputError if `count`, how many images could be read, is 0."""
    if not count:
        raise InputError(f"{kind}: no image can be read; mend the data")
