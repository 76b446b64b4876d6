"""Mean IoU of sliding windows against a plain loop in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from tinymim_jax.evals import segmentation

WINDOW, STRIDE, FINE, CLASSES = 48, 32, 12, 5


def starts(size):
    """mmseg's: the last window ends at the border."""
    count = max(size - WINDOW + STRIDE - 1, 0) // STRIDE + 1
    return [max(min(i * STRIDE, size - WINDOW), 0) for i in range(count)]


def an_image(sizes, original, unused=0, seed=0):
    """Its fields, as the evaluator reads them, and logits of its windows and of some that are not used."""
    rng = np.random.default_rng(seed)
    grids = [[starts(side) for side in size] for size in sizes]
    places = [(v, y, x) for v, (rows, columns) in enumerate(grids) for y in rows for x in columns]
    shown = [np.minimum(sizes[view], WINDOW) for view, *_ in places] + [(0, 0)] * unused
    places += [(0, 0, 0)] * unused
    mask = np.full((256, 384), 255, np.uint8)
    mask[: original[0], : original[1]] = rng.choice([*range(CLASSES), 255], original)
    row = {
        "place": [place[1:] for place in places], "view": [place[0] for place in places], "extent": shown,
        "grid": [list(map(len, grid)) for grid in grids], "size": sizes, "original": original,
    }  # fmt: skip
    row = {name: np.array(value, np.int32) for name, value in row.items()}
    logits = rng.normal(size=(2, len(places), FINE, FINE, CLASSES)).astype(np.float32)
    return {**row, "mask": mask}, logits


def by_a_loop(logits, row, view, is_mirrored):
    """[1, C, H, W]"""
    size, many = row["size"][view].tolist(), len(row["place"])
    total, count = torch.zeros(1, CLASSES, *size), torch.zeros(1, 1, *size)
    for i in (i for i in range(many) if row["view"][i] == view and row["extent"][i].any()):
        window, (y, x), shown = logits[i], row["place"][i].tolist(), row["extent"][i].tolist()
        fine = functional.interpolate(torch.tensor(window).permute(2, 0, 1)[None], (WINDOW, WINDOW), mode="bilinear")
        part = (..., slice(y, y + WINDOW), slice(x, x + WINDOW))
        seen = fine[..., : shown[0], : shown[1]]
        total[part] += seen.flip(-1) if is_mirrored else seen
        count[part] += 1
    return functional.interpolate(total / count, row["original"].tolist(), mode="bilinear")


CASES = {
    "two windows": ([(48, 70)], (96, 140), 0),
    "one, larger than the original": ([(48, 50)], (30, 31), 2),
    "a grid": ([(100, 120)], (90, 300), 4),
    "an image smaller than a window": ([(40, 44)], (80, 88), 0),
    "three sizes": ([(24, 35), (48, 70), (84, 123)], (96, 140), 3),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("views", [1, 2])
def test_each_pixel_is_as_in_a_loop(case, views):
    row, logits = an_image(*CASES[case])
    pixels = [by_a_loop(logits[i], row, view, bool(i)) for view in range(len(row["size"])) for i in range(views)]
    expected = pixels[0] if len(pixels) == 1 else torch.stack([p.softmax(1) for p in pixels]).mean(0)
    tile = jax.jit(segmentation.tile, static_argnums=3)
    height, width = row["original"]
    for y in range(0, height, segmentation.TILE):
        for x in range(0, width, segmentation.TILE):
            found = tile(logits[:views], row, jnp.array([y, x]), WINDOW)[: height - y, : width - x]
            own = expected[0, :, y : y + segmentation.TILE, x : x + segmentation.TILE].permute(1, 2, 0)
            np.testing.assert_allclose(found, own, atol=2e-5)
    counts = jax.jit(segmentation.confusion, static_argnums=2)(logits[:views], row, WINDOW)
    truth, predicted = row["mask"][:height, :width], expected.argmax(1)[0].numpy()
    counted = truth != 255
    table = np.zeros((CLASSES, CLASSES), int)
    np.add.at(table, (truth[counted], predicted[counted]), 1)
    assert np.abs(counts - table).sum() <= 4  # of nearly equal logits
    assert counts.sum() == counted.sum()


def test_scores_of_a_table_by_hand():
    """Class 2 is nowhere, class 3 is predicted alone: the one does not count, the other has no accuracy."""
    table = np.array([[6, 2, 0, 0], [1, 3, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0]])
    scalars, iou = segmentation.scores(table)
    np.testing.assert_allclose(iou, [100 * 6 / 9, 100 * 3 / 8, np.nan, 0])
    assert scalars == pytest.approx({"mIoU": np.mean([600 / 9, 37.5, 0]), "mAcc": (75 + 50) / 2, "aAcc": 100 * 9 / 14})
