"""A converted checkpoint against PyTorch: the source's own model and ours, on the same images, block by block."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.bridge.convert import Converted
from tinymim_jax.bridge.files import one_line
from tinymim_jax.experiment import config
from tinymim_jax.runtime.errors import InputError

PARTS = ("tokens", "q", "k", "v")  # of a block; tokens are its output
LIMIT = 1e-4  # relative, in float32
TRACE = {"tokens": "out", "q": "q", "k": "k", "v": "v"}
REFERENCE = Path(__file__).parents[2] / "tests" / "reference"
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
    noise = rng.uniform(size=(2, (model.image_size // model.patch_size) ** 2)).astype(np.float32)
    try:
        theirs = (_hugging_face if converted.source.format == "huggingface" else _reference)(converted, images, noise)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(
            f"--verify runs the model in PyTorch and needs {error.name}: pip install {error.name}"
        ) from None
    except Exception as error:  # a config.json that names another class, and whatever it makes of the images
        raise InputError(f"the source's model does not run ({one_line(error)})") from None
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
    lines = ["".join(f"{head:22}" for head in ("", *PARTS)).rstrip()]
    for i in range(1, depth + 1):
        lines.append(
            "".join(f"{cell:22}" for cell in (f"block {i}", *(cells[f"block {i} {p}"] for p in PARTS))).rstrip()
        )
    lines += [f"{name:22}{cell}" for name, cell in cells.items() if not name.startswith("block")]
    worst = max(differences, key=lambda d: d.relative)
    return "\n".join(
        [*lines, f"largest relative difference {worst.relative:.1e}, in {worst.name} (cells: absolute / relative)"]
    )


def check(differences: list[Difference]) -> None:
    """Raises InputError if one is above the limit, or not a number."""
    bad = [d for d in differences if not d.relative <= LIMIT]
    if bad:
        raise InputError(
            f"{bad[0].name} differs by {bad[0].relative:.1e}, more than {LIMIT:g}; the number of heads may be wrong"
            " (--num_heads, --last_block_heads)"
        )


def _ours(converted: Converted, images: np.ndarray, noise: np.ndarray) -> Tensors:
    found = converted.layout
    blocks = tuple(range(1, found.model.depth + 1))
    params = jax.tree.map(jnp.asarray, converted.params)
    with jax.default_matmul_precision("highest"):
        encode = jax.jit(lambda p, x: found.model.build().apply({"params": p}, x, capture=blocks))
        out = encode(params["encoder"], images)
        tensors = {f"block {i} {part}": getattr(out.trace[i], TRACE[part]) for i in blocks for part in PARTS}
        tensors["tokens"] = out.tokens
        if out.logits is not None:
            tensors["logits"] = out.logits
        if found.decoder is not None:
            module = found.model, config.Mae(decoder=found.decoder).build()
            tensors["reconstruction"] = jax.jit(module.apply)({"params": params}, images, noise).pred
    return {name: np.asarray(value) for name, value in tensors.items()}


def _torch_images(images: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def reference() -> ModuleType:
    """The project's own PyTorch reference, which lies with the tests; raises InputError outside a clone."""
    name = "tinymim_reference"
    if name not in sys.modules:
        if not REFERENCE.is_dir():
            raise InputError("the PyTorch reference lies in tests/reference, which only a clone of the repository has")
        where = {"submodule_search_locations": [str(REFERENCE)]}
        spec = importlib.util.spec_from_file_location(name, REFERENCE / "__init__.py", **where)
        sys.modules[name] = importlib.util.module_from_spec(spec)
    for part in ("vit", "mae", "distill"):
        importlib.import_module(f"{name}.{part}")
    return sys.modules[name]


def reference_config(model: config.ViT) -> Any:
    """What the reference calls `model`."""
    cls = reference().vit.Config
    fields = {f.name for f in dataclasses.fields(cls)} - {"norm_eps"}
    return cls(**{k: v for k, v in dataclasses.asdict(model).items() if k in fields})


