"""What a foreign checkpoint states beside its weights: its norms' eps, how images are prepared, names of classes."""

import math
import re
from typing import Any

from tinymim_jax.bridge.files import Source, printable
from tinymim_jax.bridge.known_checkpoints import Told
from tinymim_jax.data.fast_jpeg import RESAMPLE
from tinymim_jax.experiment.config import ViT
from tinymim_jax.runtime.errors import InputError

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
EPS = {"huggingface": 1e-12}  # where config.json does not say; elsewhere 1e-6
FOLLOWED = (  # of preprocessor_config.json: what is followed, or changes no pixel
    "do_resize|size|resample|do_center_crop|crop_size|do_rescale|rescale_factor|do_normalize|image_mean|image_std"
    "|default_to_square|do_convert_rgb|.*_type|processor_class|(input_)?data_format|.*reduce_labels|_.*|auto_map"
)


def side(settings: dict[str, Any], key: str, default: int) -> int:
    """settings[key], a number of pixels a side or a pair of equal ones; raises InputError on a rectangle."""
    value = settings.get(key) or default
    pair = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(pair) != 2 or any(type(v) is not int or v < 1 for v in pair):
        raise InputError(f"config.json: {key} is {value!r}; it must be a whole number of pixels")
    if pair[0] != pair[1]:
        raise InputError(f"config.json: {key} is {value!r}: a rectangular model, and only square ones can be converted")
    return pair[0]


def layer_norm_eps(source: Source, ours: ViT | None, told: Told, notes: list[str]) -> float:
    """The eps of the norms: what the user says, else the file; raises InputError if that is no positive number."""
    own = ours.layer_norm_eps if ours else EPS.get(source.format, 1e-6)
    eps = told.layer_norm_eps or source.settings.get("layer_norm_eps", own)
    if type(eps) not in (int, float) or not 0 < eps < 1:
        raise InputError(f"config.json: layer_norm_eps is {eps!r}; it must be above 0 and below 1")
    if told.layer_norm_eps:
        notes.append(f"LayerNorm eps is {eps:g}, as you say")
    elif eps != 1e-6:
        notes.append(
            f"LayerNorm eps is {eps:g}, as the file says; MAE's, timm's and DeiT's weights were trained with 1e-6, also"
            " where transformers writes 1e-12 (--layer_norm_eps=1e-6)"
        )
    return float(eps)


def preprocessing(source: Source, size: int, told: Told, notes: list[str]) -> tuple[dict[str, Any], bool]:
    """Fields of `Data` (mean, std, and those of size that are known), and whether anybody says mean and std.

    `size` is the model's, in pixels.
    """
    settings = source.settings
    if source.format == "huggingface":
        found = _of_transformers(settings.get("preprocessor"), size, notes)
    else:  # timm's first config.json was flat, as a training's arguments are
        place = settings.get("pretrained_cfg" if source.format == "timm" else "preprocessing")
        found = _of_timm(place if isinstance(place, dict) else settings, size, notes)
    found |= {key: getattr(told, key) for key in IMAGENET if getattr(told, key)}
    is_stated = all(_is_rgb(found.get(key)) for key in IMAGENET) and min(found["std"]) > 0
    if not is_stated:
        notes.append("pixels are normalised with ImageNet's mean and std, which the file does not say (--mean, --std)")
        found |= IMAGENET
    if len(found) < 4:
        notes.append("images are resized and cropped as MAE evaluates (bicubic, 0.875) where the file does not say how")
    return found | {key: [float(x) for x in found[key]] for key in IMAGENET}, is_stated


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6


