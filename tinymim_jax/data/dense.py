"""Images with masks: crops to train on and sliding windows to evaluate on, one geometry for both parts of a record.

Sizes and places are (height, width) and (row, column). Resizing, crops and windows are mmcv's and mmsegmentation's.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
from typing import Literal

import numpy as np
from PIL import Image

from tinymim_jax.data import fast_jpeg
from tinymim_jax.data.augment import mirrored
from tinymim_jax.data.config import Data, Masks
from tinymim_jax.data.decode import decode, decode_mask, image_size, skipping
from tinymim_jax.data.fields import Example, Fields, Record
from tinymim_jax.data.sources import Source
from tinymim_jax.runtime.errors import InputError

IGNORED = 255  # in a mask: of no class
UNKNOWN = 254  # while a mask is read: a value that no class has
REDRAWS = 10  # of a crop that shows too little

Size = tuple[int, int]


def resized(size: Size, masks: Masks, ratio: float = 1.0) -> Size:
    """What an image of `size` becomes: as large as fits into `masks.scale` times `ratio`, its aspect kept (mmcv)."""
    longer, shorter = (int(side * ratio) for side in masks.scale)
    scale = min(longer / max(size), shorter / min(size))
    height, width = (max(1, int(side * scale + 0.5)) for side in size)
    return height, width


def eval_size(size: Size, data: Data, ratio: float = 1.0) -> Size:
    """What an image of `size` becomes in evaluation, at so many times its plain size."""
    side = max(1, int(data.image_size * ratio))
    return (side, side) if data.masks.squash else resized(size, data.masks, ratio)


def window_grid(size: Size, window: int, stride: int) -> list[Size]:
    """The upper left corners of the windows that cover `size`, row by row; the last ones end at the border."""
    rows, columns = (
        [min(i * stride, max(side - window, 0)) for i in range(max(side - window + stride - 1, 0) // stride + 1)]
        for side in size
    )
    return [(row, column) for row in rows for column in columns]


def eval_grid(size: Size, data: Data, ratio: float = 1.0) -> list[Size]:
    """`window_grid` of an image whose file has `size`."""
    return window_grid(eval_size(size, data, ratio), data.image_size, data.masks.window_stride(data.image_size))


def sizes(source: Source, on_bad_image: Literal["stop", "skip"] = "stop") -> np.ndarray:
    """int64 [n, 2] of all images, from their headers; raises InputError, or with "skip" gives 0 for what is damaged."""

    def size(index: int) -> Size:
        with skipping(on_bad_image), _header(source, index) as image:
            return image_size(image, source.describe(index))
        return 0, 0

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return np.array(list(pool.map(size, range(len(source)))), np.int64).reshape(-1, 2)


def _header(source: Source, index: int) -> contextlib.AbstractContextManager:
    """What begins with an image's header: an open file, where the source has files."""
    if hasattr(source, "open_image"):
        return source.open_image(index)
    return contextlib.nullcontext(source[index]["image"])


def nearest(mask: np.ndarray, size: Size, place: Size, extent: Size) -> np.ndarray:
    """[H, W] resized to `size`, thereof `extent` pixels from `place`: OpenCV's INTER_NEAREST, floor(x * scale)."""
    rows, columns = (
        np.arange(start, start + count) * full // new
        for full, new, start, count in zip(mask.shape, size, place, extent, strict=True)
    )
    return mask.take(rows, axis=0).take(columns, axis=1)


def bilinear(image: np.ndarray, full: Size, size: Size, place: Size, extent: Size) -> np.ndarray:
    """As `nearest`, of uint8 [H, W, 3]: OpenCV's INTER_LINEAR, up to a level; rows of `full` may lack at the bottom."""
    (top, height), (left, width) = (
        (start * old / new, count * old / new) for old, new, start, count in zip(full, size, place, extent, strict=True)
    )
    y, x = max(int(top) - 1, 0), max(int(left) - 1, 0)
    part = image[y : _end(top + height), x : _end(left + width)]
    top, left = top - y, left - x
    box = left, top, min(width, part.shape[1] - left), min(height, part.shape[0] - top)  # less what rounding adds
    return fast_jpeg.resize(part, box, extent, "bilinear", antialias=False)


