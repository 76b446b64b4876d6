"""Other people's checkpoint files, read without running anything that is in them."""

import argparse
import dataclasses
import importlib
import json
import math
import os
import pickle
import re
import warnings
from types import ModuleType
from typing import Any

import numpy as np
from etils.epath import Path

from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.weights.handoff import WEIGHTS

CONTAINERS = ("model", "state_dict", "model_state")  # entries of a .pth that hold the weights
BESIDE = {
    r"optimizer|opt_state": "state of the optimiser",
    r"scaler|lr_scheduler|scheduler|loss_scaler": "state of the training loop",
    r"epoch|start_epoch|step|best.*|max_accuracy": "progress of the training",
    r"args|config|cfg|hyper_parameters|tinymim_jax": "settings of the training",
    r"model_ema|state_dict_ema|ema.*": "averaged weights; the plain ones are taken",
}


@dataclasses.dataclass
class Source:
    """A checkpoint as it lies there: arrays by name, its settings, and what stands beside the weights."""

    path: Path  # of the file that holds the weights
    format: str  # "pth" | "safetensors" | "huggingface" | "timm"
    arrays: dict[str, np.ndarray]
    settings: dict[str, Any]  # of config.json, or the training's arguments
    beside: dict[str, str]  # entry -> why it is not read


def read(path: Path) -> Source:
    """Reads a .pth or .safetensors file, or a folder with config.json and model.safetensors.

    Raises InputError, without having run anything, on a file that is not one of these or is damaged.
    """
    storage.check_on_disk(path, "other people's checkpoints")
    if not os.path.exists(path):  # False for a name that is too long, too
        raise InputError(f"{path} does not exist; give a .pth or .safetensors file, or a Hugging Face or timm folder")
    if path.is_dir():
        return _read_folder(path)
    if not os.stat(path).st_size:
        raise InputError(f"{path} is empty; download it again")
    if path.suffix == ".safetensors":
        return Source(path, "safetensors", read_safetensors(path), {}, {})
    if path.suffix in WEIGHTS:
        return _read_pth(path)
    raise InputError(f"{path}: the name ends in none of {', '.join(WEIGHTS)}; rename it if it is one of these")


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Arrays by name; raises InputError on a damaged file."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # SafetensorError, OSError, and whatever a strange dtype raises
        why = storage.reason(error)
        raise InputError(f"{path} is not a whole safetensors file ({why}); download it again") from None


def _read_folder(path: Path) -> Source:
    file, weights = path / "config.json", path / "model.safetensors"
    if (path / "stage.json").is_file():
        raise InputError(f"{path} is a stage's folder, or converted already; use it as it is")
    if not file.is_file():
        raise InputError(f"{path} has no config.json: neither a Hugging Face nor a timm folder; name a file in it")
    if not weights.is_file():
        raise InputError(f"{path} has no model.safetensors; save it again with safe_serialization=True, in one file")
    settings = _read_json(file)
    if (path / "preprocessor_config.json").is_file():
        settings["preprocessor"] = _read_json(path / "preprocessor_config.json")
    kind = "timm" if "architecture" in settings else "huggingface"
    return Source(weights, kind, read_safetensors(weights), settings, {})


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError):  # the latter: brackets a thousand deep
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a JSON object; save the model again")
    return content


def _read_pth(path: Path) -> Source:
    content = _load_pth(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dict of weights; save model.state_dict()")
    entry = next((name for name in CONTAINERS if isinstance(content.get(name), dict)), None)
    weights = content if entry is None else content[entry]
    beside = {} if entry is None else {str(k): _why(path, str(k), v) for k, v in content.items() if k != entry}
    settings = next((content[n] for n in ("tinymim_jax", "args") if entry is not None and n in content), {})
    settings = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})  # a Namespace, or None
    arrays = {str(name): _to_numpy(path, name, value) for name, value in weights.items()}
    return Source(path, "pth", arrays, settings, beside)