def _is_rgb(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and len(values) == 3 and all(map(_is_number, values))


def _of_timm(cfg: dict[str, Any], size: int, notes: list[str]) -> dict[str, Any]:
    """timm's pretrained_cfg, and what our own exports say in its words."""
    found = {key: cfg[key] for key in (*IMAGENET, "interpolation", "crop_pct", "crop_mode") if cfg.get(key)}
    shape = cfg.get("input_size")
    if isinstance(shape, (list, tuple)) and len(shape) == 3:
        notes.extend(_other_size(side({"input_size": shape[1:]}, "input_size", size), size))
    pct = found.get("crop_pct", 1)
    is_followed = {"interpolation": found.get("interpolation", "bicubic") in list(RESAMPLE),
                   "crop_pct": _is_number(pct) and 0 < pct <= 1,
                   "crop_mode": found.get("crop_mode", "center") in ["center", "squash"]}  # fmt: skip
    for key in [key for key, is_fine in is_followed.items() if not is_fine]:
        notes.append(printable(f"{key} {found.pop(key)!r} of the file is not followed in evaluation: not supported"))
    return found | ({"crop_pct": float(pct)} if "crop_pct" in found else {})


def _of_transformers(cfg: Any, size: int, notes: list[str]) -> dict[str, Any]:
    """preprocessor_config.json."""
    if not isinstance(cfg, dict):
        return {}
    for key in [key for key, value in cfg.items() if value and not re.fullmatch(FOLLOWED, key)]:
        notes.append(printable(f"{key} of preprocessor_config.json is not followed in evaluation: not supported"))
    found = {"mean": cfg.get("image_mean"), "std": cfg.get("image_std")}
    if cfg.get("do_normalize") is False:
        found = {"mean": [0.0] * 3, "std": [1.0] * 3}
    factor = cfg.get("rescale_factor", 1 / 255) if cfg.get("do_rescale", True) else 1
    if all(map(_is_rgb, found.values())) and _is_number(factor) and not math.isclose(255 * factor, 1, rel_tol=1e-6):
        found = {key: [x / (255 * factor or 1) for x in values] for key, values in found.items()}
    if cfg.get("do_resize") is False:
        notes.append("preprocessor_config.json does not resize; images that are not as large as the model's are")
        return found | {"crop_pct": 1.0, "interpolation": "bicubic"}
    if (resample := cfg.get("resample")) is not None:  # PIL's number
        names = [name for name, value in RESAMPLE.items() if value == resample]
        if not names:
            raise InputError(f"preprocessor_config.json: resample is {resample!r}; it must be a number from 0 to 5")
        found["interpolation"] = names[0]
    return found | (_resizing(cfg, size, notes) if cfg.get("size") else {})


def _resizing(cfg: dict[str, Any], size: int, notes: list[str]) -> dict[str, Any]:
    """crop_mode and crop_pct of a processor that resizes, and perhaps crops."""

    def sides(key: str) -> int:
        value = cfg.get(key)
        if isinstance(value, dict):
            value = value.get("shortest_edge") or [value.get("height"), value.get("width")]
        return side({key: value}, key, size)

    is_cropped, edge = bool(cfg.get("do_center_crop")), sides("size")
    kind = str(cfg.get("image_processor_type", cfg.get("feature_extractor_type")))
    # Before sizes had names, CLIP's was the shorter edge.
    is_square = "height" in cfg["size"] if isinstance(cfg["size"], dict) else not kind.startswith("CLIP")
    final = sides("crop_size") if is_cropped else edge
    if final > edge:
        notes.append(f"preprocessor_config.json pads {edge} to {final} px, which is not followed: not supported")
        edge = final
    if not (is_cropped or is_square):
        notes.append("preprocessor_config.json does not crop the longer side; the middle of it is taken")
    notes.extend(_other_size(final, size) if is_cropped or is_square else [])
    resized = round(edge * size / final)
    crop_pct = size / resized
    while int(size / crop_pct) < resized:  # a quotient that is rounded up
        crop_pct = math.nextafter(crop_pct, 0)
    return {"crop_mode": "squash" if is_square else "center", "crop_pct": crop_pct}


def _other_size(stated: int, size: int) -> list[str]:
    text = f"images are prepared at {stated} px by the file and the model takes {size} px: they are resized to that"
    return [text] if stated != size else []


def classes(source: Source, num_classes: int, notes: list[str]) -> list[str] | None:
    """The names of the head's outputs in their order; None, with a note if there is a head, where nobody says them."""
    inner = source.settings.get("pretrained_cfg")
    places = [source.settings, inner if isinstance(inner, dict) else {}]
    keys = ("id2label", "label_names", "labels", "classes", "CLASSES")  # transformers; timm, its first; ours; mmseg
    told = next((place[key] for key in keys for place in places if place.get(key)), None) if num_classes else None
    if isinstance(told, dict):
        told = [told.get(str(i), told.get(i)) for i in range(len(told))]
    names = [printable(str(name)) for name in told] if isinstance(told, (list, tuple)) else []
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names):  # transformers' filling, or nothing
        notes.extend(["the file does not name its classes"] if num_classes else [])
    elif None in told or len(names) != num_classes:
        notes.append(f"the file's names of classes are not {num_classes}, as the head has: they are left out")
    else:
        notes.append(f"classes: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}, as the file says")
        return names
    return None
