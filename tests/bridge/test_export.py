"""Ours in the formats of others: back again bit for bit, and the same outputs where the others run them."""

import dataclasses
import functools
import json
import sys

import jax
import numpy as np
import pytest

from tinymim_jax.experiment import stage_file
from tinymim_jax.weights.parameters import flatten, shapes_of

pytest.importorskip("torch", reason="the exported weights are run in PyTorch")

import torch
from PIL import Image
from safetensors.torch import load_file

import tinymim_jax
from tests.weights.test_handoff import write_stage
from tinymim_jax.bridge import convert
from tinymim_jax.bridge.export import Weights, export
from tinymim_jax.bridge.torch_reference import mae as reference_mae
from tinymim_jax.bridge.torch_reference import vit as reference_vit
from tinymim_jax.data import augment
from tinymim_jax.experiment import config
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import Context
from tinymim_jax.weights import handoff

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
DECODER = config.Decoder(16, 2, 2, mlp_ratio=2.5)
SIZE = {"image_size": 16, "patch_size": 8}
ENCODER = config.ViT(24, 2, 3, posembed="trainable", drop_path=0.1, drop_path_shape="linear", **SIZE)
DISTILL = config.Distill(config.Init(path="/gone/teacher"), {"relation": config.Relation(2, 2)})
OURS = {  # name -> task, fields of the model
    "mae": (config.Mae(decoder=DECODER), {}),
    "encoder": (DISTILL, {}),
    "distilled": (DISTILL, {"last_block_heads": 4}),
    "cls": (config.Classify(), {"num_classes": 5}),
    "mean": (config.Classify(), {"num_classes": 5, "pool": "mean"}),
    "dist": (config.Classify(), {"num_classes": 5, "dist_token": True}),
    "star": (config.Classify(), {"num_classes": 5, "pool": "mean", "dist_token": True, "neck": 40}),
    "beit": (config.Classify(), {"num_classes": 5, "pool": "mean", "relative_position": True, "layer_scale": 0.5}),
    "no head": (DISTILL, {"relative_position": True}),
}
IMAGES = np.random.default_rng(1).normal(size=(3, 16, 16, 3)).astype(np.float32)
NOISE = np.random.default_rng(2).uniform(size=(3, 4)).astype(np.float32)


def stage(task, **model):
    data = config.Data("digits", image_size=16, mean=MEAN, std=STD, interpolation="bilinear", crop_pct=1.0)
    return config.Stage(task, dataclasses.replace(ENCODER, **model), data, config.Optim(1e-3), config.Run(4, steps=1))


def random_params(model, decoder=None, seed=0):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return rng.normal(path[-1].key == "scale", 0.2, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, convert.shapes(model, decoder))


