"""What files state beside their weights, against what they were written with."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinymim_jax.bridge import stated
from tinymim_jax.bridge.files import Source
from tinymim_jax.bridge.known_checkpoints import Told
from tinymim_jax.data import augment
from tinymim_jax.data.config import Data


def source(settings, form="huggingface"):
    return Source(Path("m/model.safetensors"), form, {}, settings, {})


@pytest.mark.parametrize(
    "settings",
    [
        {"id2label": {"1": "dog", "0": "zebra", "2": "ant"}},
        {"label_names": ["zebra", "dog", "ant"]},
        {"pretrained_cfg": {"label_names": ["zebra", "dog", "ant"]}},
        {"labels": ["zebra", "dog", "ant"]},
        {"classes": ["zebra", "dog", "ant"], "made_by": "tinymim_jax"},
    ],
)
def test_names_keep_the_order_of_the_outputs(settings):
    notes = []
    assert stated.classes(source(settings), 3, notes) == ["zebra", "dog", "ant"]
    assert notes == ["classes: zebra, dog, ant, as the file says"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}, "does not name"),
        ({}, "does not name"),
        ({"id2label": {"0": "a", "1": "b"}}, "are not 3, as the head has"),
        ({"label_names": ["a", "a", "b", "c"]}, "are not 3, as the head has"),
        ({"id2label": {"0": "a", "1": "b", "7": "c"}}, "are not 3, as the head has"),
    ],
)
def test_names_that_are_no_names_are_said(settings, said):
    notes = []
    assert stated.classes(source(settings), 3, notes) is None
    assert said in notes[0]


def test_without_a_head_nothing_is_named():
    notes = []
    assert stated.classes(source({"id2label": {"0": "LABEL_0", "1": "b"}}), 0, notes) is None
    assert notes == []


# How images are prepared, against the processors of transformers

PHOTOGRAPHS = [(80, 48), (48, 80), (64, 64), (37, 61), (121, 45)]


def photographs():
    rng = np.random.default_rng(0)
    small = (Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)) for _ in PHOTOGRAPHS)
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(small, PHOTOGRAPHS, strict=True)]


def prepared(pixels, image, size):
    """What our evaluation makes of an image, [S, S, 3]."""
    data = Data("folder", transform="eval", image_size=size, **pixels)
    return (augment.transform(image, data, None) / 255.0 - np.array(data.mean)) / np.array(data.std)


def moved(image):
    """The image, and it by a pixel up, left, or both: where transformers and torchvision halve odd numbers apart."""
    return [image, *(np.roll(image, shift, (0, 1)) for shift in ((0, 1), (1, 0), (1, 1)))]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("ViT", {"resample": 2, "size": {"height": 32, "width": 32}}),
        ("ViT", {"resample": 0, "size": {"height": 32, "width": 32}, "do_normalize": False}),
        ("ViT", {"resample": 1, "size": {"height": 32, "width": 32}, "rescale_factor": 1 / 127.5}),
        ("ViT", {"resample": 3, "size": {"height": 32, "width": 32}, "do_rescale": False, "image_mean": [100] * 3}),
        ("DeiT", {"resample": 3, "size": {"height": 37, "width": 37}, "crop_size": {"height": 32, "width": 32}}),
        ("CLIP", {"resample": 3, "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}),
        ("CLIP", {"resample": 5, "size": {"shortest_edge": 41}, "crop_size": {"height": 32, "width": 32}}),
    ],
)
def test_pixels_are_those_of_the_folders_processor(kind, fields, tmp_path):
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, f"{kind}ImageProcessorPil", None) or getattr(transformers, f"{kind}ImageProcessor")
    processor = cls(**{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], **fields})
    processor.save_pretrained(tmp_path)
    notes, settings = [], json.loads((tmp_path / "preprocessor_config.json").read_text())
    pixels, is_stated = stated.preprocessing(source({"preprocessor": settings}), 32, Told(), notes)
    assert is_stated and notes == []
    for image in photographs():
        theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
        ours = prepared(pixels, image, 32)
        inner = slice(1, -1)
        apart = min(np.abs(one[inner, inner] - theirs[inner, inner]).max() for one in moved(ours))
        assert apart < 1e-4 * max(1, np.abs(theirs).max()), (image.size, apart)


def test_every_shorter_side_is_met():
    for edge in range(32, 400):
        cfg = {"size": {"shortest_edge": edge}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
        pixels, _ = stated.preprocessing(source({"preprocessor": cfg}), 32, Told(), [])
        assert int(32 / pixels["crop_pct"]) == edge


@pytest.mark.parametrize(
    "cfg",
    [
        {"interpolation": "lanczos", "crop_pct": 1, "mean": [0.5] * 3, "std": [0.5] * 3},
        {"interpolation": "bilinear", "crop_pct": 0.9, "crop_mode": "squash", "mean": [0, 0, 0], "std": [1, 1, 1]},
    ],
)
@pytest.mark.parametrize("is_flat", [False, True])
def test_timm_says_it_in_two_ways(cfg, is_flat):
    settings = {"architecture": "vit", **(cfg if is_flat else {"pretrained_cfg": cfg})}
    notes = []
    pixels, is_stated = stated.preprocessing(source(settings, "timm"), 224, Told(), notes)
    assert (pixels, is_stated, notes) == (cfg, True, [])


@pytest.mark.parametrize(
    ("form", "settings", "said"),
    [
        ("huggingface", {"preprocessor": {"size": {"height": 48, "width": 48}}}, "at 48 px by the file and the model"),
        ("huggingface", {"preprocessor": {"size": 48, "image_processor_type": "CLIPImageProcessor"}}, "does not crop"),
        ("huggingface", {"preprocessor": {"do_resize": False}}, "does not resize"),
        ("huggingface", {"preprocessor": {"do_pad": True}}, "do_pad of preprocessor_config.json is not followed"),
        ("timm", {"architecture": "vit", "input_size": [3, 48, 48]}, "at 48 px by the file and the model"),
        ("timm", {"architecture": "vit", "crop_mode": "border"}, "crop_mode 'border' of the file is not followed"),
        ("timm", {"architecture": "vit", "crop_pct": 1.1}, "crop_pct 1.1 of the file is not followed"),
        ("timm", {"architecture": "vit", "interpolation": "random"}, "interpolation 'random' of the file is not"),
        ("pth", {}, "ImageNet's mean and std, which the file does not say"),
        ("pth", {}, "as MAE evaluates"),
        ("huggingface", {"preprocessor": {"size": 32, "do_center_crop": True, "crop_size": 48}}, "pads 32 to 48 px"),
    ],
)
def test_what_is_not_followed_is_said(form, settings, said):
    notes = []
    stated.preprocessing(source(settings, form), 32, Told(), notes)
    assert any(said in note for note in notes), notes


def test_the_user_knows_mean_and_std():
    told = Told(mean=[0.1, 0.2, 0.3], std=[1.0, 1.0, 2.0])
    for form, settings in (("pth", {}), ("timm", {"architecture": "vit", "mean": [0.5] * 3, "std": [0.5] * 3})):
        pixels, is_stated = stated.preprocessing(source(settings, form), 32, told, [])
        assert (pixels["mean"], pixels["std"], is_stated) == (told.mean, told.std, True)