def _end(edge: float) -> int:
    """Behind the last pixel that is mixed into what ends at `edge`."""
    return int(edge) + 2


def classes_of(record: Record, name: str, masks: Masks) -> np.ndarray:
    """The class of each pixel of a record's mask, or `IGNORED`, uint8 [H, W].

    Raises InputError that begins with `name`.
    """
    values = decode_mask(record, name)
    classes = _table(masks.num_classes, masks.zero_is_ignored, masks.ignored).take(values)
    if (odd := classes == UNKNOWN).any():
        first = int(masks.zero_is_ignored)
        raise InputError(
            f"{name}: its mask has the value {values[odd].min()}, and classes are {first} to"
            f" {masks.num_classes - 1 + first}; raise masks.num_classes, or list the value in masks.ignored"
        )
    return classes


@functools.lru_cache(maxsize=16)
def _table(num_classes: int, zero_is_ignored: bool, ignored: tuple[int, ...]) -> np.ndarray:
    """uint8 [256]: what each value in a file means."""
    values = np.arange(256) - zero_is_ignored
    table = np.where((values >= 0) & (values < num_classes), values, UNKNOWN).astype(np.uint8)
    table[[*ignored, IGNORED, *[0] * zero_is_ignored]] = IGNORED
    return table


def draw_crop(classes: np.ndarray, size: Size, data: Data, rng: np.random.Generator) -> tuple[Size, np.ndarray]:
    """The place of a crop of an image that is resized to `size`, and its mask, [<= S, <= S].

    Drawn anew up to ten times, until it shows two classes or more, none on `masks.max_share` of what is not ignored.
    """
    extent = min(size[0], data.image_size), min(size[1], data.image_size)
    for _ in range(1 + REDRAWS):
        row, column = (int(rng.integers(side - shown + 1)) for side, shown in zip(size, extent, strict=True))
        mask = nearest(classes, size, (row, column), extent)
        if size == extent or _is_varied(mask, data.masks.max_share):
            break
    return (row, column), mask


def _is_varied(mask: np.ndarray, max_share: float) -> bool:
    if max_share == 1:
        return True
    counts = Image.fromarray(mask).histogram()[:IGNORED]  # of a third of numpy's time
    return 0 < max(counts) < max_share * sum(counts)


def _crop(record: Record, name: str, full: Size, size: Size, place: Size, extent: Size, is_fast: bool) -> np.ndarray:
    """Pixels of a record's image, decoded no further down than they need."""
    image = record["image"]
    header = fast_jpeg.read_header(image) if is_fast and isinstance(image, bytes) else None
    pixels = None
    if header is not None:
        pixels = fast_jpeg.decode_rows(image, header, min(full[0], _end((place[0] + extent[0]) * full[0] / size[0])))
    if pixels is None:
        pixels = np.asarray(decode(image, name))
    return bilinear(pixels, full, size, place, extent)


def _padded(part: np.ndarray, size: Size, fill: int) -> np.ndarray:
    """Filled up to `size` at the bottom and on the right."""
    if part.shape[:2] == size:
        return part
    whole = np.full((*size, *part.shape[2:]), fill, part.dtype)
    whole[: part.shape[0], : part.shape[1]] = part
    return whole


def _empty_image_mask(data: Data) -> Example:
    image = np.zeros((data.image_size, data.image_size, 3), np.uint8)
    return {"image": image, "mask": image[..., 0], "extent": np.zeros(2, np.int32)}


