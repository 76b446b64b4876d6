import concurrent.futures
import io
import struct

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from tinymim_jax.data import fast_jpeg


def picture(width, height, seed=0, cell=16):
    """Smooth blobs, hard edges and a little grain, as in photographs."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 256, (height // cell + 2, width // cell + 2, 3), np.uint8)
    image = np.array(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC), np.int16)
    image[height // 3 : height // 2, width // 4 : width // 2] //= 3
    return Image.fromarray(np.clip(image + rng.integers(-4, 5, image.shape), 0, 255).astype(np.uint8))


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 92, **options})
    return buffer.getvalue()


def crop(image, box, size, interpolation="bicubic"):
    return fast_jpeg.crop(image, fast_jpeg.read_header(image), box, size, interpolation)


def exact(image, box, size, interpolation="bicubic"):
    left, top, width, height = box
    part = Image.open(io.BytesIO(image)).convert("RGB").crop((left, top, left + width, top + height))
    return np.asarray(part.resize((size, size), fast_jpeg.RESAMPLE[interpolation]))


def difference(ours, theirs):
    """Mean and largest, of 255."""
    apart = np.abs(ours.astype(int) - theirs)
    return apart.mean(), apart.max()


KINDS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "restarts": {"subsampling": 2, "restart_marker_rows": 1},
    "rgb": {"keep_rgb": True, "subsampling": 0},
}


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_decoded_is_what_pil_decodes(kind, grey, either_resizer):
    if grey and kind == "rgb":
        pytest.skip("contradicts itself")
    whole = picture(123, 241)
    image = jpeg(whole.convert("L") if grey else whole, **KINDS[kind])
    header = fast_jpeg.read_header(image)
    assert (header.width, header.height, header.is_cuttable) == (123, 241, kind != "progressive")
    for top in (0, 7, 96, 192, 209):  # as large as the result: nothing to interpolate
        box = (5, top, 32, 32)
        np.testing.assert_array_equal(crop(image, box, 32), exact(image, box, 32))


def test_rows_below_are_left_out():
    image = jpeg(picture(64, 640), subsampling=2)
    header = fast_jpeg.read_header(image)
    short, rows = fast_jpeg._without_bottom(image, header, 100)
    assert rows == 128 and len(short) == len(image)  # 112 and one row of 16 more
    assert simplejpeg.decode_jpeg(short, strict=False).shape == (128, 64, 3)
    assert fast_jpeg._without_bottom(image, header, 624) == (image, 640)
    # Whatever stands there is not looked at, but by what reads the whole.
    damaged = image[:-400] + bytes(300) + image[-100:]
    np.testing.assert_array_equal(crop(damaged, (0, 0, 64, 64), 64), crop(image, (0, 0, 64, 64), 64))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("kind", ["4:4:4", "4:2:2", "4:2:0", "progressive"])
@pytest.mark.parametrize(
    ("box", "mean"),
    [
        ((3, 5, 90, 71), 0.3),  # at its full size
        ((0, 0, 40, 31), 0.3),  # enlarged
        ((33, 21, 130, 141), 1.6),  # 1/2, at odd pixels
        ((101, 61, 301, 270), 1.6),  # 1/4
        ((0, 0, 613, 517), 1.6),  # 1/8
        ((13, 509, 600, 8), 0.3),  # one side is short
    ],
)
def test_the_same_part_is_shown(box, mean, kind, interpolation, either_resizer):
    image = jpeg(picture(613, 517, cell=80), **KINDS[kind])
    ours, theirs = crop(image, box, 64, interpolation), exact(image, box, 64, interpolation)
    assert ours.shape == (64, 64, 3) and ours.dtype == np.uint8
    assert difference(ours, theirs)[0] < mean


@pytest.mark.parametrize("size", [16, 33])
def test_no_pixel_is_moved(size):
    """A ramp shows a shift of half a pixel as a shift of its level."""
    x, y = np.meshgrid(np.arange(400), np.arange(300))
    ramp = np.stack([x * 255 / 400, y * 255 / 300, 255 - x * 255 / 400], axis=-1)
    image = jpeg(Image.fromarray(ramp.astype(np.uint8)), quality=98, subsampling=0)
    rng = np.random.default_rng(0)
    for _ in range(60):
        width, height = rng.integers(1, 401), rng.integers(1, 301)
        box = tuple(map(int, (rng.integers(401 - width), rng.integers(301 - height), width, height)))
        mean, largest = difference(crop(image, box, size), exact(image, box, size))
        assert mean < 0.5 and largest <= 3, box


@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (1, 200), (200, 1), (7, 3), (17, 900), (900, 17), (8, 8), (9, 15)]
)
def test_odd_sizes(width, height, either_resizer):
    image = jpeg(picture(width, height), subsampling=2)
    for box in ((0, 0, width, height), (width // 2, height // 2, width - width // 2, height - height // 2)):
        for size in (1, 6, 40):
            mean, _ = difference(crop(image, box, size), exact(image, box, size))
            assert mean < (0.5 if min(box[2:]) < 2 * size else 12), (box, size)  # the worst: one pixel for hundreds


def test_colours_coarse_in_one_direction_are_not_scaled():
    for kind, is_scalable in (("4:4:4", True), ("4:2:0", True), ("4:2:2", False)):
        assert fast_jpeg.read_header(jpeg(picture(40, 40), **KINDS[kind])).is_scalable == is_scalable


def without_end():
    return jpeg(picture(40, 40))[:-2]


def with_size(width, height):
    image = bytearray(jpeg(picture(40, 40)))
    at = fast_jpeg.read_header(bytes(image)).height_at
    image[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(image)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


PILS = {
    "nothing": b"",
    "png": png(picture(8, 8)),
    "cmyk": jpeg(picture(40, 40).convert("CMYK")),
    "without end": without_end(),
    "no rows": with_size(40, 0),
    "enormous": with_size(65000, 65000),
    "start only": b"\xff\xd8\xff",
    "fill bytes only": b"\xff\xd8" + b"\xff" * 50,
}


@pytest.mark.parametrize("name", PILS)
def test_the_rest_is_left_to_pil(name):
    assert fast_jpeg.read_header(PILS[name]) is None


def test_every_way_to_be_cut_short_is_left_to_pil():
    image = jpeg(picture(60, 60), subsampling=2)
    assert all(fast_jpeg.read_header(image[:length]) is None for length in range(len(image) - 1))


def test_a_limit_on_pixels_holds(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1599)
    assert fast_jpeg.read_header(jpeg(picture(40, 40))) is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert fast_jpeg.read_header(jpeg(picture(40, 40))).width == 40


def test_damage_gives_none():
    image = jpeg(picture(64, 64), subsampling=0)
    tables = image.index(b"\xff\xdb")  # of quantisation; without them nothing can be decoded
    no_tables = image[:tables] + b"\xff\xfe" + image[tables + 2 :]
    early_end = image[:700] + fast_jpeg.END + image[700:]
    for damaged in (no_tables, early_end):
        header = fast_jpeg.read_header(damaged)
        assert header is not None and fast_jpeg.crop(damaged, header, (0, 0, 64, 64), 32, "bicubic") is None
    # A fault that is fatal is told from rows that are left out.
    header = fast_jpeg.read_header(no_tables)
    assert header.is_cuttable and fast_jpeg.crop(no_tables, header, (0, 0, 16, 16), 16, "bicubic") is None


def test_a_part_of_an_array_is_resized_like_by_pil():
    pixels = np.asarray(picture(60, 50))
    ours = fast_jpeg.resize(pixels[4:34, 7:51], (0.5, 0.25, 43.0, 29.5), (24, 24), "bicubic")
    theirs = Image.fromarray(pixels[4:34, 7:51]).resize((24, 24), 3, box=(0.5, 0.25, 43.5, 29.75))
    mean, largest = difference(ours, np.asarray(theirs))
    assert mean < 0.3 and largest < 8


def test_threads_do_not_disturb_each_other():
    images = [jpeg(picture(120 + 31 * i, 90 + 17 * i, seed=i)) for i in range(8)]
    box = (3, 5, 90, 71)
    alone = [crop(image, box, 64) for image in images]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda image: crop(image, box, 64), images * 20))
    for i, pixels in enumerate(together):
        np.testing.assert_array_equal(pixels, alone[i % 8])
