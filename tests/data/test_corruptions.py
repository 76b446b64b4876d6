import numpy as np
import pytest

from tinymim_jax.data import corruptions
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


def test_an_unknown_corruption():
    with pytest.raises(InputError, match="unknown choice 'rain'; choose one of gaussian_noise"):
        corrupt("rain", 1)


def test_without_the_library(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(InputError, match=r"pip install 'tinymim_jax\[robust\]'"):
        corruptions.check("fog")
