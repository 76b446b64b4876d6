"""A converted checkpoint against PyTorch: the source's own model and ours, on the same images, block by block."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.bridge import hiera_reference
from tinymim_jax.bridge.convert import Converted
from tinymim_jax.bridge.files import need
from tinymim_jax.bridge.layout import Layout
from tinymim_jax.experiment import config
from tinymim_jax.models.torch_ops import resize
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import Context

PARTS = {"tokens": "out", "q": "q", "k": "k", "v": "v"}  # of a block -> of its trace
LIMIT = 1e-4  # relative, in float32
REFERENCES = {"hiera": hiera_reference.run}  # by kind of encoder, where it is not `_reference`
Tensors = dict[str, np.ndarray]  # "block 1 q", ..., "logits", "reconstruction"


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of one tensor: the largest, and the same over the largest value of the source's."""

    name: str
    absolute: float
    relative: float


def verify(converted: Converted) -> list[Difference]:
    """Every block's q, k, v and tokens, and logits or reconstruction, of the source's model and ours.

    A Hugging Face folder says its own heads; for other files both sides take them, and the pooling, from the report.
    Raises InputError if PyTorch (or for a Hugging Face folder, transformers) is missing.
    """
    model = converted.layout.model
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, model.image_size, model.image_size, 3)).astype(np.float32)
    noise = rng.uniform(size=(2, model.units)).astype(np.float32)
    need("torch", "verify", "--verify")
    if converted.layout.task is not None and converted.source.format != "huggingface":
        raise InputError(
            "--verify has no reference of mmseg's classes; convert without it, export that with --format=hf, and"
            " convert the exported folder with --verify"
        )
    run = _hugging_face if converted.source.format == "huggingface" else _reference
    run = REFERENCES.get(model.kind, run)
    theirs = run(converted, images, noise)
    ours = _ours(converted, images, noise)
    if odd := {name for name in theirs.keys() ^ ours.keys() if name.startswith("block")}:
        raise InputError(f"config.json has another number of blocks than the weights: one of them has no {min(odd)}")
    return [difference(name, theirs[name], ours[name]) for name in theirs]


def difference(name: str, theirs: np.ndarray, ours: np.ndarray) -> Difference:
    """Of two arrays of one shape."""
    absolute = float(np.max(np.abs(theirs.astype(np.float64) - ours)))
    return Difference(name, absolute, absolute / max(float(np.max(np.abs(theirs))), 1e-30))


def table(differences: list[Difference]) -> str:
    """The largest absolute / relative difference: a row for each block, then one for each output."""
    cells = {d.name: f"{d.absolute:.1e} / {d.relative:.1e}" for d in differences}
    depth = sum(name.endswith(" q") for name in cells)
    rows = [("", *PARTS), *((f"block {i}", *(cells[f"block {i} {p}"] for p in PARTS)) for i in range(1, depth + 1))]
    rows += [(name, cell) for name, cell in cells.items() if not name.startswith("block")]
    worst = max(differences, key=lambda d: d.relative)
    text = f"largest relative difference {worst.relative:.1e}, in {worst.name} (cells: absolute / relative)"
    return "\n".join([*("".join(f"{cell:22}" for cell in row).rstrip() for row in rows), text])


def check(differences: list[Difference]) -> None:
    """Raises InputError if one is above the limit, or not a number."""
    bad = [d for d in differences if not d.relative <= LIMIT]
    if bad:
        raise InputError(
            f"{bad[0].name} differs by {bad[0].relative:.1e}, more than {LIMIT:g}; the number of heads may be wrong"
            " (--num_heads, --last_block_heads), or the eps of the norms (--layer_norm_eps)"
        )


def _ours(converted: Converted, images: np.ndarray, noise: np.ndarray) -> Tensors:
    found = converted.layout
    blocks = tuple(range(1, found.model.depth + 1))
    params = jax.tree.map(jnp.asarray, converted.params)
    with jax.default_matmul_precision("highest"):
        encode = jax.jit(lambda p, x: found.model.build().apply({"params": p}, x, capture=blocks))
        out = encode(params["encoder"], images)
        tensors = {f"block {i} {part}": getattr(out.trace[i], PARTS[part]) for i in blocks for part in PARTS}
        tensors["tokens"] = out.tokens
        if out.logits is not None:
            tensors["logits"] = out.logits
        if found.task is not None:
            tensors["logits"] = _logits(converted, params, images)
        if found.decoder is not None:
            context = Context(found.model, config.Data("folder", image_size=found.model.image_size))
            task = config.Mae(decoder=found.decoder).build(context)
            tensors["reconstruction"] = jax.jit(task.reconstruct)(params, images, noise)[0]
    return {name: np.asarray(value) for name, value in tensors.items()}