def write(folder, name, **options):
    """A finished stage with random weights."""
    task, fields = OURS[name]
    made = stage(task, **fields)
    params = random_params(made.model, DECODER if name == "mae" else None)
    write_stage(folder, made, params, **options)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(name): such a stage, written once."""
    root = tmp_path_factory.mktemp("ours")
    return functools.cache(lambda name: write(root / name, name))


@functools.cache
def _compiled(path):
    module, variables = tinymim_jax.load(path)
    with jax.default_matmul_precision("highest"):
        return jax.jit(module.apply)(variables, IMAGES)


def ours(path):
    """Our own logits, or tokens where there is no head."""
    out = _compiled(path)
    return np.asarray(out.tokens if out.logits is None else out.logits)


def pixels(images=IMAGES):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def assert_same(theirs, expected, limit=1e-5):
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert theirs.shape == expected.shape and np.abs(expected).max() > 0.1
    assert np.abs(theirs - expected).max() <= limit * np.abs(expected).max()


# There and back


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "mae") for name in OURS if name != "beit"),  # whose factors become part of other weights
        *((name, "timm") for name in ("mae", "encoder", "cls", "mean", "dist")),
        *((name, "hf") for name in ("mae", "encoder", "cls")),
    ],
)
def test_there_and_back(name, form, folder, tmp_path):
    files = export(folder(name), tmp_path / "out", form)
    converted = convert.read(next(f for f in files if f.suffix == ".pth") if form == "mae" else tmp_path / "out")
    found, params = converted.layout, handoff.read_variables(folder(name))["params"]
    if form == "timm":
        params.pop("pretext", None)
    assert list(flatten(converted.params)) and shapes_of(converted.params) == shapes_of(params)
    jax.tree.map(np.testing.assert_array_equal, converted.params, params)
    model = stage_file.read_model(folder(name))
    # Others' formats do not say how a model was trained.
    assert found.model == (
        model if form == "mae" else dataclasses.replace(model, drop_path=0.0, drop_path_shape="constant")
    )
    has_decoder = name == "mae" and form != "timm"
    assert (found.decoder, found.norm_pix_loss) == ((DECODER, True) if has_decoder else (None, None))
    assert found.notes[0].startswith(f"3 heads, as {'the file' if form == 'mae' else 'config.json'} says")
    if form != "mae":
        assert found.preprocessing.items() >= {"mean": list(MEAN), "std": list(STD)}.items()


def test_fixed_positions_stay_fixed(tmp_path):
    model = dataclasses.replace(ENCODER, posembed="fixed")
    made = dataclasses.replace(stage(DISTILL), model=model)
    params = random_params(model)
    params["encoder"]["pos_embed"] = reference_vit.sincos(2, 24).numpy()
    write_stage(tmp_path / "ours", made, params)
    for form in ("timm", "hf"):
        export(tmp_path / "ours", tmp_path / form, form)
        assert convert.read(tmp_path / form).layout.model.posembed == "fixed"


def test_a_converted_checkpoint_is_exported_too(folder, tmp_path):
    export(folder("mae"), tmp_path / "hf", "hf")
    convert.write(lambda: convert.read(tmp_path / "hf"), tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "again", "hf")
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_averaged_weights_are_exported(tmp_path):
    average = random_params(ENCODER, seed=1)
    write(tmp_path / "ours", "encoder", ema=average)
    export(tmp_path / "ours", tmp_path / "out", "timm")
    jax.tree.map(np.testing.assert_array_equal, convert.read(tmp_path / "out").params, average)


# Heads


@pytest.mark.parametrize("form", ["timm", "hf"])
def test_other_heads_in_the_last_block_are_refused(form, folder, tmp_path):
    with pytest.raises(
        InputError, match=r"block 2 has 4 heads and the others 3, which .* cannot express; give --regroup_h"
    ):
        export(folder("distilled"), tmp_path / "out", form)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["timm", "hf", "mae"])
def test_regrouped_heads(form, folder, tmp_path):
    """The weights stay, the model that reads them has 3 heads everywhere, and the card says so."""
    files = export(folder("distilled"), tmp_path / "out", form, regroup_heads=True)
    path = next((f for f in files if f.suffix == ".pth"), tmp_path / "out")
    converted = convert.read(path)
    assert (converted.layout.model.num_heads, converted.layout.model.last_block_heads) == (3, None)
    original, regrouped = (
        flatten(p) for p in (handoff.read_variables(folder("distilled"))["params"], converted.params)
    )
    for key, value in regrouped.items():
        np.testing.assert_array_equal(value.ravel(), original[key].ravel())
    assert regrouped["encoder/block2/attn/qkv/kernel"].shape == (24, 3, 3, 8)
    assert "Block 2 was trained with 4 heads and is read with 3 here." in (tmp_path / "out" / "README.md").read_text()


def test_nothing_is_regrouped_where_all_heads_are_equal(folder):
    assert not Weights(folder("encoder"), regroup_heads=True).regrouped
    assert Weights(folder("distilled"), regroup_heads=True).regrouped
    assert not Weights(folder("distilled")).regrouped


# Hugging Face


def from_pretrained(path):
    """(model, the class's name); every key loaded."""
    transformers = pytest.importorskip("transformers", reason="the exported folder is loaded by transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    (name,) = json.loads((path / "config.json").read_text())["architectures"]
    options = {"add_pooling_layer": False} if name == "ViTModel" else {}
    model, info = getattr(transformers, name).from_pretrained(path, output_loading_info=True, **options)
    assert {key: list(value) for key, value in info.items() if value} == {}
    return model.eval(), name


@pytest.mark.parametrize(
    ("ours_name", "theirs_name"),
    [
        ("encoder", "ViTModel"),
        ("cls", "ViTForImageClassification"),
        ("mean", "BeitForImageClassification"),
        ("beit", "BeitForImageClassification"),
    ],
)
def test_hugging_face_gives_the_same(ours_name, theirs_name, folder, tmp_path):
    files = export(folder(ours_name), tmp_path / "out", "hf")
    assert [f.name for f in files] == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    model, name = from_pretrained(tmp_path / "out")
    assert name == theirs_name
    out = model(pixels())
    assert_same(out.last_hidden_state if ours_name == "encoder" else out.logits, ours(folder(ours_name)))


def test_relative_positions_without_a_head_have_no_class(folder, tmp_path):
    with pytest.raises(
        InputError, match="Hugging Face's ViT has no relative positions .* or export it with --format=mae"
    ):
        export(folder("no head"), tmp_path / "out", "hf")


def reconstruction(path):
    task = config.Mae(decoder=DECODER).build(Context(ENCODER, config.Data("digits")))
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(task.reconstruct)(handoff.read_variables(path)["params"], IMAGES, NOISE)[0])


def test_hugging_face_gives_the_same_reconstruction(folder, tmp_path):
    export(folder("mae"), tmp_path / "out", "hf")
    model, name = from_pretrained(tmp_path / "out")
    assert name == "ViTMAEForPreTraining" and model.config.norm_pix_loss and model.config.mask_ratio == 0.75
    assert_same(model(pixels(), noise=torch.from_numpy(NOISE)).logits, reconstruction(folder("mae")))


def test_the_processor_of_hugging_face(folder, tmp_path):
    export(folder("cls"), tmp_path / "out", "hf")
    settings = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (settings["image_mean"], settings["image_std"]) == (list(MEAN), list(STD))
    assert (settings["size"], settings["crop_size"]) == ({"shortest_edge": 16}, {"height": 16, "width": 16})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {
        str(i): f"LABEL_{i}" for i in range(5)
    }


# timm, and MAE's code


@pytest.mark.parametrize("name", ["encoder", "mae", "cls", "mean", "dist"])
def test_timm_weights_in_the_reference(name, folder, tmp_path):
    files = export(folder(name), tmp_path / "out", "timm")
    assert [f.name for f in files] == ["README.md", "config.json", "model.safetensors"]
    m = stage_file.read_model(folder(name))
    model = reference_vit.ViT(m)
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    out = model.eval()(pixels())
    assert_same(out.logits if m.num_classes else out.tokens, ours(folder(name)))


@pytest.mark.parametrize("name", ["encoder", "mae", "cls", "mean", "dist"])
def test_timm_gives_the_same(name, folder, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    export(folder(name), tmp_path / "out", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    output = model(pixels()) if stage_file.read_model(folder(name)).num_classes else model.forward_features(pixels())
    assert_same(output, ours(folder(name)))
    data = timm.data.resolve_model_data_config(model)
    assert [list(data[key]) for key in ("input_size", "mean", "std")] == [[3, 16, 16], list(MEAN), list(STD)]
    assert (data["interpolation"], data["crop_pct"]) == ("bilinear", 1.0)


def test_mae_weights_in_the_reference(folder, tmp_path):
    files = export(folder("mae"), tmp_path / "out", "mae")
    assert [f.name for f in files] == ["README.md", "checkpoint.pth"]
    model = reference_mae.MAE(ENCODER, config.Mae(decoder=DECODER))
    model.load_state_dict(torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)["model"], strict=True)
    assert_same(model.eval()(pixels(), torch.from_numpy(NOISE))[1], reconstruction(folder("mae")))


def test_star_weights_in_the_reference(folder, tmp_path):
    export(folder("star"), tmp_path / "out", "mae")
    cfg = config.ViT(24, 2, 3, num_classes=5, pool="mean", dist_token=True, neck=40, **SIZE)
    model = reference_vit.ViT(cfg)
    model.load_state_dict(torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)["model"], strict=True)
    assert_same(model.eval()(pixels()).logits, ours(folder("star")))


# ONNX


def skip_without_onnx():
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"ONNX export needs {package}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "output"), [("star", "logits"), ("mae", "last_hidden_state"), ("distilled", "last_hidden_state")]
)
@pytest.mark.filterwarnings("ignore")  # torch's exporter talks
def test_onnx_gives_the_same_on_another_batch(name, output, folder, tmp_path):
    skip_without_onnx()
    import onnxruntime

    files = export(folder(name), tmp_path / "out", "onnx")
    assert [f.name for f in files] == ["README.md", "model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    assert [value.name for value in session.get_inputs()] == ["images"]
    assert [value.name for value in session.get_outputs()] == [output]
    for count in (1, 3):
        (out,) = session.run(None, {"images": pixels(IMAGES[:count]).numpy()})
        assert_same(out, ours(folder(name))[:count], 1e-4)


# What is refused


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("star", "timm", r"timm has no model with a neck before the head \(TinyMIM\*-T\); export it with --format=mae"),
        ("star", "hf", "Hugging Face's ViT has no distillation token and no neck; export it with --format=mae"),
        ("dist", "hf", "Hugging Face's ViT has no distillation token and no neck"),
        ("cls", "keras", "--format=keras: unknown; choose one of timm, hf, mae, onnx"),
    ],
)
def test_models_that_a_format_does_not_know(name, form, message, folder, tmp_path):
    with pytest.raises(InputError, match=message):
        export(folder(name), tmp_path / "out", form)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["hf", "mae"])
