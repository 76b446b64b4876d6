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

    `title` also gives the charts their keys.
    """
    if "kind" not in arrays:
        return curves.by_class(arrays, key(title), title)
    kind = str(arrays["kind"])
    return KINDS[kind](arrays, key(title), title) if kind in KINDS else []


def cka(arrays: Arrays, name: str, title: str) -> list[Chart]:
    """Similarity of each pair of layers, the first layer of model 1 at the bottom."""
    one, other = (str(arrays["models"][i]) for i in (0, -1))  # of one model with itself, only that is named
    rows, columns = (list(map(str, arrays[axis])) for axis in ("rows", "columns"))
    labels, values, error = (f"layers of {other}", f"layers of {one}"), arrays["cka"], arrays["cka_error"]
    return [Heatmap(name, title, *labels, rows, columns, values, "CKA", 1.0, error, bottom_up=True)]


def attention(arrays: Arrays, name: str, title: str) -> list[Chart]:
    """How far the heads of each block look, and how evenly."""
    blocks = list(map(str, arrays["blocks"]))
    return [
        Boxes(f"{name}_{what}", f"{title}: attention {what} by head", "block", f"{what}, {unit}", blocks,
              [heads[np.isfinite(heads)] for heads in arrays[what]],  # blocks may have different numbers of them
              float(arrays[f"uniform_{what}"]), "uniform attention")
        for what, unit in (("distance", "pixels"), ("entropy", "nats"))
    ]  # fmt: skip


def relation(arrays: Arrays, name: str, title: str) -> list[Chart]:
    """KL of teacher and student by head, and their maps for a choice of image, blocks, relation and head."""
    relations = list(map(str, arrays["relations"]))
    pairs = [f"{teacher} → {student}" for teacher, student in arrays["blocks"]]
    kl, sides = arrays["kl"], (arrays["teacher"], arrays["student"])
    heads = [str(head + 1) for head in range(kl.shape[-1])]
    rows = [f"{pair} {of}" for pair in pairs for of in relations]
    values = kl.reshape(len(rows), len(heads))
    charts: list[Chart] = [
        Heatmap(f"{name}_kl", f"{title}: KL of the relations by head", "head", "blocks, relation", rows, heads, values,
                "KL, nats")
    ]  # fmt: skip
    images = [np.float32(image / 255) for image in arrays["images"]]
    grids = {}
    for where in np.ndindex(len(images), *kl.shape):
        of = f"{relations[where[2]].upper()}, blocks {pairs[where[1]]}, head {heads[where[3]]}"
        row = [images[where[0]], *(np.float32(side[where] / 255) for side in sides)]
        grids[where] = Panels(of, [row], [], ["image", "teacher", f"student, KL {kl[where[1:]]:.3g}"])
    numbers = [str(i + 1) for i in range(len(images))]
    axes = {"image": numbers, "blocks, teacher → student": pairs, "relation": relations, "head": heads}
    charts += [Pictures(f"{name}_maps", f"{title}: what each token relates to", axes, grids)] if grids else []
    return charts


def spectrum(arrays: Arrays, name: str, title: str) -> list[Chart]:
    """In how many directions the features of each layer spread, and how long they are."""
    layers = list(map(str, arrays["layers"]))
    return [
        Bars(f"{name}_{what}", f"{title}: {said}", said, layers, arrays[what])
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
