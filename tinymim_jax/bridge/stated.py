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
    else:
        place = settings.get("pretrained_cfg" if source.format == "timm" else "preprocessing")
        # timm's first config.json was flat.
        found = _of_timm(place if isinstance(place, dict) else settings if source.format == "timm" else {}, size, notes)
    found |= {key: value for key, value in (("mean", told.mean), ("std", told.std)) if value}
    stated = {key: found[key] for key in IMAGENET if _is_rgb(found.get(key)) and (key == "mean" or min(found[key]) > 0)}
    if len(stated) < 2:
        notes.append("pixels are normalised with ImageNet's mean and std, which the file does not say (--mean, --std)")
        stated = {}
    if len(found.keys() - IMAGENET.keys()) < 2:
        notes.append("images are resized and cropped as MAE evaluates (bicubic, 0.875) where the file does not say how")
    pixels = {key: [float(x) for x in values] for key, values in {**IMAGENET, **stated}.items()}
    return {**found, **pixels}, bool(stated)


def _is_rgb(values: Any) -> bool:
    is_three = isinstance(values, (list, tuple)) and len(values) == 3
    return is_three and all(type(x) in (int, float) and abs(x) < 1e6 for x in values)


def _of_timm(cfg: dict[str, Any], size: int, notes: list[str]) -> dict[str, Any]:
    """timm's pretrained_cfg, and what our own exports say in its words."""
    found = {key: cfg[key] for key in IMAGENET if cfg.get(key)}
    if (shape := cfg.get("input_size")) and isinstance(shape, (list, tuple)) and len(shape) == 3:
        other = side({"input_size": shape[1:]}, "input_size", size)
        notes.extend(_other_size(other, size))
    accepted = {
        "interpolation": lambda v: v in RESAMPLE,
        "crop_pct": lambda v: type(v) in (int, float) and 0 < v <= 1,
        "crop_mode": lambda v: v in ("center", "squash"),
    }
    for key, is_fine in accepted.items():
        if cfg.get(key) is None:
            continue
        if is_fine(cfg[key]):
            found[key] = float(cfg[key]) if key == "crop_pct" else cfg[key]
        else:
            notes.append(printable(f"{key} {cfg[key]!r} of the file is not followed in evaluation: not supported"))
    return found


def _of_transformers(cfg: Any, size: int, notes: list[str]) -> dict[str, Any]:
    """preprocessor_config.json."""
    if not isinstance(cfg, dict):
        return {}
    for key in [key for key, value in cfg.items() if value and not re.fullmatch(FOLLOWED, key)]:
        notes.append(printable(f"{key} of preprocessor_config.json is not followed in evaluation: not supported"))
    scale = 255 * (cfg.get("rescale_factor") or 1 / 255) if cfg.get("do_rescale", True) else 255.0
    found = {"mean": cfg.get("image_mean"), "std": cfg.get("image_std")}
    if cfg.get("do_normalize", True) is False:
        found = {"mean": [0.0] * 3, "std": [1.0] * 3}
    if type(scale) in (int, float) and scale > 0 and not math.isclose(scale, 1, rel_tol=1e-6):
        found = {key: [x / scale for x in values] if _is_rgb(values) else values for key, values in found.items()}
    if cfg.get("do_resize", True) is False:
        notes.append("preprocessor_config.json does not resize; images that are not as large as the model's are")
        return found | {"crop_pct": 1.0, "interpolation": "bicubic"}
    if (resample := cfg.get("resample")) is not None:  # PIL's number
        name = next((name for name, value in RESAMPLE.items() if value == resample), None)
        if name is None:
            raise InputError(f"preprocessor_config.json: resample is {resample!r}; it must be a number from 0 to 5")
        found["interpolation"] = name
    return found | (_resizing(cfg, size, notes) if cfg.get("size") else {})


def _resizing(cfg: dict[str, Any], size: int, notes: list[str]) -> dict[str, Any]:
    """crop_mode and crop_pct of a processor that resizes, and perhaps crops."""

    def sides(key: str) -> tuple[int, bool]:
        value, kind = cfg.get(key) or size, str(cfg.get("image_processor_type", cfg.get("feature_extractor_type", "")))
        if isinstance(value, dict) and set(value) == {"shortest_edge"}:
            return side(value, "shortest_edge", size), False
        pair = [value.get("height"), value.get("width")] if isinstance(value, dict) else value
        is_square = cfg.get("default_to_square", not kind.startswith("CLIP")) or isinstance(value, dict)
        return side({key: pair}, f"{key}", size), bool(is_square)

    edge, is_squashed = sides("size")
    final = sides("crop_size")[0] if cfg.get("do_center_crop") else edge
    if final > edge:
        notes.append(f"preprocessor_config.json pads {edge} to {final} px, which is not followed: not supported")
        final = edge
    if cfg.get("do_center_crop") or is_squashed:
        notes.extend(_other_size(final, size))
    else:
        notes.append("preprocessor_config.json does not crop the longer side; the middle of it is taken")
    resized = round(edge * size / final)
    crop_pct = size / resized
    while int(size / crop_pct) < resized:  # a quotient that is rounded up
        crop_pct = math.nextafter(crop_pct, 0)
    return {"crop_mode": "squash" if is_squashed else "center", "crop_pct": crop_pct}


def _other_size(stated: int, size: int) -> list[str]:
    text = f"images are prepared at {stated} px by the file and the model takes {size} px: they are resized to that"
    return [text] if stated != size else []


def classes(source: Source, num_classes: int, notes: list[str]) -> list[str] | None:
    """The names of the head's outputs in their order; None, with a note if there is a head, where nobody says them."""
    settings = source.settings
    inner = settings.get("pretrained_cfg") if isinstance(settings.get("pretrained_cfg"), dict) else {}
    # transformers; timm, and before version 0.9; our own exports
    places = ("id2label", "label_names", "labels", "classes")
    told = next((s[key] for key in places for s in (settings, inner) if s.get(key)), None) if num_classes else None
    if isinstance(told, dict):
        told = [told.get(str(i), told.get(i)) for i in range(len(told))]
    names = [printable(str(name)) for name in told] if isinstance(told, (list, tuple)) else []
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names):  # transformers' filling, or nothing
        notes.extend(["the file does not name its classes"] if num_classes else [])
        return None
    if None in told or len(names) != len(set(names)) or len(names) != num_classes:
        notes.append(f"the file's names of classes are not {num_classes} different ones, as the head has: left out")
        return None
    notes.append(f"classes: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}, as the file says")
    return names
