"""A trained model on images as they come: the numbers of `eval`'s pipeline and of transformers and timm."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

import tinymim_jax
from tests.bridge.test_export import MEAN, STD, random_params, stage
from tests.weights.test_handoff import write_stage
from tinymim_jax.evals import suite
from tinymim_jax.evals.contract import Context, Measurement
from tinymim_jax.evals.inference import TrainedModel
from tinymim_jax.experiment import config, stage_file
from tinymim_jax.runtime.errors import InputError

NAMES = ["ant", "bee, wild", "cat", "dog", "elk"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A classifier on CLS with random weights, bilinear pixels and five named classes."""
    folder = tmp_path_factory.mktemp("trained")
    made = stage(config.Classify(), num_classes=5)
    write_stage(folder, made, random_params(made.model))
    written = stage_file.describe(made, [], NAMES)
    (folder / "stage.json").write_text(json.dumps(written))
    return folder


@pytest.fixture(scope="module")
def model(trained):
    return tinymim_jax.load(trained)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven pictures of several sizes, modes and kinds in folders; uint8 arrays by name."""
    root, rng, arrays = tmp_path_factory.mktemp("photos"), np.random.default_rng(3), {}
    for i, (height, width) in enumerate([(20, 31), (16, 16), (40, 17), (9, 12), (33, 33), (16, 50), (25, 24)]):
        name = f"{'ab'[i % 2]}/{i}.png"
        arrays[name] = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(arrays[name]).save(root / name)
    return root, dict(sorted(arrays.items()))


def by_hand(array, size=16, mean=MEAN, std=STD):
    """The shorter side to `size`, bilinear, centre crop, normalised: PIL and numpy alone."""
    image = Image.fromarray(array)
    shorter = min(image.size)
    resized = [int(size * side / shorter) for side in image.size]
    left, top = (round((side - size) / 2) for side in resized)
    pixels = image.resize(resized, Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return (np.asarray(pixels, np.float32) / 255 - np.float32(mean)) / np.float32(std)


def test_images_of_every_kind_give_the_same(model, photos):
    root, arrays = photos
    expected = np.stack([by_hand(array) for array in arrays.values()])
    uint8 = list(arrays.values())
    floats = [array / 255 for array in uint8]
    paths = [str(root / name) for name in arrays]
    opened = [Image.open(root / name) for name in arrays]
    encoded = [(root / name).read_bytes() for name in arrays]
    mixed = [
        uint8[0],
        paths[1],
        opened[2],
        floats[3].astype(np.float32),
        jax.numpy.asarray(uint8[4]),
        root / list(arrays)[5],
    ]
    for images in (uint8, floats, paths, opened, tuple(encoded), [*mixed, uint8[6]]):
        np.testing.assert_allclose(model.preprocess(images), expected, atol=2e-6)
    batch = np.stack([uint8[1], uint8[1][::-1]])
    for images in (batch, batch / 255, [batch]):
        np.testing.assert_allclose(model.preprocess(images), [by_hand(one) for one in batch], atol=2e-6)
    for image in (uint8[0], paths[0], opened[0]):
        assert model.preprocess(image).shape == (1, 16, 16, 3)


def test_both_ways_give_the_same(model, photos):
    images = list(photos[1].values())
    module, variables = model
    assert (module, variables) == (model.module, model.variables) and model.classes == NAMES
    expected = jax.jit(module.apply, static_argnames="capture")(variables, model.preprocess(images), capture=(1, 2))
    out = model(images, capture=[1, 2])
    assert out.logits.shape == (7, 5) and out.tokens.shape == (7, 5, 24) and out.trace[2].q.shape == (7, 5, 3, 8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), out, expected)
    assert model(images[0]).trace == {}


def test_programs_are_compiled_once(trained, photos, monkeypatch):
    monkeypatch.setattr("tinymim_jax.evals.inference.AT_ONCE", 4)
    model, images = tinymim_jax.load(trained), list(photos[1].values())
    expected = model(images).logits  # 4 and, padded, 3
    assert model._apply._cache_size() == 1
    for count in (3, 4, 5, 6, 7):
        np.testing.assert_allclose(model(images[:count]).logits, expected[:count], atol=1e-5)
    assert model._apply._cache_size() == 1
    model(images[0]), model(images[:2])
    assert model._apply._cache_size() == 3


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((4, 4, 3), 17.0), r"image 0: floats are RGB in \[0, 1\], and these reach from 17 to 17; give 8-bit"),
        (np.full((4, 4, 3), np.nan), "image 0: floats are RGB"),
        (np.zeros((3, 8, 8), np.uint8), r"image 0: an array uint8\[3, 8, 8\] is no image; give uint8\[H, W, 3\], RGB"),
        (np.zeros((0, 4, 3)), "image 0: an array uint8"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 4), np.uint8)], "image 1: an array uint8"),
        ([], "there are no images; give at least one"),
        (np.zeros((0, 4, 4, 3), np.uint8), "there are no images; give at least one"),
        (b"nothing", "image 0: cannot be decoded"),
        ("gone/a.jpg", "gone/a.jpg: there is no such file"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_named(image, message, model):
    with pytest.raises(InputError, match=message):
        model(image)


def test_a_damaged_picture_of_pil_is_named(model):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(buffer, "JPEG")
    with pytest.raises(InputError, match="image 0: cannot be decoded as an image"):
        model(Image.open(io.BytesIO(buffer.getvalue()[:-900])))


def test_folders_give_what_images_give(model, photos):
    root, arrays = photos
    out = model(list(arrays.values()), capture=(1,))
    names, features = model.features(root, batch_size=3)
    assert names == list(arrays)
    np.testing.assert_allclose(features, out.tokens[:, 0], atol=1e-5)
    np.testing.assert_allclose(model.features(root, pool="mean")[1], out.tokens[:, 1:].mean(1), atol=1e-5)
    np.testing.assert_allclose(model.features(str(root), block=1)[1], out.trace[1].out[:, 0], atol=1e-5)
    names, (probabilities, classes) = model.predictions(root, k=2)
    assert names == list(arrays)
    expected = np.asarray(jax.nn.softmax(out.logits))
    np.testing.assert_array_equal(classes, np.argsort(-expected, axis=1)[:, :2])
    np.testing.assert_allclose(probabilities, -np.sort(-expected, axis=1)[:, :2], atol=1e-6)
    assert model.predictions(root, k=9)[1][0].shape == (7, 5)


def test_features_are_those_that_probes_read(finished, mesh, tmp_path):
    """Of a distilled student, from before its half-trained block; the digits of its own evaluation set as files."""
    subject = stage_file.read_subject(finished / "distill")
    clean, _ = suite.data_sets(subject, suite.Sets())
    clean = dataclasses.replace(clean, per_class=1)
    knn = config.Knn(clean, clean, k=(1,)).build(Context(mesh, suite.predict_of(subject, clean)))
    expected = Measurement({"x": knn})
    source, model = knn.passes["data"].source, tinymim_jax.load(finished / "distill")
    assert model.block == 1
    (tmp_path / "all").mkdir()
    for i in range(len(source)):
        Image.fromarray(source[i]["image"]).save(tmp_path / "all" / f"{i:02d}.png")
    names, features = model.features(tmp_path)
    assert names == [f"all/{i:02d}.png" for i in range(10)]
    found = [np.asarray(expected.updates["x"](subject.variables, {}, {}, batch)[0]) for batch in knn.passes["data"]]
    np.testing.assert_allclose(np.concatenate(found)[:10], features, atol=1e-5)


def test_what_a_model_does_not_have_is_refused(finished, photos, model):
    root, _ = photos
    without = tinymim_jax.load(finished / "mae")
    assert without.classes is None
    with pytest.raises(InputError, match="the model has no head, so it predicts nothing: fine-tune it"):
        without.predictions(root)
    with pytest.raises(InputError, match="block 3 is beyond the model's 2 blocks"):
        model.features(root, block=3)
    subject = dataclasses.replace(stage_file.read_subject(finished / "mae"))
    subject.model.__class__ = type("NoCls", (type(subject.model),), {"num_prefix": 0})
    with pytest.raises(InputError, match="no token for pool 'cls'; use 'mean'"):
        TrainedModel(subject).features(root, pool="cls")


def test_images_that_cannot_be_decoded(model, photos, tmp_path, caplog):
    root, arrays = photos
    (tmp_path / "x").mkdir()
    for i, array in enumerate(list(arrays.values())[:3]):
        Image.fromarray(array).save(tmp_path / "x" / f"{i}.png")
    (tmp_path / "x" / "1.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=r"x/1\.png: cannot be decoded"):
        model.features(tmp_path)
    names, features = model.features(tmp_path, on_bad_image="skip", batch_size=2)
    assert names == ["x/0.png", "x/2.png"] and "x/1.png" in caplog.text
    np.testing.assert_allclose(features, model.features(root)[1][[0, 2]], atol=1e-5)


def test_a_converted_checkpoint_brings_its_pixels_and_names(trained, model, photos, tmp_path):
    pytest.importorskip("torch")
    from tinymim_jax.bridge import convert
    from tinymim_jax.bridge.export import export

    export(trained, tmp_path / "timm", "timm")
    convert.write(lambda: convert.read(tmp_path / "timm"), tmp_path / "converted")
    converted, images = tinymim_jax.load(tmp_path / "converted"), list(photos[1].values())
    np.testing.assert_array_equal(converted.preprocess(images), model.preprocess(images))
    np.testing.assert_allclose(converted(images).logits, model(images).logits, atol=1e-5)


def exact_pixels(photos):
    """What PIL and numpy make of the photographs, [B, 3, S, S], for PyTorch."""
    return np.stack([by_hand(array) for array in photos[1].values()]).transpose(0, 3, 1, 2).copy()


def test_transformers_says_the_same(trained, model, photos, tmp_path):
    torch = pytest.importorskip("torch")
    from tests.bridge.test_export import from_pretrained
    from tinymim_jax.bridge.export import export

    export(trained, tmp_path / "hf", "hf")
    with torch.no_grad():
        out = from_pretrained(tmp_path / "hf")[0](torch.from_numpy(exact_pixels(photos)), output_hidden_states=True)
    expected = torch.softmax(out.logits, 1).numpy()
    _, (probabilities, classes) = model.predictions(photos[0], k=5)
    np.testing.assert_allclose(probabilities, -np.sort(-expected, axis=1), rtol=2e-4)
    np.testing.assert_array_equal(classes, np.argsort(-expected, axis=1))
    _, features = model.features(photos[0], block=1, pool="mean")
    np.testing.assert_allclose(features, out.hidden_states[1][:, 1:].mean(1), atol=1e-4)


def test_timm_says_the_same_with_its_own_transform(trained, model, photos, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    import torch

    from tinymim_jax.bridge.export import export

    export(trained, tmp_path / "timm", "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    pixels = torch.stack([transform(Image.fromarray(array)) for array in photos[1].values()])
    np.testing.assert_allclose(pixels.numpy(), exact_pixels(photos), atol=1e-5)
    expected = theirs(pixels).softmax(1).detach().numpy()
    np.testing.assert_allclose(model.predictions(photos[0])[1][0], -np.sort(-expected, axis=1), rtol=2e-4)