def _load_pth(path: Path) -> Any:
    """What torch's restricted unpickler makes of the file: tensors, plain values and argparse's Namespace only."""
    torch = need("torch", "torch", f"{path}: a PyTorch checkpoint (unlike a .safetensors file)")
    options = {"map_location": "cpu", "weights_only": True}
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return torch.load(path, mmap=True, **options)
            except RuntimeError:  # a file of torch before 1.6, which cannot be mapped
                return torch.load(path, **options)
    except Exception as error:  # damaged files raise anything from EOFError to KeyError
        if refused := re.search(r"(?<=GLOBAL )\S+|TorchScript|legacy \.tar", str(error)):
            raise InputError(
                f"{path} would run code when unpickled, or holds more than tensors and plain values ({refused[0]}), and"
                " is not opened; load it where you trust it and save model.state_dict() alone"
            ) from None
        # What torch says of a pickle is its advice to run the code in it.
        why = "its pickle is damaged" if isinstance(error, pickle.UnpicklingError) else storage.reason(error)
        raise InputError(f"{path} is not a whole PyTorch checkpoint ({why}); download it again") from None


def _to_numpy(path: Path, name: str, value: Any) -> np.ndarray:
    import torch

    if not isinstance(value, torch.Tensor):
        raise InputError(f"{path}: {name} is a {type(value).__name__}, not a tensor; save model.state_dict()")
    if value.layout is not torch.strided or value.is_nested or value.is_quantized or value.is_complex():
        raise InputError(f"{path}: {name} is sparse, nested, quantised or complex; save it as plain float32")
    if value.nbytes > os.stat(path).st_size:
        raise InputError(f"{path}: {name} has shape {list(value.shape)}, more than the file holds; it is damaged")
    if value.dtype == torch.bfloat16:
        import ml_dtypes

        return value.detach().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    try:
        return value.detach().numpy()
    except TypeError:  # float8, or on the meta device
        raise InputError(f"{path}: {name} is {value.dtype} on {value.device}; save it as plain float32") from None


def _why(path: Path, entry: str, value: Any) -> str:
    """Why an entry beside the weights is not read; raises InputError if nobody knows and it holds tensors."""
    import torch

    why = next((why for pattern, why in BESIDE.items() if re.fullmatch(pattern, entry)), None)
    values = list(value.values()) if isinstance(value, dict) else [value]
    if why is None and any(isinstance(v, torch.Tensor) for v in values):
        raise InputError(f"{path}: the entry {entry!r} holds tensors and is of no known kind; save model.state_dict()")
    return why or "beside the weights"


def check_values(source: Source, half: bool) -> dict[str, np.ndarray]:
    """`source.arrays` as float32; raises InputError on NaN, infinity, integers and (unless `half`) 16-bit floats."""
    checked = {}
    for name, array in source.arrays.items():
        kind = str(array.dtype)
        if kind in ("float16", "bfloat16") and not half:
            raise InputError(
                f"{source.path}: {name} is {kind}: these weights have been rounded; find the float32 file, or"
                f" convert them as they are: python -m tinymim_jax convert {source.path} DST --half"
            )
        if kind not in ("float32", "float64", "float16", "bfloat16"):
            raise InputError(f"{source.path}: {name} is {kind}, not a float; this is not a plain vision transformer")
        with np.errstate(over="ignore", invalid="ignore"):  # said below
            array = array.astype(np.float32, copy=False)
            total = float(np.sum(array, dtype=np.float64))
        if not math.isfinite(total):
            raise InputError(
                f"{source.path}: {name} has values that are not finite; the training that wrote it had failed"
            )
        checked[name] = array
    return checked


def need(package: str, extra: str, what: str) -> ModuleType:
    """The package, without which `what` cannot be; raises InputError if it is missing, with the extra that has it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise InputError(f"{what} needs {package}: pip install 'tinymim_jax[{extra}]'") from None


def printable(text: str) -> str:
    """`text` on one line, whatever names a file gives its tensors."""
    return "".join(c if c.isprintable() else "?" for c in text)