def test_a_linear_probes_batch_norm_is_folded(form, tmp_path):
    probe = stage(config.Classify(), num_classes=5, head_norm=True)
    rng = np.random.default_rng(4)
    state = {"mean": rng.normal(size=24), "var": rng.uniform(1e-6, 3, 24)}
    state = {"batch_stats": {"head_norm": {key: a.astype(np.float32) for key, a in state.items()}}}
    write_stage(tmp_path / "ours", probe, random_params(probe.model), model_state=state)
    expected = ours(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "out", form)
    if form == "hf":
        assert_same(from_pretrained(tmp_path / "out")[0](pixels()).logits, expected)
    else:
        convert.write(lambda: convert.read(tmp_path / "out" / "checkpoint.pth"), tmp_path / "back")
        assert_same(torch.from_numpy(np.array(ours(tmp_path / "back"))), expected)


def test_names_and_eps_come_back(tmp_path):
    made = stage(config.Classify(), num_classes=5, layer_norm_eps=1e-3)
    names = ["zebra", "ant", "dog, big", "1", "Ünze"]
    write_stage(tmp_path / "ours", made, random_params(made.model), classes=names)
    for form, file in (("hf", ""), ("mae", "checkpoint.pth")):
        export(tmp_path / "ours", tmp_path / form, form)
        convert.write(functools.partial(convert.read, tmp_path / form / file), tmp_path / f"{form}_back")
        assert stage_file.read(tmp_path / f"{form}_back").get("classes") == names
        assert stage_file.read_model(tmp_path / f"{form}_back").layer_norm_eps == 1e-3
        assert stage_file.read_preprocessing(tmp_path / f"{form}_back") == stage_file.read_preprocessing(
            tmp_path / "ours"
        )
    assert_same(from_pretrained(tmp_path / "hf")[0](pixels()).logits, ours(tmp_path / "ours"))
    with pytest.raises(InputError, match=r"timm's ViT has LayerNorm eps 1e-6 and this one 0\.001"):
        export(tmp_path / "ours", tmp_path / "timm", "timm")