def _reference(converted: Converted, images: np.ndarray, noise: np.ndarray) -> Tensors:
    """The source's arrays, by their own names, in the project's PyTorch reference."""
    import torch

    package, found = reference(), converted.layout
    cfg = reference_config(found.model)
    weights = {name: torch.from_numpy(np.array(array)) for name, array in found.arrays.items()}
    if found.decoder is None:
        model = package.vit.ViT(cfg)
    else:
        decoder = package.mae.Decoder(**dataclasses.asdict(found.decoder))
        model = package.mae.MAE(cfg, decoder, norm_pix_loss=False)
    model.load_state_dict(weights)
    model.eval()
    encoder = package.vit.ViT(cfg)
    encoder.load_state_dict({k: v for k, v in weights.items() if not k.startswith(("decoder_", "mask_token"))})
    with torch.no_grad():
        out = encoder.eval()(_torch_images(images))
        tensors = {f"block {i + 1} {p}": getattr(t, TRACE[p]) for i, t in enumerate(out.trace) for p in PARTS}
        if not found.model.neck:  # behind which the reference's tokens lie
            tensors["tokens"] = out.tokens
        # The reference has heads before tokens.
        tensors = {k: v.transpose(1, 2) if v.ndim == 4 else v for k, v in tensors.items()}
        if out.logits is not None:
            tensors["logits"] = out.logits
        if found.decoder is not None:
            tensors["reconstruction"] = model(_torch_images(images), torch.from_numpy(noise))[1]
    return {name: value.numpy() for name, value in tensors.items()}


def _hugging_face(converted: Converted, images: np.ndarray, noise: np.ndarray) -> Tensors:
    """The folder in transformers, as its config.json says but for LayerNorm's eps, which is 1e-6."""
    import torch
    import transformers

    found, settings = converted.layout, converted.source.settings
    named = settings.get("architectures")
    cls = getattr(transformers, str(named[0]), None) if isinstance(named, list) and named else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise InputError("config.json: architectures names no class of transformers, which --verify would run")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = cls.from_pretrained(converted.source.path.parent, dtype=torch.float32).eval()
    except Exception as error:  # of many kinds
        raise InputError(f"transformers cannot load the weights with this config.json ({one_line(error)})") from None
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    tensors: Tensors = {}
    pixels = _torch_images(images)
    with torch.no_grad():
        hooks = _record(model, found.model, tensors)
        if hasattr(model.config, "mask_ratio"):  # an encoder that masks: nothing, in order
            ratio, model.config.mask_ratio = model.config.mask_ratio, 0.0
            in_order = torch.arange(noise.shape[1], dtype=torch.float32).expand(len(images), -1)
            out = (model.vit if found.decoder else model)(pixels, noise=in_order)
            tensors["tokens"] = out.last_hidden_state.numpy()
            model.config.mask_ratio = ratio
        else:
            out = model(pixels)
            last = "logits" if found.model.num_classes else "last_hidden_state"
            if last not in out:
                raise InputError(f"config.json: architectures names {named[0]}, which has no {last}")
            tensors[last.replace("last_hidden_state", "tokens")] = out[last].numpy()
        for hook in hooks:
            hook.remove()
        if found.decoder:
            model.config.mask_ratio = 0.75
            tensors["reconstruction"] = model(pixels, noise=torch.from_numpy(noise)).logits.numpy()
    return tensors


def _record(model: Any, cfg: config.ViT, tensors: Tensors) -> list[Any]:
    """Hooks that put each block's q, k, v and output into `tensors`; found by the names of transformers' modules."""
    import re

    hooks = []
    parts = {"query": "q", "key": "k", "value": "v", "q_proj": "q", "k_proj": "k", "v_proj": "v"}

    def keep(name: str, heads: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            value = (output[0] if isinstance(output, tuple) else output).numpy()
            tensors[name] = value.reshape(*value.shape[:2], heads, -1) if heads else value

        return hook

    for path, module in model.named_modules():
        block = re.search(r"(?<!decoder_)(?:layer|layers)\.(\d+)(?:\.(?:.*\.)?(\w+))?$", path)
        if not block or "decoder" in path:
            continue
        if block[2] in parts or block[2] is None:
            name = f"block {int(block[1]) + 1} {parts.get(block[2], 'tokens')}"
            hooks.append(module.register_forward_hook(keep(name, cfg.num_heads if block[2] else 0)))
    return hooks
