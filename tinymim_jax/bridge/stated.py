"""What a foreign checkpoint states beside its weights: the names of its classes."""

import re

from tinymim_jax.bridge.files import Source, printable


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
