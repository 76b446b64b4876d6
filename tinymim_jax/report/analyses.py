"""Charts of analyses: arrays with a `kind`, as evaluations and `analyze` store them."""

from collections.abc import Callable, Mapping

import numpy as np
from etils.epath import Path

from tinymim_jax.report import curves
from tinymim_jax.report.charts import Bars, Boxes, Chart, Heatmap, Pictures, key
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import Panels

Arrays = Mapping[str, np.ndarray]


def read(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file; raises InputError if it is damaged."""
    try:
        with file.open("rb") as opened, np.load(opened) as arrays:
            return dict(arrays)
    except Exception as error:  # zip, zlib and numpy have their own
        raise InputError(f"{file} is damaged ({type(error).__name__}); evaluate again") from None


def analysis_charts(arrays: Arrays, title: str) -> list[Chart]:
    """The charts of an analysis by its `kind`, or of an evaluation by class; [] if there is nothing to draw.

    `title` also gives the charts their keys. Raises InputError if arrays are missing or do not fit together.
    """
    try:
        kind = str(arrays["kind"]) if "kind" in arrays else None
        if kind is None:
            return curves.by_class(arrays, key(title), title)
        return KINDS[kind](arrays, key(title), title) if kind in KINDS else []
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise InputError(f"{title}: the arrays do not fit together ({error}); analyse again") from None


def cka(arrays: Arrays, name: str, title: str) -> list[Chart]:
    """Similarity of each pair of layers, the first layer of model 1 at the bottom."""
    one, other = (str(arrays["models"][i]) for i in (0, -1))  # of one model with itself, only that is named
    rows, columns = (list(map(str, arrays[axis])) for axis in ("rows", "columns"))
    values, error = np.asarray(arrays["cka"]), np.asarray(arrays["cka_error"])
    if values.shape != (len(rows), len(columns)) or error.shape != values.shape:
        raise ValueError(f"cka {values.shape} for {len(rows)} and {len(columns)} layers")
    labels = f"layers of {other}", f"layers of {one}"
    return [Heatmap(name, title, *labels, rows, columns, values, "CKA", 0.0, 1.0, error, bottom_up=True)]


def attention(arrays: Arrays, name: str, title: str) -> list[Chart]:
    """How far the heads of each block look, and how evenly."""
    blocks = list(map(str, arrays["blocks"]))
    return [
        Boxes(f"{name}_{what}", f"{title}: attention {what} by head", "block", f"{what}, {unit}", blocks,
              _rows(arrays[what], blocks), float(arrays[f"uniform_{what}"]), "uniform attention")
        for what, unit in (("distance", "pixels"), ("entropy", "nats"))
    ]  # fmt: skip


def _rows(values: np.ndarray, names: list[str]) -> list[np.ndarray]:
    if len(values) != len(names):
        raise ValueError(f"{len(values)} rows for {len(names)} names")
    return list(values)


def relation(arrays: Arrays, name: str, title: str) -> list[Chart]:
    """Maps of teacher and student for a choice of image, blocks, relation and head; and their KL by head."""
    relations = list(map(str, arrays["relations"]))
    pairs = [f"{teacher} → {student}" for teacher, student in arrays["blocks"]]
    kl, images, sides = arrays["kl"], arrays["images"], (arrays["teacher"], arrays["student"])
    heads = [str(head + 1) for head in range(kl.shape[-1])]
    shape = len(images), len(pairs), len(relations), len(heads)
    if any(side.shape[:4] != shape for side in sides) or kl.shape != shape[1:]:
        raise ValueError(f"maps {sides[0].shape} and {sides[1].shape}, KL {kl.shape}")
    grids, shown = {}, np.float32(images / 255)
    for where in np.ndindex(shape):
        of = f"{relations[where[2]].upper()}, blocks {pairs[where[1]]}, head {heads[where[3]]}"
        row = [shown[where[0]], *(np.float32(side[where] / 255) for side in sides)]
        grids[where] = Panels(of, [row], [], ["image", "teacher", f"student, KL {kl[where[1:]]:.3g}"])
    numbers = [str(i + 1) for i in range(len(images))]
    axes = {"image": numbers, "blocks, teacher → student": pairs, "relation": relations, "head": heads}
    rows = [f"{pair} {of}" for pair in pairs for of in relations]
    values = np.asarray(kl).reshape(len(rows), -1)
    return [
        Heatmap(f"{name}_kl", f"{title}: KL of the relations by head", "head", "blocks, relation", rows, heads, values,
                "KL, nats"),
        Pictures(f"{name}_maps", f"{title}: what each token relates to", axes, grids),
    ]  # fmt: skip


def spectrum(arrays: Arrays, name: str, title: str) -> list[Chart]:
    """In how many directions the features of each layer spread, and how long they are."""
    layers = list(map(str, arrays["layers"]))
    return [
        Bars(f"{name}_{what}", f"{title}: {said}", said, layers, _rows(arrays[what], layers))
        for what, said in (("effective_rank", "effective rank"), ("norm", "norm of the features"))
    ]


def neighbours(arrays: Arrays, name: str, title: str) -> list[Chart]:
    """Images, and those that are nearest to them."""
    queries, nearest, similarity = arrays["queries"], arrays["nearest"], arrays["similarity"]
    rows = [[q / 255, *(n / 255 for n in near)] for q, near in zip(queries, nearest, strict=True)]
    captions = [["", *(f"{value:.2f}" for value in row)] for row in similarity]
    labels = ["query", *(f"nearest {i + 1}" for i in range(nearest.shape[1]))]
    grid = Panels("cosine similarity below each", rows, [], labels, captions=captions)
    return [Pictures(name, f"{title}: nearest neighbours", {}, {(): grid})]


KINDS: dict[str, Callable[[Arrays, str, str], list[Chart]]] = {
    "cka": cka,
    "attention": attention,
    "relation": relation,
    "spectrum": spectrum,
    "neighbours": neighbours,
}