def test_timm_has_the_names(tmp_path):
    made = stage(config.Classify(), num_classes=2)
    write_stage(tmp_path / "ours", made, random_params(made.model), classes=["b", "a"])
    export(tmp_path / "ours", tmp_path / "out", "timm")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == ["b", "a"]
    convert.write(lambda: convert.read(tmp_path / "out"), tmp_path / "back")
    assert stage_file.read(tmp_path / "back").get("classes") == ["b", "a"]


@pytest.mark.parametrize(
    "fields",
    [
        {"crop_pct": 0.875},
        {"crop_pct": 1.0, "interpolation": "bilinear"},
        {"crop_pct": 0.7, "crop_mode": "squash"},
        {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "lanczos"},
    ],
)
def test_the_exported_processor_gives_our_pixels(fields, tmp_path):
    """Of photographs that are not square; where an odd number is halved, transformers and we may be a pixel apart."""
    transformers = pytest.importorskip("transformers")
    made = stage(config.Classify(), num_classes=5)
    made.evals = {"val": config.Classification(dataclasses.replace(made.data, transform="eval", **fields))}
    made.evals["val"].data.crop_pct = fields["crop_pct"]
    write_stage(tmp_path / "ours", made, random_params(made.model))
    export(tmp_path / "ours", tmp_path / "out", "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    data = made.evals["val"].data
    rng = np.random.default_rng(0)
    for size in ((80, 48), (47, 90), (33, 33), (100, 41)):
        image = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
        own = (augment.transform(image, data, rng) / 255.0 - np.array(MEAN)) / np.array(STD)
        shifted = [np.roll(own, shift, (0, 1)) for shift in ((0, 0), (0, 1), (1, 0), (1, 1))]
        assert min(np.abs(one - theirs)[1:, 1:].max() for one in shifted) < 1e-4, size


def test_an_unfinished_stage(tmp_path):
    write(tmp_path / "ours", "cls", done=False)
    with pytest.raises(InputError, match="has no finished stage: run that stage first"):
        export(tmp_path / "ours", tmp_path / "out", "timm")
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize(
    ("form", "package", "extra"),
    [("mae", "torch", "torch"), *(("onnx", p, "onnx") for p in ("torch", "onnxruntime", "onnxscript"))],
)
def test_a_package_is_missing(form, package, extra, folder, tmp_path, monkeypatch):
    for other in {"onnxruntime", "onnxscript"} - {package} if form == "onnx" else ():
        monkeypatch.setitem(sys.modules, other, sys)  # any module will do
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"this format needs {package}: pip install 'tinymim_jax\[{extra}\]'"):
        export(folder("cls"), tmp_path / "out", form)
    assert list(tmp_path.iterdir()) == []


def test_onnx_with_regrouped_heads(folder, tmp_path):
    """The check of what onnxruntime gives is against our model with 3 heads."""
    skip_without_onnx()
    export(folder("distilled"), tmp_path / "out", "onnx", regroup_heads=True)


def test_an_onnx_that_differs_is_not_kept(folder, tmp_path):
    from tinymim_jax.bridge import export as module

    weights = Weights(folder("cls"))
    images = pixels().numpy()
    module._check_onnx(weights, images, ours(folder("cls")))
    with pytest.raises(RuntimeError, match="onnxruntime's output differs from ours by "):
        module._check_onnx(weights, images, ours(folder("cls")) + 0.01)
