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

IN_FOLDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
INDEX = ".index.json"  # how the name of a list of shards ends
INDICES = ".relative_position_index"  # how BEiT's names of which distance two patches have end
POINTER = b"version https://git-lfs"  # how a git-lfs pointer begins
# Entries of a .pth that hold the weights, or what holds them.
CONTAINERS = ("model", "state_dict", "model_state", "model_state_dict", "net", "network", "module", "weights")
AVERAGED = r"(.*_)?(ema|averaged?)(_.*)?"  # names of entries with averaged weights
BESIDE = {
    r"optimizer|opt_state": "state of the optimiser",
    r"scaler|lr_scheduler|scheduler|loss_scaler": "state of the training loop",
    r"epoch|start_epoch|step|best.*|max_accuracy": "progress of the training",
    r"args|config|cfg|hyper_parameters|meta|tinymim_jax": "settings of the training",
}


@dataclasses.dataclass
class Source:
    """A checkpoint as it lies there: arrays by name, its settings, and what stands beside the weights."""

    path: Path  # of the file that holds the weights
    format: str  # "pth" | "safetensors" | "huggingface" | "timm"
    arrays: dict[str, np.ndarray]
    settings: dict[str, Any]  # of config.json, or the training's arguments
    beside: dict[str, str]  # entry -> why it is not read


def read(path: Path, ema: bool = False) -> Source:
    """Reads a .pth or .safetensors file, an index of shards, or a folder with config.json and one of these.

    `ema`: the averaged weights, not the plain ones. Raises InputError, without having run anything, on what is none of
    these or is damaged.
    """
    storage.check_on_disk(path, "other people's checkpoints")
    if not os.path.exists(path):  # False for a name that is too long, too
        raise InputError(f"{path} does not exist; give a .pth or .safetensors file, or a Hugging Face or timm folder")
    settings = _read_settings(path) if path.is_dir() else None
    path, shards = locate(path)
    parts = [_read_file(shard, ema) for shard in shards]
    arrays = {name: array for part in parts for name, array in part.arrays.items()}
    beside = {name: why for part in parts for name, why in part.beside.items()}
    if settings is None:
        return dataclasses.replace(parts[0], path=path, arrays=arrays, beside=beside)
    return Source(path, "timm" if "architecture" in settings else "huggingface", arrays, settings, beside)


def locate(path: Path) -> tuple[Path, list[Path]]:
    """The file of weights in a folder, or the index of shards, or `path` itself; and the files that hold them."""
    if path.is_dir():
        name = next((name for name in IN_FOLDER if (path / name).is_file()), None)
        if name is None:
            raise InputError(f"{path} has none of {', '.join(IN_FOLDER)}; save it again with save_pretrained")
        path = path / name
    if not path.name.endswith(INDEX):
        return path, [path]
    found = _read_json(path).get("weight_map")
    names = list(found.values()) if isinstance(found, dict) else []
    if not names or not all(isinstance(name, str) and name and name == os.path.basename(name) for name in names):
        raise InputError(f"{path}: weight_map does not name files beside it; save the model again")
    return path, [path.with_name(name) for name in sorted(set(names))]


def _read_file(path: Path, ema: bool) -> Source:
    if not path.is_file():
        raise InputError(f"{path}, which holds a part of the weights, is missing; download it, too")
    if not os.stat(path).st_size:
        raise InputError(f"{path} is empty; download it again")
    check_content(path)
    if path.suffix not in WEIGHTS:
        raise InputError(f"{path}: the name ends in none of {', '.join(WEIGHTS)}; rename it if it is one of these")
    form = "safetensors" if path.suffix == ".safetensors" else "pth"
    content = read_safetensors(path) if form == "safetensors" else _load_pth(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dict of weights; save model.state_dict()")
    settings = next((content[name] for name in ("tinymim_jax", "args", "meta") if name in content), {})
    settings = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})  # a Namespace, or None
    weights, beside = _open(path, content, ema)
    beside |= {str(name): "a number beside the weights" for name, v in weights.items() if _is_number(v)}
    beside |= {str(name): "follows from the sizes" for name in weights if str(name).endswith(INDICES)}
    arrays = {str(name): _to_numpy(path, name, v) for name, v in weights.items() if str(name) not in beside}
    return Source(path, form, arrays, settings, beside)


