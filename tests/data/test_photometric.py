"""Against colorsys, pixel by pixel, on forced draws; and how often each step is done."""

import colorsys
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinymim_jax.data import photometric as pm
from tinymim_jax.data.device_augment import normalize_within
from tinymim_jax.experiment.config import Data, Masks

SAME = {"brightness": 0.0, "early_contrast": 1.0, "saturation": 1.0, "hue": 0.0, "late_contrast": 1.0}
ROWS = [
    SAME,
    {**SAME, "brightness": 0.12},
    {**SAME, "brightness": -0.12},
    {**SAME, "early_contrast": 1.45},
    {**SAME, "late_contrast": 0.55},
    {**SAME, "saturation": 1.5},
    {**SAME, "saturation": 0.5},
    {**SAME, "hue": 17 / 180},
    {**SAME, "hue": -0.1},
    {"brightness": 0.1, "early_contrast": 1.3, "saturation": 1.4, "hue": 0.07, "late_contrast": 1.0},
    {"brightness": -0.05, "early_contrast": 1.0, "saturation": 0.6, "hue": -0.03, "late_contrast": 1.4},
]


def pictures(batch, size=6):
    images = np.random.default_rng(0).uniform(size=(batch, size, size, 3)).astype(np.float32)
    images[:, 0, 0] = 0.5  # grey: no hue, no saturation
    images[:, 0, 1], images[:, 0, 2], images[:, 0, 3] = 0, 1, (1, 0, 0)
    return images


def plain(pixel, brightness, early_contrast, saturation, hue, late_contrast):
    """One pixel in float64."""
    pixel = np.clip(np.asarray(pixel, np.float64) + brightness, 0, 1)
    pixel = np.clip(pixel * early_contrast, 0, 1)
    h, s, v = colorsys.rgb_to_hsv(*pixel)
    h, s, v = colorsys.rgb_to_hsv(*colorsys.hsv_to_rgb(h, min(s * saturation, 1), v))
    return np.clip(np.array(colorsys.hsv_to_rgb((h + hue) % 1, s, v)) * late_contrast, 0, 1)


def test_each_step_is_that_of_hsv():
    images = pictures(len(ROWS))
    by = pm.Distortion(**{name: jnp.asarray([row[name] for row in ROWS])[:, None, None] for name in SAME})
    found = np.asarray(jax.jit(pm.distorted)(images, by))
    for image, row, actual in zip(images, ROWS, found, strict=True):
        expected = np.array([plain(pixel, **row) for pixel in image.reshape(-1, 3)]).reshape(image.shape)
        np.testing.assert_allclose(actual, expected, atol=2e-6, err_msg=str(row))
    np.testing.assert_allclose(found[0], images[0], atol=1e-6)
    assert (np.abs(found[1:] - images[1:]).reshape(len(ROWS) - 1, -1).max(axis=1) > 0.05).all()


def test_draws():
    by = jax.tree.map(lambda each: np.asarray(each).ravel(), pm.draw(jax.random.key(0), 8000))
    drawn = dataclasses.asdict(by)
    on = {name: each != SAME[name] for name, each in drawn.items()}
    shares = {name: each.mean() for name, each in on.items()}
    expected = {
        "brightness": 0.5,
        "early_contrast": 0.25,
        "saturation": 0.5,
        "hue": 0.5 * 35 / 36,
        "late_contrast": 0.25,
    }
    assert shares == pytest.approx(expected, abs=0.02)
    assert not (on["early_contrast"] & on["late_contrast"]).any()
    for name, low, high in (
        ("brightness", -32 / 255, 32 / 255), ("early_contrast", 0.5, 1.5), ("saturation", 0.5, 1.5), ("late_contrast", 0.5, 1.5)
    ):  # fmt: skip
        values = drawn[name][on[name]]
        np.testing.assert_allclose([values.min(), values.max()], [low, high], atol=0.01)
        np.testing.assert_allclose(values.std(), (high - low) / np.sqrt(12), rtol=0.05)
    steps = np.unique(np.round(drawn["hue"] * 180, 3))
    np.testing.assert_array_equal(steps, np.arange(-18, 18))
    together = np.corrcoef([on["brightness"], on["early_contrast"] | on["late_contrast"], on["saturation"], on["hue"]])
    np.testing.assert_allclose(together, np.eye(4), atol=0.05)


def test_same_key_same_result_and_each_image_its_own():
    images = np.repeat(pictures(1), 16, axis=0)
    made, again, other = (np.asarray(pm.photometric(jax.random.key(seed), images)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(made, again)
    assert not np.array_equal(made, other) and made.min() >= 0 and made.max() <= 1 and made.dtype == np.float32
    assert len(np.unique(made.reshape(16, -1), axis=0)) > 12


def test_padding_is_zero_behind_normalisation():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    images = pictures(3, 4)
    extent = np.array([[4, 4], [2, 3], [0, 0]], np.int32)
    found = np.asarray(normalize_within(jnp.asarray(images), jnp.asarray(extent), mean, std))
    expected = (images - np.array(mean)) / np.array(std)
    expected[1, 2:] = expected[1, :, 3:] = expected[2] = 0
    np.testing.assert_allclose(found, expected, atol=1e-6)
    windows = np.stack([images, images], axis=1)  # [B, K, H, W, 3], one extent for all windows of an image
    found = normalize_within(jnp.asarray(windows), jnp.asarray(extent)[:, None], mean, std)
    np.testing.assert_allclose(found, np.stack([expected, expected], axis=1), atol=1e-6)


def test_model_input():
    images = (pictures(4) * 255).astype(np.uint8)
    data = Data("scenes", image_size=6, masks=Masks(11))
    extent = jnp.asarray([[6, 6], [3, 6], [6, 2], [6, 6]])
    plain = np.asarray(pm.model_input(images, extent, data))
    np.testing.assert_allclose(
        plain, normalize_within(images / np.float32(255), extent, data.mean, data.std), atol=1e-6
    )
    key = jax.random.key(3)
    made = np.asarray(pm.model_input(images, extent, data, key))
    expected = normalize_within(pm.photometric(key, images / np.float32(255)), extent, data.mean, data.std)
    np.testing.assert_allclose(made, expected, atol=1e-5)
    assert not np.allclose(made, plain) and not made[1, 3:].any() and not made[2, :, 2:].any()
    data.masks.photometric = False
    np.testing.assert_array_equal(pm.model_input(images, extent, data, key), plain)
