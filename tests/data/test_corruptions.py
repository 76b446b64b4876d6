import io
import math

import numpy as np
import pytest
from PIL import Image

from tinymim_jax.data import augment, corruptions
from tinymim_jax.data.fields import IMAGE_LABEL
from tinymim_jax.data.pipeline import EvalRows
from tinymim_jax.data.sources import open_source
from tinymim_jax.experiment.config import Data
from tinymim_jax.runtime.errors import InputError

pytest.importorskip("imagecorruptions", reason="corruptions are made by imagecorruptions-imaug, extra [robust]")

IMAGE = np.random.default_rng(0).integers(60, 190, (32, 32, 3), np.uint8)


def corrupt(name, severity, seed=0):
    return corruptions.corrupt(IMAGE, name, severity, np.random.default_rng(seed))


@pytest.mark.parametrize("name", corruptions.ALEXNET_ERROR)
def test_every_corruption_changes_the_image_and_repeats_itself(name):
    made = corrupt(name, 3)
    assert made.shape == IMAGE.shape and made.dtype == np.uint8
    assert np.abs(made.astype(int) - IMAGE).mean() > 1
    np.testing.assert_array_equal(made, corrupt(name, 3))


@pytest.mark.parametrize(("name", "sigma"), [("gaussian_noise", {1: 0.08, 3: 0.18, 5: 0.38})])
def test_noise_is_as_strong_as_published(name, sigma):
    grey = np.full((64, 64, 3), 128, np.uint8)
    for severity, std in sigma.items():
        made = corruptions.corrupt(grey, name, severity, np.random.default_rng(0)) / 255
        if severity < 5:  # the strongest is clipped
            assert made.std() == pytest.approx(std, rel=0.03)
        else:
            assert made.std() > 0.3


def test_contrast_is_as_weak_as_published():
    """(x - mean) c + mean with c 0.4, 0.3, 0.2, 0.1, 0.05."""
    for severity, c in enumerate((0.4, 0.3, 0.2, 0.1, 0.05), 1):
        x = IMAGE / 255
        expected = (x - x.mean(axis=(0, 1))) * c + x.mean(axis=(0, 1))
        np.testing.assert_allclose(corrupt("contrast", severity) / 255, expected, atol=1.01 / 255)


def picture(size):
    """Smooth, with an edge: what is moved can be seen."""
    y, x = np.mgrid[:size, :size] / size
    pixels = np.stack([255 * x, 255 * y, 127 + 127 * np.sin(9 * x) * np.cos(7 * y)], axis=-1)
    pixels[size // 3 : size // 2, size // 4 : size // 2] = 250
    return pixels.astype(np.uint8)


@pytest.mark.parametrize("size", [224, 32])
def test_frost_is_a_part_of_one_of_five_textures(size):
    """Published: weight * image + weight * a crop of the texture at its own scale, for 224 px images."""
    import importlib.resources

    cv2 = pytest.importorskip("cv2")
    folder, image, seen = importlib.resources.files("imagecorruptions") / "frost", picture(size), set()
    weights = [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)]
    for seed in range(25):
        rng, severity = np.random.default_rng(seed), seed % 5 + 1
        number = int(rng.integers(5)) + 1
        texture = cv2.imread(str(folder / f"frost{number}.{'png' if number < 4 else 'jpg'}"))[..., ::-1]
        top, left = rng.integers(0, texture.shape[0] - size), rng.integers(0, texture.shape[1] - size)
        own, other = weights[severity - 1]
        expected = np.clip(own * image + other * texture[top : top + size, left : left + size], 0, 255)
        made = corruptions.corrupt(image, "frost", severity, np.random.default_rng(seed))
        assert np.abs(made - expected).max() < 1.01 and made.dtype == np.uint8  # the file's decoder, and rounding down
        seen.add(number)
    assert seen == {1, 2, 3, 4, 5}


def test_frost_covers_an_image_that_is_larger_than_its_textures():
    for seed in range(5):
        made = corruptions.corrupt(np.zeros((640, 640, 3), np.uint8), "frost", 1, np.random.default_rng(seed))
        assert made.shape == (640, 640, 3) and made.std() > 1


