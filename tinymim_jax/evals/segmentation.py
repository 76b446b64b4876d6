"""Mean IoU of whole images, whose logits come from sliding windows (mmseg's slide inference).

What stands between a window's logits and a pixel of the original image is linear: windows are made finer, added up
where they overlap, divided by how many there are, and resized. So each axis has a matrix, made on the device from a
few numbers, and one program serves images of all sizes that have as many windows.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.data import dense, sources
from tinymim_jax.data.config import Data
from tinymim_jax.evals import labels
from tinymim_jax.evals.contract import Batch, Batches, Context, Eval, Result, Variables
from tinymim_jax.models.contract import Encoder, Outputs
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError

TILE = 128  # pixels a side of the original that are worked on at once


@dataclasses.dataclass
class Segmentation(Eval):
    """Mean IoU and accuracy of pixels, in percent."""

    data: Data  # with masks
    flip: bool = False  # the mean probability of an image and its mirror image
    ratios: tuple[float, ...] = ranged((1.0,), above=0)  # and of it at so many times its size
    kind: Literal["segmentation"] = "segmentation"
    batch_size: int = ranged(8, at_least=1)  # windows

    needs_pixels: ClassVar[bool] = True

    def build(self, context: Context) -> "MeanIoU":
        return MeanIoU(self, context)

    def check(self, where: str, model: Encoder, training: Data) -> None:
        super().check(where, model, training)
        if self.data.masks is None:
            raise InputError(f"{where}.data.masks is none: masks are what predictions are compared with; set it")
        if not self.ratios:
            raise InputError(f"{where}.ratios names no size of images; set it to (1.0,)")
        for field in ("num_classes", "zero_is_ignored", "ignored") if training.masks else ():
            if getattr(self.data.masks, field) != getattr(training.masks, field):
                raise InputError(f"{where}.data.masks.{field} differs from that of the stage's data; make them equal")

    def metrics(self) -> list[str]:
        return ["mIoU", "mAcc", "aAcc", "images"]


class MeanIoU:
    """{"mIoU", "mAcc", "aAcc"} in percent and {"images"}; arrays: IoU by class and the confusion of pixels."""

    others: Mapping[str, Variables] = {}

    def __init__(self, cfg: Segmentation, context: Context):
        self.cfg, self.predict = cfg, context.predict
        source = sources.open_source(cfg.data)
        self.classes, self.columns = source.classes or context.classes, None
        if source.classes and context.classes:
            self.columns = labels.order(context.classes, source.classes, cfg.data.path or cfg.data.source)[0]
        self.passes = by_windows(cfg.data, source, cfg.batch_size, context.mesh, cfg.ratios)

    def update(self, variables: Variables, frozen: Any, others: Any, batch: Batch) -> dict[str, jax.Array]:
        predict = functools.partial(self.predict, variables, frozen)
        logits, window = window_logits(predict, batch, self.cfg.flip), self.cfg.data.image_size
        logits = logits if self.columns is None else logits[..., self.columns]
        found = jax.vmap(lambda own, row: confusion(own, row, window))(logits, batch)
        is_valid = batch["is_valid"]
        return {"confusion": jnp.where(is_valid[:, None, None], found, 0).sum(axis=0), "images": is_valid.sum()}

    def finish(self, found: Mapping[Hashable, list[dict[str, np.ndarray]]]) -> Result:
        parts = [one for batches in found.values() for one in batches]
        table = sum(one["confusion"].astype(np.int64) for one in parts)
        images = float(sum(one["images"] for one in parts))
        if not table.sum():
            raise InputError("no pixel of the evaluation set counts; mend its masks")
        scalars, iou = scores(table)
        names = np.array(self.classes or (), str)
        return Result({**scalars, "images": images}, {"iou": iou, "confusion": table, "classes": names})


def scores(table: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Confusion int [C, C], of truth and prediction -> scalars and IoU [C], percent; NaN, and left out: no pixel."""
    hits, truth, predicted = np.diag(table).astype(float), table.sum(axis=1), table.sum(axis=0)
    with np.errstate(invalid="ignore"):
        iou, accuracy = 100 * hits / (truth + predicted - hits), 100 * hits / truth
    means = {"mIoU": np.nanmean(iou), "mAcc": np.nanmean(accuracy), "aAcc": 100 * hits.sum() / table.sum()}
    return {name: float(value) for name, value in means.items()}, iou