def _read_image_mask(record: Record, name: str, data: Data, rng: np.random.Generator) -> Example:
    classes = classes_of(record, name, data.masks)
    if data.transform == "eval":  # of a picture: all of it
        whole = dataclasses.replace(data.masks, scale=(data.image_size, data.image_size), ratio=(1.0, 1.0))
        data = dataclasses.replace(data, masks=whole, hflip=0.0)
    size = resized(classes.shape, data.masks, rng.uniform(*data.masks.ratio))
    place, mask = draw_crop(classes, size, data, rng)
    image = _crop(record, name, classes.shape, size, place, mask.shape, data.fast_crop)
    extent = np.array(mask.shape, np.int32)
    if rng.random() < data.hflip:
        image, mask = mirrored(image), mask[:, ::-1]
    square = data.image_size, data.image_size
    return {"image": _padded(image, square, 0), "mask": _padded(mask, square, IGNORED), "extent": extent}


def _empty_windows(count: int, canvas: Size, ratios: tuple[float, ...], data: Data) -> Example:
    side = data.image_size
    shapes = {"place": (count, 2), "extent": (count, 2), "view": (count,), "original": (2,)}
    shapes |= dict.fromkeys(("grid", "size"), (len(ratios), 2))
    return {
        "windows": np.zeros((count, side, side, 3), np.uint8),
        **{name: np.zeros(shape, np.int32) for name, shape in shapes.items()},
        "mask": np.zeros(canvas, np.uint8),
    }


def _read_windows(
    count: int, canvas: Size, ratios: tuple[float, ...], record: Record, name: str, data: Data, rng: np.random.Generator
) -> Example:
    classes = classes_of(record, name, data.masks)
    original, side = classes.shape, data.image_size
    grids = [eval_grid(original, data, ratio) for ratio in ratios]
    if (many := sum(map(len, grids))) > count or original[0] > canvas[0] or original[1] > canvas[1]:
        raise InputError(
            f"{name}: {original[1]} x {original[0]} pixels and {many} windows of {side} are more than the"
            f" {canvas[1]} x {canvas[0]} and {count} there is room for; group images by `sizes` first"
        )
    pixels, at = np.asarray(decode(record["image"], name)), 0
    example = {**_empty_windows(count, canvas, ratios, data), "mask": _padded(classes, canvas, IGNORED)}
    example["original"][:] = original
    for view, (ratio, grid) in enumerate(zip(ratios, grids, strict=True)):
        size = eval_size(original, data, ratio)
        image = bilinear(pixels, original, size, (0, 0), size)
        for row, column in grid:
            part = image[row : row + side, column : column + side]
            example["windows"][at, : part.shape[0], : part.shape[1]] = part
            example["place"][at], example["extent"][at], example["view"][at] = (row, column), part.shape[:2], view
            at += 1
        example["size"][view], example["grid"][view] = size, [len({place[axis] for place in grid}) for axis in (0, 1)]
    return example


# Image uint8 [B, S, S, 3], mask uint8 [B, S, S], extent int32 [B, 2]: the rows and columns that hold image. Behind
# them, at the bottom and on the right, pixels are 0 (to be set so once more when they are normalised) and masks 255.
IMAGE_MASK = Fields(_empty_image_mask, _read_image_mask)


def windows(count: int, canvas: Size, ratios: tuple[float, ...] = (1.0,)) -> Fields:
    """Whole images, at each of R ratios of their size, as up to `count` windows, and masks of up to `canvas` pixels.

    windows uint8 [B, count, S, S, 3]; place int32 [B, count, 2], the corner of each; extent int32 [B, count, 2], its
    rows and columns that hold image, 0 where there is no window; view int32 [B, count], the number of its ratio;
    grid int32 [B, R, 2], windows in a column and in a row; size int32 [B, R, 2], of the resized image; original int32
    [B, 2], of the file; mask uint8 [B, *canvas], the truth at the original size, padded with 255.
    """
    empty, read = (functools.partial(make, count, canvas, ratios) for make in (_empty_windows, _read_windows))
    return Fields(empty, read)