def elastic(image, severity, rng):
    """Published, in loops: three corners of a central square move, then all pixels, by smoothed noise; all bilinear."""
    filters = pytest.importorskip("skimage.filters")
    size = len(image)
    side = 244 * size / 224
    strength, sigma, shift = [
        (side * 2, side * 0.7, side * 0.1),
        (side * 2, side * 0.08, side * 0.2),
        (side * 0.05, side * 0.01, side * 0.02),
        (side * 0.07, side * 0.01, side * 0.02),
        (side * 0.12, side * 0.01, side * 0.02),
    ][severity - 1]
    c, s = size // 2, size // 3
    before = np.array([[c + s, c + s], [c + s, c - s], [c - s, c - s]], float)
    behind = before + rng.uniform(-shift, shift, (3, 2))
    affine = np.linalg.solve(np.c_[behind, np.ones(3)], before)  # where each pixel comes from
    dx, dy = (filters.gaussian(rng.uniform(-1, 1, (size, size)), sigma, mode="reflect", truncate=3) for _ in range(2))

    def mirrored(i, doubled_edge):
        period = 2 * size - (0 if doubled_edge else 2)
        i = i % period
        return np.where(i < size, i, period - i - (1 if doubled_edge else 0))

    def sample(pixels, x, y, doubled_edge):
        x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
        out = 0
        for i in (0, 1):
            for j in (0, 1):
                weight = abs(1 - i - (y - y0)) * abs(1 - j - (x - x0))
                out = out + weight[..., None] * pixels[mirrored(y0 + i, doubled_edge), mirrored(x0 + j, doubled_edge)]
        return out

    y, x = np.mgrid[:size, :size].astype(float)
    source = np.stack([x, y, np.ones_like(x)], axis=-1) @ affine
    warped = sample(image / 255, source[..., 0], source[..., 1], False)
    return np.clip(sample(warped, x + strength * dx, y + strength * dy, True), 0, 1) * 255


@pytest.mark.parametrize("size", [224, 48])
@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_elastic_transform_is_the_published_one(size, severity):
    """An affine map and sigmas of 0.7, 0.08 and 0.01 of 244 px; OpenCV knows 32 positions between two pixels."""
    image = picture(size)
    made = corruptions.corrupt(image, "elastic_transform", severity, np.random.default_rng(severity)).astype(float)
    away = np.abs(made - elastic(image, severity, np.random.default_rng(severity)))
    assert away.mean() < 1.5 and np.quantile(away, 0.95) < 4
    assert np.abs(made - image).mean() > 3 * away.mean()


def test_a_corrupted_image_goes_through_a_jpeg_of_the_quality_asked_for():
    image, sizes = picture(64), []
    for quality in (85, 20):
        made = corruptions.corrupt(image, "contrast", 2, np.random.default_rng(0), quality)
        file = io.BytesIO()
        Image.fromarray(corrupt_plainly := corruptions.corrupt(image, "contrast", 2, np.random.default_rng(0))).save(
            file, "JPEG", quality=quality, optimize=True
        )
        np.testing.assert_array_equal(made, np.asarray(Image.open(file)))
        assert not np.array_equal(made, corrupt_plainly)
        sizes.append(file.tell())
    assert sizes[0] > sizes[1]


def test_the_fifteen_and_their_constants():
    assert len(corruptions.ALEXNET_ERROR) == 15
    assert np.mean(list(corruptions.ALEXNET_ERROR.values())) == pytest.approx(0.78899, abs=1e-5)


def test_evaluation_rows_are_corrupted_the_same_in_any_batch():
    data = Data("digits", image_size=32, split="test", transform="eval", corruption="shot_noise", severity=2)
    source = open_source(data)
    rows = [EvalRows(data, source, size, 0, 1, IMAGE_LABEL) for size in (4, 2)]
    whole, parts = rows[0](0)["image"], np.concatenate([rows[1](0)["image"], rows[1](1)["image"]])
    np.testing.assert_array_equal(whole, parts)
    clean = EvalRows(Data("digits", image_size=32, split="test", transform="eval"), source, 4, 0, 1, IMAGE_LABEL)(0)[
        "image"
    ]
    assert np.abs(whole.astype(int) - clean).mean() > 1


def test_the_published_pipeline_by_hand():
    """make_imagenet_c.py: shorter side to 256 bilinearly, the central 224, corrupted, a JPEG of quality 85."""
    from tinymim_jax.evals.robustness import Corruptions, corrupted

    clean = Data("digits", split="test", transform="eval", crop_pct=1.0)
    found = {way: corrupted(Corruptions(clean, published=way), "brightness", 3) for way in (True, False)}
    assert (found[False].interpolation, found[False].crop_pct, found[False].corruption_quality) == (
        "bicubic",
        1.0,
        None,
    )
    image = Image.fromarray(picture(400)).resize((500, 300))
    made = augment.transform(image, found[True], np.random.default_rng(0))
    plain = image.resize((math.floor(256 * 500 / 300), 256), Image.Resampling.BILINEAR)
    left = round((plain.width - 224) / 2)
    plain = np.asarray(plain.crop((left, 16, left + 224, 240)))
    expected = corruptions.corrupt(plain, "brightness", 3, np.random.default_rng(0), 85)
    np.testing.assert_array_equal(made, expected)
    direct = augment.transform(image, found[False], np.random.default_rng(0))
    assert np.abs(direct.astype(int) - made).mean() > 1


def test_an_unknown_corruption():
    with pytest.raises(InputError, match="unknown choice 'rain'; choose one of gaussian_noise"):
        corrupt("rain", 1)


def test_without_the_library(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(InputError, match=r"pip install 'tinymim_jax\[robust\]'"):
        corruptions.check("fog")
