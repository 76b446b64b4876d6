import dataclasses
import io
import math

import numpy as np
import pytest
from PIL import Image

from tinymim_jax.data import augment, fast_jpeg
from tinymim_jax.data.decode import decode
from tinymim_jax.experiment.config import Data
from tinymim_jax.runtime.errors import InputError

BICUBIC = Image.Resampling.BICUBIC


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_crop_box_distribution():
    rng = np.random.default_rng(0)
    boxes = np.array([augment.crop_box(1000, 1000, (0.2, 0.5), (3 / 4, 4 / 3), rng) for _ in range(6000)])
    left, top, width, height = boxes.T
    assert (left >= 0).all() and (left + width <= 1000).all() and (top + height <= 1000).all()
    # Nothing is rejected at these areas: uniform area, log-uniform aspect, uniform place.
    area, log_aspect = width * height / 1e6, np.log(width / height)
    np.testing.assert_allclose([area.mean(), area.std()], [0.35, 0.3 / math.sqrt(12)], rtol=0.02)
    spread = 2 * math.log(4 / 3)
    np.testing.assert_allclose([log_aspect.mean(), log_aspect.std()], [0, spread / math.sqrt(12)], atol=0.005)
    np.testing.assert_allclose(np.quantile(log_aspect, [0.001, 0.999]), [-spread / 2, spread / 2], atol=0.01)
    for start, slack in ((left, 1000 - width), (top, 1000 - height)):
        np.testing.assert_allclose(np.mean(start / slack), 0.5, atol=0.02)
        np.testing.assert_allclose(np.std(start / slack), 1 / math.sqrt(12), atol=0.02)


def test_crop_box_reaches_both_borders():
    rng = np.random.default_rng(0)
    boxes = [augment.crop_box(4, 4, (0.5, 0.6), (1.0, 1.0), rng) for _ in range(200)]
    assert {b[0] for b in boxes} == {b[1] for b in boxes} == {0, 1}


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(1000, 100, (433, 0, 133, 100)), (100, 1000, (0, 433, 100, 133)), (1, 1, (0, 0, 1, 1)), (90, 1, (44, 0, 1, 1))],
)
def test_crop_box_falls_back_to_the_centre(width, height, expected):
    # Areas close to the whole never fit a long image at an allowed aspect.
    for seed in range(5):
        box = augment.crop_box(width, height, (0.95, 1.0), (3 / 4, 4 / 3), np.random.default_rng(seed))
        assert box == expected


def test_crop_does_not_leak_from_outside():
    pixels = np.full((40, 40, 3), 255, np.uint8)
    rng = np.random.default_rng(1)
    left, top, width, height = augment.crop_box(40, 40, (0.2, 0.3), (1.0, 1.0), rng)
    pixels[top : top + height, left : left + width] = 50
    data = Data("digits", image_size=64, crop_scale=(0.2, 0.3), crop_ratio=(1.0, 1.0))
    crop = augment.transform(Image.fromarray(pixels), data, np.random.default_rng(1))
    assert np.unique(np.asarray(crop)).tolist() == [50]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crop_is_resized_by_pil(interpolation):
    image = noise(50, 30)
    left, top, width, height = augment.crop_box(50, 30, (0.2, 1), (0.75, 1.33), np.random.default_rng(5))
    data = Data("digits", image_size=16, crop_scale=(0.2, 1), crop_ratio=(0.75, 1.33), interpolation=interpolation)
    crop = augment.transform(image, dataclasses.replace(data, hflip=0.0), np.random.default_rng(5))
    part = Image.fromarray(np.asarray(image)[top : top + height, left : left + width])
    expected = part.resize((16, 16), {"bicubic": 3, "bilinear": 2}[interpolation])
    np.testing.assert_array_equal(crop, expected)


def test_center_crop_of_imagenet_size():
    image = noise(500, 375)
    expected = image.resize((341, 256), BICUBIC).crop((58, 16, 282, 240))
    np.testing.assert_array_equal(augment.center_crop(image, 224, 0.875, "bicubic"), expected)
    tall = image.transpose(Image.Transpose.TRANSPOSE)
    np.testing.assert_array_equal(
        augment.center_crop(tall, 224, 0.875, "bicubic"), tall.resize((256, 341), BICUBIC).crop((16, 58, 240, 282))
    )


def test_center_crop_without_margin():
    np.testing.assert_array_equal(
        augment.center_crop(noise(8, 8), 16, 1.0, "bicubic"), noise(8, 8).resize((16, 16), BICUBIC)
    )


def test_center_crop_rounds_half_to_even():
    image = noise(13, 10)
    np.testing.assert_array_equal(augment.center_crop(image, 10, 1.0, "bicubic"), image.crop((2, 0, 12, 10)))


