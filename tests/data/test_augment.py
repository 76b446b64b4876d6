import math

import numpy as np
import pytest
from PIL import Image

from tinymim_jax.config import Data, InputError
from tinymim_jax.data import augment

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
    crop = augment.random_resized_crop(
        Image.fromarray(pixels), 64, (0.2, 0.3), (1.0, 1.0), "bicubic", np.random.default_rng(1)
    )
    assert np.unique(np.asarray(crop)).tolist() == [50]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crop_is_resized_by_pil(interpolation):
    image = noise(50, 30)
    left, top, width, height = augment.crop_box(50, 30, (0.2, 1), (0.75, 1.33), np.random.default_rng(5))
    crop = augment.random_resized_crop(image, 16, (0.2, 1), (0.75, 1.33), interpolation, np.random.default_rng(5))
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


@pytest.mark.parametrize("crop_pct", [0.0, 1.2])
def test_center_crop_error(crop_pct):
    with pytest.raises(InputError, match=r"data\.crop_pct"):
        augment.center_crop(noise(8, 8), 16, crop_pct, "bicubic")


def test_hflip():
    np.testing.assert_array_equal(augment.hflip(noise(5, 4)), np.asarray(noise(5, 4))[:, ::-1])


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