def _is_number(value: Any) -> bool:
    """Plain, or a counter: an array of no dimension that is no float."""
    is_counter = getattr(value, "ndim", 1) == 0 and "float" not in str(value.dtype)
    return is_counter or isinstance(value, (type(None), bool, int, float, str, np.generic))


def check_content(path: Path) -> None:
    """Raises InputError if `path` only says where the file is."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise InputError(f"{path} is a git-lfs pointer: git lfs pull, or download the file that it stands for")


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Arrays by name; raises InputError on a damaged file."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # SafetensorError, OSError, and whatever a strange dtype raises
        why = storage.reason(error)
        raise InputError(f"{path} is not a whole safetensors file ({why}); download it again") from None


def _read_settings(path: Path) -> dict[str, Any]:
    """What the JSON files of a folder say."""
    file = path / "config.json"
    if (path / "stage.json").is_file():
        raise InputError(f"{path} is a stage's folder, or converted already; use it as it is")
    if not file.is_file():
        raise InputError(f"{path} has no config.json, which tells the heads: download it, or name a file in the folder")
    settings = _read_json(file)
    if (path / "preprocessor_config.json").is_file():
        settings["preprocessor"] = _read_json(path / "preprocessor_config.json")
    return settings


def _read_json(file: Path) -> dict[str, Any]:
    check_content(file)
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError):  # the latter: brackets a thousand deep
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a JSON object; save the model again")
    return content


def _open(path: Path, content: dict[Any, Any], ema: bool) -> tuple[dict[Any, Any], dict[str, str]]:
    """The weights in `content`, out of the entries that hold them, and why what is beside these is not read."""
    beside: dict[str, str] = {}
    averaged = [name for name in content if re.fullmatch(AVERAGED, str(name))]
    for names in (averaged if ema else CONTAINERS, CONTAINERS, CONTAINERS):
        entry = next((name for name in names if isinstance(content.get(name), dict)), None)
        if entry is None and names is averaged:
            raise InputError(f"{path} has no averaged weights (model_ema, state_dict_ema, ema, ...); leave out --ema")
        if entry is None:
            break
        beside |= {str(name): _why(path, str(name), value, ema) for name, value in content.items() if name != entry}
        content = content[entry]
    return content, beside


def _load_pth(path: Path) -> Any:
    """What torch's restricted unpickler makes of the file: tensors, plain values and argparse's Namespace only."""
    torch = need("torch", "torch", f"{path}: a PyTorch checkpoint (unlike a .safetensors file)")
    options = {"map_location": "cpu", "weights_only": True}
    scalar = np.float64().__reduce__()[0]  # numpy's numbers, as a best accuracy may be; the names are numpy 1's and 2's
    known = [argparse.Namespace, np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"}]
    known += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(known), warnings.catch_warnings():
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
    if isinstance(value, np.ndarray):
        return value  # of safetensors, which ask for no torch
    import torch

    if not isinstance(value, torch.Tensor):
        raise InputError(
            f"{path}: {name} is a {type(value).__name__}, not a tensor; save model.state_dict() or try --ema"
        )
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


def _why(path: Path, entry: str, value: Any, ema: bool) -> str:
    """Why an entry beside the weights is not read; raises InputError if nobody knows and it holds tensors."""
    import torch

    others = {"|".join(CONTAINERS): "plain weights; the averaged ones are taken"}
    others = others if ema else {AVERAGED: "averaged weights; the plain ones are taken (--ema)"}
    why = next((why for pattern, why in {**BESIDE, **others}.items() if re.fullmatch(pattern, entry)), None)
    values = list(value.values()) if isinstance(value, dict) else [value]
    if why is None and any(isinstance(v, torch.Tensor) and v.ndim for v in values):
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


def save_safetensors(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Writes `arrays`; the metadata is what transformers looks for."""
    import safetensors.numpy

    plain = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    safetensors.numpy.save_file(plain, path, metadata={"format": "pt"})
    os.umask(umask := os.umask(0))
    os.chmod(path, 0o666 & ~umask)  # it was made for its owner alone


def need(package: str, extra: str, what: str) -> ModuleType:
    """The package, without which `what` cannot be; raises InputError if it is missing, with the extra that has it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise InputError(f"{what} needs {package}: pip install 'tinymim_jax[{extra}]'") from None


def printable(text: str) -> str:
    """`text` on one line, whatever names a file gives its tensors."""
    return "".join(c if c.isprintable() else "?" for c in text)
