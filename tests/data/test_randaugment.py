import collections

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from tinymim_jax.data import randaugment
from tinymim_jax.data.randaugment import OPS, Policy, parse, rand_augment
from tinymim_jax.runtime.errors import InputError

FILL = (124, 116, 104)
BICUBIC = Image.Resampling.BICUBIC
AFFINE = Image.Transform.AFFINE


@pytest.fixture
def image():
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(30, 220, (5, 5, 3), np.uint8))
    return smooth.resize((40, 24), BICUBIC)


def solarize_added(image, added):
    values = np.asarray(image).astype(int)
    return Image.fromarray(np.where(values < 128, np.minimum(values + added, 255), values).astype(np.uint8))


def affine(image, *matrix):
    return image.transform((40, 24), AFFINE, matrix, BICUBIC, fillcolor=FILL)


# At magnitude 5 and a positive sign, each written from the table in timm's documentation.
EXPECTED = {
    "AutoContrast": lambda i: ImageOps.autocontrast(i),
    "Equalize": lambda i: ImageOps.equalize(i),
    "Invert": lambda i: Image.fromarray(255 - np.asarray(i)),
    "Rotate": lambda i: i.rotate(15, BICUBIC, fillcolor=FILL),
    "PosterizeIncreasing": lambda i: Image.fromarray(np.asarray(i) & 0b11000000),  # 2 bits
    "SolarizeIncreasing": lambda i: Image.fromarray(np.where(np.asarray(i) < 128, i, 255 - np.asarray(i))),
    "SolarizeAdd": lambda i: solarize_added(i, 55),
    "ColorIncreasing": lambda i: ImageEnhance.Color(i).enhance(1.45),
    "ContrastIncreasing": lambda i: ImageEnhance.Contrast(i).enhance(1.45),
    "BrightnessIncreasing": lambda i: ImageEnhance.Brightness(i).enhance(1.45),
    "SharpnessIncreasing": lambda i: ImageEnhance.Sharpness(i).enhance(1.45),
    "ShearX": lambda i: affine(i, 1, 0.15, 0, 0, 1, 0),
    "ShearY": lambda i: affine(i, 1, 0, 0, 0.15, 1, 0),
    "TranslateXRel": lambda i: affine(i, 1, 0, 0.225 * 40, 0, 1, 0),
    "TranslateYRel": lambda i: affine(i, 1, 0, 0, 0, 1, 0.225 * 24),
}
SIGNED = {
    "Rotate": lambda i: i.rotate(-15, BICUBIC, fillcolor=FILL),
    "BrightnessIncreasing": lambda i: ImageEnhance.Brightness(i).enhance(0.55),
    "ShearX": lambda i: affine(i, 1, -0.15, 0, 0, 1, 0),
    "TranslateYRel": lambda i: affine(i, 1, 0, 0, 0, 1, -0.225 * 24),
}


def test_there_are_fifteen_operations():
    assert set(OPS) == set(EXPECTED) and len(OPS) == 15


@pytest.mark.parametrize("name", EXPECTED)
def test_operation_at_magnitude_five(name, image):
    expected = EXPECTED[name](image)
    assert not np.array_equal(expected, image)
    np.testing.assert_array_equal(OPS[name](image, 0.5, FILL), expected)


@pytest.mark.parametrize("name", SIGNED)
def test_negative_sign(name, image):
    np.testing.assert_array_equal(OPS[name](image, -0.5, FILL), SIGNED[name](image))


def test_ends_of_the_integer_ranges(image):
    values = np.asarray(image)
    np.testing.assert_array_equal(OPS["PosterizeIncreasing"](image, 1.0, FILL), values * 0)
    np.testing.assert_array_equal(OPS["PosterizeIncreasing"](image, 0.0, FILL), values & 0b11110000)
    np.testing.assert_array_equal(OPS["SolarizeIncreasing"](image, 0.0, FILL), values)
    np.testing.assert_array_equal(OPS["SolarizeIncreasing"](image, 1.0, FILL), 255 - values)


def test_outside_is_filled(image):
    assert OPS["TranslateXRel"](image, 0.9, FILL).getpixel((39, 0)) == FILL


def test_draws(monkeypatch, image):
    calls = []

    def recorder(name):
        return lambda image, level, fill: calls.append((name, 10 * abs(level), np.sign(level))) or image

    monkeypatch.setattr(randaugment, "OPS", {name: recorder(name) for name in OPS})
    rng = np.random.default_rng(0)
    per_image = []
    for _ in range(4000):
        before = len(calls)
        rand_augment(image, Policy(9.0, 0.5), FILL, rng)
        per_image.append(len(calls) - before)
    # Each of two draws is applied with probability a half.
    share = np.bincount(per_image, minlength=3) / 4000
    np.testing.assert_allclose(share, [0.25, 0.5, 0.25], atol=0.03)
    counts = collections.Counter(name for name, _, _ in calls)
    np.testing.assert_allclose([counts[n] / len(calls) for n in OPS], 1 / 15, atol=0.02)
    magnitudes = np.array([m for _, m, _ in calls])
    assert magnitudes.max() == 10.0  # clipped
    np.testing.assert_allclose(np.median(magnitudes), 9.0, atol=0.05)
    np.testing.assert_allclose(magnitudes[magnitudes < 10].std(), 0.48, atol=0.05)
    np.testing.assert_allclose(np.mean([s for _, _, s in calls]), 0, atol=0.05)


def test_deterministic(image):
    results = [np.asarray(rand_augment(image, Policy(9.0, 0.5, 4), FILL, np.random.default_rng(3))) for _ in range(2)]
    np.testing.assert_array_equal(*results)


def test_parse():
    assert parse("rand-m9-mstd0.5-inc1") == Policy(9.0, 0.5, 2)
    assert parse("rand-n3-m7-inc1") == Policy(7.0, 0.0, 3)


@pytest.mark.parametrize(
    "text", ["rand-m9-mstd0.5", "rand-m9-inc0", "rand-inc1", "m9-inc1", "rand-m9-w0-inc1", "rand-m9-m8-inc1", "auto",
             "rand-m9-n1.5-inc1", "rand-m11-inc1", "rand-mx-inc1"]
)  # fmt: skip
def test_parse_errors(text):
    with pytest.raises(InputError, match=r"data\.rand_augment"):
        parse(text)


@pytest.mark.parametrize("magnitude", [0.0, 2.5, 7.3, 9.0, 9.9])
@pytest.mark.parametrize("name", OPS)
def test_operations_are_those_of_timm(name, magnitude, image):
    """Op by op at fixed magnitudes, both signs."""
    timm = pytest.importorskip("timm.data.auto_augment", reason="timm's own RandAugment: pip install timm torchvision")
    options = {"fillcolor": FILL, "resample": BICUBIC}
    amounts = timm.LEVEL_TO_ARG[name]
    level = amounts(magnitude, {}) if amounts else ()
    theirs = np.asarray(timm.NAME_TO_OP[name](image, *level, **options))
    ours = [np.asarray(OPS[name](image, sign * (magnitude / 10), FILL)) for sign in (1, -1)]
    assert any(np.array_equal(theirs, one) for one in ours)