def test_transform_flips_half_of_the_time():
    image = noise(9, 9)
    whole = Data("digits", image_size=9, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    flipped = 0
    for seed in range(400):
        out = augment.transform(image, whole, np.random.default_rng(seed))
        assert out.shape == (9, 9, 3) and out.dtype == np.uint8
        if np.array_equal(out, np.asarray(image)[:, ::-1]):
            flipped += 1
        else:
            np.testing.assert_array_equal(out, image)
    assert 160 < flipped < 240


def test_transform_eval_is_the_centre_crop():
    data = Data("digits", image_size=14, transform="eval", crop_pct=0.7, rand_augment="rand-m9-inc1")
    out = augment.transform(noise(30, 20), data, np.random.default_rng(0))
    np.testing.assert_array_equal(out, augment.center_crop(noise(30, 20), 14, 0.7, "bicubic"))


def test_transform_applies_rand_augment_filled_with_the_mean():
    white = Image.new("RGB", (20, 20), (255, 255, 255))
    data = Data("digits", image_size=20, rand_augment="rand-m10-inc1-n2", mean=(0.1, 0.2, 1.0))
    colours = set()
    for seed in range(60):
        out = augment.transform(white, data, np.random.default_rng(seed))
        colours |= set(map(tuple, out.reshape(-1, 3).tolist()))
    assert (26, 51, 255) in colours


def test_transform_is_a_function_of_the_generator():
    data = Data("digits", image_size=16, rand_augment="rand-m9-mstd0.5-inc1")
    outs = [augment.transform(noise(30, 20), data, np.random.default_rng(seed)) for seed in (7, 7, 8)]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert not np.array_equal(outs[0], outs[2])


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(width, height, seed=0):
    return noise(width // 20 + 2, height // 20 + 2, seed).resize((width, height), BICUBIC)


FAST = Data("digits", image_size=32)
EXACT = dataclasses.replace(FAST, fast_crop=False)


def both(image, seed=0, **fields):
    """What the fast and the exact route make of an image, and the state of the generator after each."""
    made = []
    for data in (FAST, EXACT):
        rng = np.random.default_rng(seed)
        made += [augment.load(image, "a/b.JPEG", dataclasses.replace(data, **fields), rng), rng.bit_generator.state]
    return made


@pytest.mark.parametrize(("width", "height"), [(150, 100), (61, 333), (20, 17)])
def test_fast_crops_show_what_exact_ones_show(width, height):
    image = encoded(smooth(width, height), quality=95)
    for seed in range(20):
        fast, fast_state, exact, exact_state = both(image, seed)
        assert fast.shape == exact.shape == (32, 32, 3) and fast.dtype == np.uint8
        assert np.abs(fast.astype(int) - exact).mean() < 1.5
        assert fast_state == exact_state  # as many draws, and so the same RandAugment
    policy = {"rand_augment": "rand-m5-n1-inc1"}
    near = [np.abs(a.astype(int) - b).mean() for a, _, b, _ in (both(image, seed, **policy) for seed in range(20))]
    assert np.median(near) < 1.5  # a few operations jump


def test_the_exact_route_is_pils():
    image = encoded(smooth(150, 100))
    for data in (EXACT, dataclasses.replace(FAST, transform="eval")):
        expected = augment.transform(decode(image, ""), data, np.random.default_rng(3))
        np.testing.assert_array_equal(augment.load(image, "", data, np.random.default_rng(3)), expected)


def test_fast_crops_are_mirrored():
    image = encoded(smooth(90, 70))
    (plain, *_), (mirrored, *_) = both(image, hflip=0.0), both(image, hflip=1.0)
    np.testing.assert_array_equal(mirrored, plain[:, ::-1])


@pytest.mark.parametrize(
    "image",
    [
        encoded(smooth(90, 70).convert("CMYK")),
        encoded(smooth(90, 70), "PNG"),  # whatever its name says
        encoded(smooth(90, 70), "WEBP"),
        np.asarray(smooth(90, 70)),
    ],
    ids=["cmyk", "png", "webp", "array"],
)
def test_what_is_no_usual_jpeg_takes_the_exact_route(image):
    fast, fast_state, exact, exact_state = both(image)
    np.testing.assert_array_equal(fast, exact)
    assert fast_state == exact_state


def test_damage_that_pil_bears_is_borne_with_the_same_crop():
    image = encoded(smooth(64, 64), quality=95)
    damaged = image[:800] + fast_jpeg.END + image[800:]
    fast, fast_state, exact, exact_state = both(damaged, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    np.testing.assert_array_equal(fast, exact)
    assert fast_state == exact_state


@pytest.mark.parametrize("image", [b"", b"<html>", encoded(smooth(64, 64))[:900], encoded(smooth(64, 64))[:-40]])
def test_fast_crops_name_what_cannot_be_decoded(image):
    for data in (FAST, EXACT):
        with pytest.raises(
            InputError, match=r"^a/b\.JPEG: cannot be decoded as an image \(.+\); remove or replace it$"
        ):
            augment.load(image, "a/b.JPEG", data, np.random.default_rng(0))


def test_no_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn, which training has never made
    for data in (FAST, EXACT):
        plain, turned = (
            augment.load(encoded(smooth(90, 70), **options), "", data, np.random.default_rng(0))
            for options in ({}, {"exif": exif})
        )
        np.testing.assert_array_equal(plain, turned)


def test_fast_crops_are_a_function_of_the_generator():
    image = encoded(smooth(150, 100))
    outs = [augment.load(image, "", FAST, np.random.default_rng(seed)) for seed in (7, 7, 8)]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert not np.array_equal(outs[0], outs[2])
