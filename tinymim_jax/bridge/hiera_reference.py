"""A converted Hiera in transformers, for `--verify`: its tensors in the order of ours."""

from typing import TYPE_CHECKING, Any

import numpy as np

from tinymim_jax.bridge import hiera, hiera_export
from tinymim_jax.bridge.files import need
from tinymim_jax.models.hiera import Hiera, in_order
from tinymim_jax.runtime.errors import InputError

if TYPE_CHECKING:
    from tinymim_jax.bridge.convert import Converted


def run(converted: "Converted", images: np.ndarray, noise: np.ndarray) -> dict[str, np.ndarray]:
    """Every block's q, k, v and tokens, and logits or reconstruction, by the source's arrays in transformers' class.

    A Hugging Face folder is run as its config.json says. Raises InputError if transformers cannot hold it.
    """
    transformers = need("transformers", "verify", "--verify of a Hiera")
    import torch

    found = converted.layout
    name, settings = hiera_export.hf_class(found.model, found.decoder, 0.75)  # as `Mae` has it by default
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cls = getattr(transformers, name)
    if converted.source.format == "huggingface":
        model = cls.from_pretrained(converted.source.path.parent, dtype=torch.float32, mask_ratio=0.75).eval()
    else:
        model = cls(transformers.HieraConfig(**settings, num_labels=max(found.model.num_classes, 1))).eval()
        _load(model, found)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    encoder, seen = getattr(model, "hiera", model), {}
    layers = [layer for stage in encoder.encoder.stages for layer in stage.layers]
    hooks = []
    for i, layer in enumerate(layers, 1):
        hooks.append(layer.attn.qkv.register_forward_hook(lambda _, __, out, i=i: seen.update({(i, "qkv"): out})))
        hooks.append(layer.register_forward_hook(lambda _, __, out, i=i: seen.update({(i, "out"): out[0]})))
    with torch.no_grad():
        embeddings = encoder.embeddings.patch_embeddings
        was, embeddings.is_mae = embeddings.is_mae, False  # so that it sees whole images
        out = encoder(pixels)
        embeddings.is_mae = was
        for hook in hooks:
            hook.remove()
        tensors = in_our_order(found.model, {key: value.numpy() for key, value in seen.items()})
        if name == "HieraForImageClassification":
            tensors["logits"] = model.classifier(out.pooler_output).numpy()
        if name == "HieraForPreTraining":
            restored = model(pixels, noise=torch.from_numpy(noise)).logits.numpy()
            side = found.model.patch_size
            restored = np.moveaxis(restored.reshape(*restored.shape[:2], 3, side, side), 2, 4)
            tensors["reconstruction"] = restored.reshape(*restored.shape[:2], -1)
    return tensors


def _load(model: Any, found: Any) -> None:
    """The arrays of a file, as transformers names and orders them."""
    import torch

    prefix = "hiera." if hasattr(model, "hiera") else ""
    arrays = hiera.theirs(found.model, found.arrays)
    state = {hiera.hf_name(k, found.model, prefix): torch.from_numpy(np.array(a)) for k, a in arrays.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing := [key for key in missing if not (prefix == "" and key.startswith("pooler."))]:
        raise InputError(f"transformers' class has {missing[0]}, and these weights none")
    if unexpected:
        raise InputError(f"transformers' class has no {unexpected[0]}")


def rolled(x: np.ndarray, side: int) -> np.ndarray:
    """Tokens in transformers' order, [B, N, C], as [B, U, side, side, C]: there the finest offsets come first."""
    b, n, c = x.shape
    bits = side.bit_length() - 1
    x = x.reshape(b, *(2, 2) * bits, n // side**2, c)
    axes = [0, 2 * bits + 1, *range(2 * bits - 1, 0, -2), *range(2 * bits, 0, -2), 2 * bits + 2]
    return x.transpose(axes).reshape(b, n // side**2, side, side, c)


def in_our_order(model: Hiera, seen: dict[tuple[int, str], np.ndarray]) -> dict[str, np.ndarray]:
    """ "block i tokens", "block i q", ... of what each block's qkv layer ("qkv") and the block ("out") put out."""
    tensors = {}
    for i in range(1, model.depth + 1):
        before, after = model.side_of(max(i - 1, 1)), model.side_of(i)
        tensors[f"block {i} tokens"] = in_order(rolled(seen[i, "out"], after), True)
        qkv = rolled(seen[i, "qkv"], before)
        parts = np.split(qkv.reshape(*qkv.shape[:4], 3, model.heads_of(i), -1), 3, axis=4)
        for name, part in zip("qkv", (part.squeeze(4) for part in parts), strict=True):
            if name == "q" and model.is_pooling(i):
                half = before // 2
                part = part.reshape(*part.shape[:2], half, 2, half, 2, *part.shape[4:]).max((3, 5))
            own = part.reshape(*part.shape[:2], -1, *part.shape[4:])
            tensors[f"block {i} {name}"] = in_order(part, True) if model.is_global(i) else own
    return tensors