def by_windows(
    data: Data, source: sources.Source, at_once: int, mesh: jax.sharding.Mesh, ratios: tuple[float, ...] = (1.0,)
) -> dict[int, Batches]:
    """The whole data set by how many windows an image has, rounded up to 1, 2, 4, ...: few programs serve all sizes.

    `at_once` is the number of windows in a batch; of each image they are those at each of `ratios` of its size.
    """
    sizes = dense.sizes(source, data.on_bad_image)
    if not sizes.any():
        raise InputError(f"none of the {len(sizes)} images can be decoded; mend the data")
    grids = [[dense.eval_grid(tuple(size), data, ratio) for ratio in ratios] if size.any() else [[0]] for size in sizes]
    windows = np.array([sum(map(len, grid)) for grid in grids])
    counts = 2 ** np.ceil(np.log2(windows)).astype(int)
    canvas = tuple(int(-(-side // TILE) * TILE) for side in sizes.max(axis=0))
    return {
        count: Batches(
            data, max(1, at_once // count), mesh, dense.windows(count, canvas, tuple(ratios)), is_labelled=False,
            source=sources.Chosen(source, np.flatnonzero(counts == count)),
        )
        for count in np.unique(counts).tolist()
    }  # fmt: skip


def window_logits(predict: Callable[[Batch], Outputs], batch: Batch, flip: bool) -> jax.Array:
    """[B, F, K, h, w, C] of a batch of `by_windows`; F is 2 if mirror images are seen, too, and come second."""
    windows, extent, views = batch["windows"], batch["extent"], []
    b, k, side = windows.shape[:3]
    for is_mirrored in (False, True) if flip else (False,):
        if is_mirrored:  # within their extent
            column, width = jnp.arange(side), extent[..., 1:]
            order = jnp.where(column < width, width - 1 - column, column)
            windows = jnp.take_along_axis(windows, order[:, :, None, :, None], axis=3)
        images = windows.reshape(b * k, *windows.shape[2:])
        pixels = predict({"image": images, "extent": extent.reshape(b * k, 2)}).pixels
        if pixels is None:
            raise InputError("the model has no head for pixels; train one with task 'segment'")
        views.append(pixels.reshape(b, k, *pixels.shape[1:]))
    return jnp.stack(views, axis=1)


def confusion(logits: jax.Array, row: Batch, window: int) -> jax.Array:
    """Logits [F, K, h, w, C] of an image's windows and of their mirror images, and its fields -> pixels [C, C], truth
    by prediction.
    """
    classes = logits.shape[-1]

    def visit(found: jax.Array, corner: jax.Array, predicted: jax.Array) -> jax.Array:
        truth = jax.lax.dynamic_slice(row["mask"], corner, (TILE, TILE))
        one_hot = [jax.nn.one_hot(x.ravel(), classes, dtype=jnp.float32) for x in (truth, predicted)]
        return found + (one_hot[0].T @ one_hot[1]).astype(jnp.int32)  # exact: sums of at most TILE^2 ones

    return over_tiles(logits, row, window, jnp.zeros((classes, classes), jnp.int32), visit)


def painted(logits: jax.Array, row: Batch, window: int) -> jax.Array:
    """As `confusion`: the class of each pixel, uint8, as large as the mask of the row."""

    def visit(found: jax.Array, corner: jax.Array, predicted: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(found, predicted.astype(jnp.uint8), corner)

    return over_tiles(logits, row, window, jnp.zeros_like(row["mask"]), visit)


def over_tiles(
    logits: jax.Array, row: Batch, window: int, begin: jax.Array, visit: Callable[..., jax.Array]
) -> jax.Array:
    """`begin` after visit(it, corner, classes [TILE, TILE]) of each tile of the original image."""
    down, across = (-(-row["original"][axis] // TILE) for axis in (0, 1))

    def body(i: jax.Array, found: jax.Array) -> jax.Array:
        corner = TILE * jnp.stack([i // across, i % across])
        return visit(found, corner, jnp.argmax(tile(logits, row, corner, window), axis=-1))

    return jax.lax.fori_loop(0, down * across, body, begin)


def tile(logits: jax.Array, row: Batch, corner: jax.Array, window: int) -> jax.Array:
    """[TILE, TILE, C] of the original image from `corner` on: logits, or mean probabilities of several views."""
    views = []
    for view, (mirror, own) in itertools.product(range(len(row["size"])), enumerate(logits)):
        down, across = (
            axis_matrices(row, view, axis, corner[axis], window, own.shape[1 + axis], bool(mirror and axis))
            for axis in (0, 1)
        )
        rows = jnp.einsum("kyu,kuvc->kyvc", down, own, precision="highest")
        views.append(jnp.einsum("kyvc,kxv->yxc", rows, across, precision="highest"))
    return views[0] if len(views) == 1 else jax.nn.softmax(jnp.stack(views)).mean(axis=0)


def axis_matrices(
    row: Batch, view: int, axis: int, start: jax.Array, window: int, fineness: int, is_mirrored: bool = False
) -> jax.Array:
    """[K, TILE, fineness]: what each of TILE pixels of the original reads of one axis of each window's logits.

    `view` is the number of the size whose windows are meant; the others are 0.

    Pixels lie between two of the resized image, and these between two logits of each window that covers them.
    """
    size, original, place = row["size"][view, axis], row["original"][axis], row["place"][:, axis, None]
    extent, is_meant = row["extent"][:, axis, None], (row["view"] == view)[:, None]
    at = (jnp.arange(TILE) + start + 0.5) * size / original - 0.5
    found = jnp.zeros((len(place), TILE, fineness))
    for pixel, share in _neighbours(at, size):
        own = pixel - place  # [K, TILE]
        covers = is_meant & (own >= 0) & (own < extent)
        many = covers.sum(axis=0) / row["grid"][view, 1 - axis]  # of those beside each other in this axis
        own = extent - 1 - own if is_mirrored else own
        for logit, part in _neighbours((own + 0.5) * fineness / window - 0.5, fineness):
            weight = jnp.where(covers, share * part / jnp.maximum(many, 1), 0.0)
            found += weight[..., None] * jax.nn.one_hot(logit, fineness)
    return found


def _neighbours(at: jax.Array, size: jax.Array | int) -> list[tuple[jax.Array, jax.Array]]:
    """The two places of 0 to size - 1 that `at` lies between, with their shares (torch's bilinear)."""
    at = jnp.clip(at, 0, size - 1)
    low = jnp.floor(at)
    share = at - low
    low = low.astype(jnp.int32)
    return [(low, 1 - share), (jnp.minimum(low + 1, size - 1), share)]
