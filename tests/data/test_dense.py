"""Crops and windows of images with masks, against plain numpy in float64."""

import dataclasses
import io
import pickle

import jax
import numpy as np
import pytest
from PIL import Image

from tests.data.test_fast_jpeg import jpeg, picture
from tinymim_jax.data import dense, pipeline
from tinymim_jax.data.decode import decode
from tinymim_jax.data.rows import EvalRows, TrainRows, image_rng
from tinymim_jax.experiment.config import Data, Masks
from tinymim_jax.runtime.errors import InputError

MASKS = Masks(20, scale=(200, 50))
TRAIN = Data("pairs", image_size=32, masks=MASKS)
EVAL = dataclasses.replace(TRAIN, transform="eval")
SIZES = ((40, 70), (61, 43), (32, 32), (20, 90), (110, 90))


def png(mask, mode=None):
    buffer = io.BytesIO()
    image = Image.fromarray(mask)
    (image.convert(mode) if mode else image).save(buffer, "PNG")
    return buffer.getvalue()


def blobs(height, width, seed=0, classes=20):
    """Patches of classes, with some 255."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, classes, (height // 8 + 1, width // 8 + 1), np.uint8)
    cells[0, 0] = 255
    return cells.repeat(8, 0).repeat(8, 1)[:height, :width]


class Pictures:
    """Records of all kinds of sizes, as JPEG and PNG or as arrays; a class, so that workers can import it."""

    def __len__(self):
        return len(SIZES)

    def __getitem__(self, index):
        height, width = SIZES[index]
        image, mask = picture(width, height, seed=index), blobs(height, width, index)
        if index % 2:
            return {"image": np.asarray(image), "mask": mask[..., None], "label": -1}
        return {"image": jpeg(image), "mask": png(mask), "label": -1}

    def describe(self, index):
        return f"picture {index}"


def resized_plain(image, size):
    """Bilinear in float64: centres of pixels lie at halves, what is outside is the edge."""
    for axis, new in enumerate(size):
        old = image.shape[axis]
        place = (np.arange(new) + 0.5) * old / new - 0.5
        low = np.floor(place).astype(int)
        share = (place - low).reshape([-1 if a == axis else 1 for a in range(3)])
        below, above = (np.take(image, np.clip(low + i, 0, old - 1), axis=axis) for i in (0, 1))
        image = below * (1 - share) + above * share
    return image


def nearest_plain(mask, size):
    """Pixel by pixel."""
    out = np.empty(size, mask.dtype)
    for y in range(size[0]):
        for x in range(size[1]):
            out[y, x] = mask[int(np.floor(y * mask.shape[0] / size[0])), int(np.floor(x * mask.shape[1] / size[1]))]
    return out


@pytest.mark.parametrize("new", [(35, 47), (90, 120), (61, 83), (20, 25), (40, 200), (1, 1), (130, 30)])
def test_any_part_is_that_of_the_whole_resized(new, either_resizer):
    image = np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8)
    whole = resized_plain(image.astype(np.float64), new)
    levels = nearest_plain(image[..., 0], new)
    rng = np.random.default_rng(1)
    for i in range(30):
        extent = tuple(int(rng.integers(1, side + 1)) for side in new)
        place = tuple(
            int(rng.integers(side - shown + 1)) if i % 3 else side - shown
            for side, shown in zip(new, extent, strict=True)
        )
        part = np.s_[place[0] : place[0] + extent[0], place[1] : place[1] + extent[1]]
        found = dense.bilinear(image, (61, 83), new, place, extent)
        assert np.abs(found - whole[part]).max() <= 1 + 1e-9
        np.testing.assert_array_equal(dense.nearest(image[..., 0], new, place, extent), levels[part])


def test_sizes_are_those_of_mmcv():
    ade, hd = Masks(150), Masks(5, scale=(1280, 720))
    assert dense.resized((512, 683), ade) == (512, 683)
    assert dense.resized((300, 400), ade) == (512, 683)  # 682.67
    assert dense.resized((1000, 5000), ade) == (410, 2048)  # the longer side holds it back: 409.6
    assert dense.resized((1600, 1200), ade) == (683, 512)
    assert dense.resized((1080, 1920), hd) == (720, 1280)
    assert dense.resized((512, 683), ade, 0.7) == (358, 478)  # int(358.4) is the shorter side; 683 * 358 / 512 = 477.6
    assert dense.resized((2, 3000), Masks(2, scale=(100, 50))) == (1, 100)


def plain_grid(height, width, window, stride):
    """Windows as a loop lays them: on until the border is reached, the last one moved back to it."""
    corners, top = [], 0
    while True:
        left = 0
        while True:
            corners.append((max(min(top, height - window), 0), max(min(left, width - window), 0)))
            if left + window >= width:
                break
            left += stride
        if top + window >= height:
            return corners
        top += stride


@pytest.mark.parametrize("stride", [5, 8, 3])
def test_windows_cover_each_pixel(stride):
    for size in ((8, 8), (5, 6), (8, 9), (13, 8), (14, 30), (20, 3), (21, 22)):
        grid = dense.window_grid(size, 8, stride)
        assert grid == plain_grid(*size, 8, stride)
        seen = np.zeros(size, int)
        for row, column in grid:
            assert (size[0] < 8 or row + 8 <= size[0]) and (size[1] < 8 or column + 8 <= size[1])
            seen[row : row + 8, column : column + 8] += 1
        assert seen.min() >= 1 and len(set(grid)) == len(grid)


def test_windows_of_sizes_that_ade20k_has():
    """By hand: the shorter side is 512, and (w - 512) / 341 windows, rounded up, are beside the first."""
    data = Data("pairs", image_size=512, transform="eval", masks=Masks(150))
    assert data.masks.window_stride(512) == 341
    counts = {
        (512, 683): 2,
        (512, 512): 1,
        (300, 300): 1,
        (512, 853): 2,
        (512, 854): 3,
        (1600, 1200): 2,
        (486, 1181): 4,
    }
    assert {size: len(dense.eval_grid(size, data)) for size in counts} == counts
    assert dense.eval_grid((512, 683), data) == [(0, 0), (0, 171)]
    assert dense.eval_grid((486, 1181), data) == [(0, 0), (0, 341), (0, 682), (0, 732)]  # of 512 x 1244
    data.masks.squash = True
    assert dense.eval_grid((486, 1181), data) == [(0, 0)]


def read(index, data=TRAIN, seed=0):
    rng = np.random.default_rng(seed)
    return dense.IMAGE_MASK.read(Pictures()[index], f"picture {index}", data, rng)


def found_in(example, record, size, corner):
    """Whether an example shows what lies at `corner` of a record that is resized to `size`, perhaps mirrored."""
    height, width = example["extent"]
    part = np.s_[corner[0] : corner[0] + height, corner[1] : corner[1] + width]
    mask = nearest_plain(np.asarray(record["mask"]).squeeze(), size)[part]
    image = resized_plain(np.asarray(decode(record["image"], "")).astype(np.float64), size)[part]
    ours = example["image"][:height, :width].astype(int)
    for way in (1, -1):
        if (mask[:, ::way] == example["mask"][:height, :width]).all():
            assert np.abs(image[:, ::way] - ours).max() <= 1 + 1e-9
            return way
    return 0


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("index", range(len(SIZES)))
def test_a_crop_is_of_image_and_mask_alike(index, is_fast):
    """Its draws are made again here: ratio, place (several times, if it shows too little), mirror."""
    data = dataclasses.replace(TRAIN, fast_crop=is_fast)
    record = {**Pictures()[index]}
    if isinstance(record["mask"], bytes):
        record["mask"] = np.asarray(Image.open(io.BytesIO(record["mask"])))
    mirrored = 0
    for seed in range(6):
        example = read(index, data, seed)
        rng = np.random.default_rng(seed)
        size = dense.resized(SIZES[index], MASKS, rng.uniform(0.5, 2))
        extent = np.minimum(size, 32)
        assert example["extent"].tolist() == extent.tolist()
        corners = [
            tuple(int(rng.integers(side - shown + 1)) for side, shown in zip(size, extent, strict=True))
            for _ in range(11)
        ]
        ways = [found_in(example, record, size, corner) for corner in corners]
        assert any(ways)
        mirrored += -1 in ways
        height, width = extent
        assert (example["mask"][height:] == 255).all() and (example["mask"][:, width:] == 255).all()
        assert not example["image"][height:].any() and not example["image"][:, width:].any()
        assert {name: (value.shape, value.dtype.name) for name, value in example.items()} == {
            "image": ((32, 32, 3), "uint8"), "mask": ((32, 32), "uint8"), "extent": ((2,), "int32")
        }  # fmt: skip
    assert 0 < mirrored < 6


def test_flip_is_drawn_as_often_as_asked():
    record = {"image": np.arange(32, dtype=np.uint8).repeat(3).reshape(1, 32, 3).repeat(32, 0), "label": -1}
    record["mask"] = record["image"][..., 0] // 2
    for hflip in (0.0, 1.0, 0.3):
        data = dataclasses.replace(TRAIN, hflip=hflip, masks=Masks(20, scale=(32, 32), ratio=(1.0, 1.0)))
        flips = 0
        for seed in range(200):
            example = dense.IMAGE_MASK.read(record, "", data, np.random.default_rng(seed))
            flipped = example["image"][0, 0, 0] == 31
            np.testing.assert_array_equal(example["image"], record["image"][:, :: -1 if flipped else 1])
            np.testing.assert_array_equal(example["mask"], record["mask"][:, :: -1 if flipped else 1])
            flips += flipped
        assert abs(flips / 200 - hflip) < 0.1


class Counting:
    """A generator that gives numbers in order, and counts."""

    def __init__(self, numbers):
        self.numbers, self.drawn = numbers, 0

    def integers(self, end):
        self.drawn += 1
        return self.numbers[(self.drawn - 1) % len(self.numbers)] % end


def crop(mask, places, **fields):
    """Of 4 pixels a side; the row is always 0, the column runs through `places`."""
    rng = Counting([number for place in places for number in (0, place)])
    data = dataclasses.replace(TRAIN, image_size=4, masks=dataclasses.replace(MASKS, **fields))
    (_, column), part = dense.draw_crop(mask, mask.shape, data, rng)
    np.testing.assert_array_equal(part, mask[:4, column : column + 4])
    return column, rng.drawn // 2


def test_crops_of_one_class_are_drawn_anew():
    mask = np.zeros((4, 40), np.uint8)
    mask[:, 20:22] = 1  # a crop from 18 or 20 is half of it
    mask[:, 30] = 1  # from 30: a quarter
    mask[:, 8:10] = 255
    assert crop(mask, [18]) == (18, 1)
    assert crop(mask, [0, 4, 18, 0]) == (18, 3)
    assert crop(mask, [8, 18]) == (18, 2)  # what is ignored is no second class
    assert crop(mask, [30, 18]) == (18, 2)  # three quarters are too much
    assert crop(mask, [30, 18], max_share=0.76) == (30, 1)
    assert crop(mask, [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 18]) == (3, 11)  # the tenth new one is taken as it is
    assert crop(mask, [0, 18], max_share=1.0) == (0, 1)
    assert crop(np.full((4, 9), 255, np.uint8), [1, 2, 3]) == (2, 11)
    assert crop(mask[:, :4], [0]) == (0, 1)  # there is no other


def test_values_of_a_file_become_classes():
    mask = np.array([[0, 1, 2, 254], [255, 7, 3, 4]], np.uint8)
    record = {"image": np.zeros((2, 4, 3), np.uint8), "mask": mask}

    def classes(*args, **fields):
        return dense.classes_of(record, "a.jpg", Masks(*args, **fields)).tolist()

    assert classes(8, ignored=(254,)) == [[0, 1, 2, 255], [255, 7, 3, 4]]
    assert classes(7, ignored=(254,), zero_is_ignored=True) == [[255, 0, 1, 255], [255, 6, 2, 3]]
    assert classes(5, ignored=(254, 7, 0)) == [[255, 1, 2, 255], [255, 255, 3, 4]]
    for args, first, last, odd in (((8,), 0, 7, 254), ((6, True, (254,)), 1, 6, 7)):
        with pytest.raises(InputError) as error:
            classes(*args)
        assert str(error.value) == (
            f"a.jpg: its mask has the value {odd}, and classes are {first} to {last}; raise masks.num_classes, or list"
            " the value in masks.ignored"
        )
    record["mask"] = png(np.array([[3]], np.uint8))
    with pytest.raises(InputError, match=r"^a\.jpg: is 4 x 2 pixels and its mask 1 x 1; both must be of one size$"):
        classes(8)
    del record["mask"]
    with pytest.raises(InputError, match=r"^a\.jpg: has no mask; use images with masks"):
        classes(8)


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("index", range(len(SIZES)))
def test_windows_of_whole_images(index, squash):
    data = dataclasses.replace(EVAL, masks=dataclasses.replace(MASKS, squash=squash))
    ratios = (0.5, 1.0, 1.75)
    sizes = [(int(32 * r),) * 2 if squash else dense.resized(SIZES[index], MASKS, r) for r in ratios]
    grids = [plain_grid(*size, 32, 21) for size in sizes]
    corners = [(view, corner) for view, grid in enumerate(grids) for corner in grid]
    count, record = len(corners) + 2, Pictures()[index]
    fields = dense.windows(count, (120, 100), ratios)
    example = fields.read(record, "", data, np.random.default_rng(0))
    shapes = {name: (value.shape, value.dtype) for name, value in example.items()}
    assert shapes == {name: (value.shape, value.dtype) for name, value in fields.empty(data).items()}
    whole = [resized_plain(np.asarray(decode(record["image"], "")).astype(np.float64), size) for size in sizes]
    for i, (view, (row, column)) in enumerate(corners):
        assert (example["view"][i], *example["place"][i]) == (view, row, column)
        height, width = np.minimum(sizes[view], 32)
        part, window = whole[view][row : row + 32, column : column + 32], example["windows"][i]
        assert np.abs(window[:height, :width] - part).max() <= 1 + 1e-9
        assert not window[height:].any() and not window[:, width:].any()
        assert example["extent"][i].tolist() == [height, width]
    assert not example["extent"][len(corners) :].any() and not example["windows"][len(corners) :].any()
    assert tuple(example["original"]) == SIZES[index] and example["size"].tolist() == [list(size) for size in sizes]
    assert example["grid"].tolist() == [[len({place[axis] for place in grid}) for axis in (0, 1)] for grid in grids]
    high, wide = SIZES[index]
    np.testing.assert_array_equal(example["mask"][:high, :wide], blobs(high, wide, index))
    assert (example["mask"][high:] == 255).all() and (example["mask"][:, wide:] == 255).all()


@pytest.mark.parametrize(("count", "canvas"), [(1, (120, 100)), (9, (40, 60)), (9, (30, 100))])
def test_windows_that_do_not_fit(count, canvas):
    with pytest.raises(
        InputError,
        match=r"^picture 0: 70 x 40 pixels and 8 windows of 32 are more than the .* there is room for; group",
    ):
        dense.windows(count, canvas).read(Pictures()[0], "picture 0", EVAL, np.random.default_rng(0))


def test_sizes_of_headers():
    np.testing.assert_array_equal(dense.sizes(Pictures()), SIZES)

    class Damaged(Pictures):
        def __getitem__(self, index):
            return {"image": b"x"} if index == 2 else super().__getitem__(index)

    with pytest.raises(InputError, match=r"^picture 2: cannot be decoded"):
        dense.sizes(Damaged())
    np.testing.assert_array_equal(dense.sizes(Damaged(), "skip"), [(0, 0) if i == 2 else SIZES[i] for i in range(5)])


@pytest.mark.parametrize("fields", [dense.IMAGE_MASK, dense.windows(40, (120, 100))])
def test_rows_reach_workers_by_pickle(fields):
    data = EVAL if fields is not dense.IMAGE_MASK else TRAIN
    for rows in (EvalRows(data, Pictures(), 2, 0, 1, fields), TrainRows(data, Pictures(), 4, 0, 1, fields, 5)):
        sent = pickle.loads(pickle.dumps(rows))
        jax.tree.map(np.testing.assert_array_equal, sent(0), rows(0))
    again = fields.read(Pictures()[0], "", data, image_rng(5, 0, 0))
    jax.tree.map(np.testing.assert_array_equal, again, fields.read(Pictures()[0], "", data, image_rng(5, 0, 0)))


def test_batches_of_worker_processes(mesh):
    fields, data = dense.windows(40, (120, 100)), dataclasses.replace(EVAL, workers=1)
    batches = list(pipeline.eval_batches(data, Pictures(), batch_size=2, mesh=mesh, fields=fields))
    assert [batch["is_valid"].tolist() for batch in batches] == [[True, True], [True, True], [True, False]]
    here = EvalRows(EVAL, Pictures(), 2, 0, 1, fields)
    for step, batch in enumerate(batches):
        jax.tree.map(np.testing.assert_array_equal, {name: np.asarray(batch[name]) for name in batch}, here(step))