def _logits(converted: Converted, params: Any, images: np.ndarray) -> jax.Array:
    """Of pixels, [B, C, h, w], as fine as those of the source's class."""
    found = converted.layout
    plain = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3, "image_size": found.model.image_size, "masks": found.masks}
    task = found.task.build(Context(found.model, config.Data("pairs", **plain)))
    pixels = jax.jit(task.predict)({"params": params, **converted.state}, {}, {"image": images}).pixels
    is_resized = "backbone_config" in converted.source.settings  # by UperNet's own class
    return (resize(pixels, images.shape[1:3]) if is_resized else pixels).transpose(0, 3, 1, 2)


def _torch_images(images: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def _reference(converted: Converted, images: np.ndarray, noise: np.ndarray) -> Tensors:
    """The source's arrays, by their own names, in the project's PyTorch reference."""
    import torch

    from tinymim_jax.bridge.torch_reference.mae import MAE
    from tinymim_jax.bridge.torch_reference.vit import ViT

    found, pixels = converted.layout, _torch_images(images)
    decoder = found.decoder and config.Mae(decoder=found.decoder, norm_pix_loss=False)
    model = (MAE(found.model, decoder) if decoder else ViT(found.model)).eval()
    model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in found.arrays.items()})
    with torch.no_grad():
        out = ViT.forward(model, pixels)
        tensors = {f"block {i + 1} {p}": getattr(t, PARTS[p]) for i, t in enumerate(out.trace) for p in PARTS}
        # The reference has heads before tokens.
        tensors = {k: v.transpose(1, 2) if v.ndim == 4 else v for k, v in tensors.items()}
        if not found.model.neck:  # behind which the reference's tokens lie
            tensors["tokens"] = out.tokens
        if out.logits is not None:
            tensors["logits"] = out.logits
        if decoder:
            tensors["reconstruction"] = model(pixels, torch.from_numpy(noise))[1]
    return {name: value.numpy() for name, value in tensors.items()}


def _hugging_face(converted: Converted, images: np.ndarray, noise: np.ndarray) -> Tensors:
    """The folder in transformers, as its config.json says."""
    transformers = need("transformers", "verify", "--verify of a Hugging Face folder")
    import torch

    named = converted.source.settings.get("architectures")
    cls = getattr(transformers, str(named[0]), None) if isinstance(named, list) and named else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise InputError("config.json: architectures names no class of transformers, which --verify would run")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:  # a config.json that names another class: whatever that makes of the weights and of the images
        model = cls.from_pretrained(converted.source.path.parent, dtype=torch.float32).eval()
        with torch.no_grad():
            return _run_hugging_face(model, converted.layout, _torch_images(images), torch.from_numpy(noise))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"transformers cannot run {named[0]}, as config.json says ({storage.reason(error)})") from None


def _run_hugging_face(model: Any, found: Layout, pixels: Any, noise: Any) -> Tensors:
    import torch

    tensors: Tensors = {}
    hooks, options = _record(model, found.model, tensors), {}
    if hasattr(model.config, "mask_ratio"):  # an encoder that masks: nothing, in order
        model.config.mask_ratio = 0.0
        options["noise"] = torch.arange(noise.shape[1]).expand(noise.shape).float()
    out = (model.vit if found.decoder else model)(pixels, **options)
    for hook in hooks:
        hook.remove()
    last = "logits" if found.model.num_classes or found.task else "last_hidden_state"
    if last not in out:
        raise InputError(f"config.json: architectures names {type(model).__name__}, which has no {last}")
    tensors["logits" if last == "logits" else "tokens"] = out[last].numpy()
    if found.decoder:
        model.config.mask_ratio = 0.75
        tensors["reconstruction"] = model(pixels, noise=noise).logits.numpy()
    return tensors


def _record(model: Any, cfg: config.ViT, tensors: Tensors) -> list[Any]:
    """Hooks that put each block's q, k, v and output into `tensors`; found by the names of transformers' modules."""
    parts = {"query": "q", "key": "k", "value": "v", "q_proj": "q", "k_proj": "k", "v_proj": "v", None: "tokens"}

    def keep(name: str, heads: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            value = (output[0] if isinstance(output, tuple) else output).numpy()
            tensors[name] = value.reshape(*value.shape[:2], heads, -1) if heads else value

        return hook

    hooks = []
    for path, module in model.named_modules():
        block = re.search(r"layers?\.(\d+)(?:\.(?:.*\.)?(\w+))?$", path)
        if block and block[2] in parts and "decoder" not in path:
            name = f"block {int(block[1]) + 1} {parts[block[2]]}"
            hooks.append(module.register_forward_hook(keep(name, cfg.num_heads if block[2] else 0)))
    return hooks
