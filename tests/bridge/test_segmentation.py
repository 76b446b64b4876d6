"""Models that segment, between ours, transformers' classes and mmseg's layout: the same logits of pixels."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="the models that are converted are PyTorch's")

import torch
from PIL import Image

from tests.bridge import mmseg
from tests.weights.test_handoff import write_stage
from tinymim_jax.__main__ import main
from tinymim_jax.bridge import convert, verify
from tinymim_jax.bridge.export import export
from tinymim_jax.bridge.layout import Told
from tinymim_jax.experiment import stage_file
from tinymim_jax.experiment.config import Data, Fcn, Fpn, Linear, Masks, Optim, Pyramid, Run, Segment, Stage, UPer, ViT
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import Context
from tinymim_jax.weights.parameters import flatten

NAMES = ["wall", "sky", "tree", "road", "bed"]
MODEL = ViT(
    24, 4, 3, image_size=32, patch_size=8, posembed="trainable", pool="mean", relative_position=True, layer_scale=0.5
)
TASK = Segment(5, UPer(16), taps=(1, 2, 3, 4), aux=Fcn(12))
DATA = Data("pairs", image_size=32, masks=Masks(5, zero_is_ignored=True, scale=(64, 32)))
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)


def a_stage(task=TASK, **model):
    return Stage(task, dataclasses.replace(MODEL, **model), DATA, Optim(1e-3), Run(4, steps=1))


def write(folder, stage):
    """A finished stage with random weights and statistics."""
    shapes = convert.shapes(stage.model, None, stage.task, stage.data.masks)
    rng = np.random.default_rng(1)

    def make(path, leaf):
        if path[-1].key == "var":
            return rng.uniform(0.5, 2, leaf.shape).astype(np.float32)
        return rng.normal(path[-1].key == "scale", 0.2, leaf.shape).astype(np.float32)

    made = jax.tree_util.tree_map_with_path(make, shapes)
    stats = made.pop("batch_stats", None)
    write_stage(folder, stage, made, model_state={"batch_stats": stats} if stats else {}, classes=NAMES)
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return write(tmp_path_factory.mktemp("ours") / "stage", a_stage())


def logits(folder, images=IMAGES):
    """Of both heads, [B, C, h, w], of images that are normalised as `torch_images`."""
    task, data = stage_file.read_segmentation(folder)
    subject = stage_file.read_subject(folder)
    built = task.build(Context(subject.model, data))
    params, state = subject.variables["params"], {k: v for k, v in subject.variables.items() if k != "params"}

    @jax.jit
    def compute(params, state, images):
        pixels = built.images({"image": images})
        out = built.model.apply({"params": params["encoder"]}, pixels, capture=task.taps)
        return built.decode.apply({"params": params["pretext"], **state}, built._maps(out), False)

    with jax.default_matmul_precision("highest"):
        found = compute(params, state, images)
    return [np.asarray(found[name]).transpose(0, 3, 1, 2) for name in ("head", "aux") if name in found]


def torch_images(data=DATA):
    pixels = (IMAGES / np.float32(255) - np.float32(data.mean)) / np.float32(data.std)
    return torch.tensor(pixels.astype(np.float32)).permute(0, 3, 1, 2)


def same(found, expected, limit=1e-5):
    found, expected = (np.asarray(x) for x in (found, expected))
    assert found.shape == expected.shape and np.abs(expected).max() > 0.1
    assert np.abs(found - expected).max() <= limit * np.abs(expected).max()


def resized(x, side=32):
    return torch.nn.functional.interpolate(torch.tensor(np.asarray(x)), (side, side), mode="bilinear")


# Hugging Face


@pytest.mark.parametrize("changes", [{}, {"relative_position": False}, {"layer_scale": 0.0}])
def test_ours_run_in_transformers(changes, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.20")
    head = TASK if not changes else dataclasses.replace(TASK, head=UPer(8, bins=(3, 1)), taps=(1, 2, 3, 4), aux=None)
    folder = write(tmp_path / "stage", a_stage(head, **changes))
    export(folder, tmp_path / "hf", "hf")
    model, report = transformers.UperNetForSemanticSegmentation.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    with torch.no_grad():
        theirs = model.eval()(torch_images()).logits
    same(theirs, resized(logits(folder)[0]))
    assert list(model.config.id2label.values()) == NAMES
    processor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert processor["image_processor_type"] == "BeitImageProcessor" and processor["do_reduce_labels"] is True
    assert processor["size"] == {"height": 32, "width": 32}
    text = (tmp_path / "hf" / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in text and "Segmentation into 5 classes by uper" in text
    assert "UperNetForSemanticSegmentation.from_pretrained" in text and "squashes it into one window" in text


def test_the_auxiliary_head_is_theirs_too(ours, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.20")
    export(ours, tmp_path / "hf", "hf")
    model = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path / "hf").eval()
    seen = []
    model.auxiliary_head.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(torch_images())
    same(seen[0], logits(ours)[1])


@pytest.mark.parametrize("form", ["hf", "mae"])
def test_there_and_back(ours, form, tmp_path):
    files = export(ours, tmp_path / "out", form)
    path = next(file for file in files if file.suffix == ".pth") if form == "mae" else tmp_path / "out"
    converted = convert.read(path)
    convert.write(lambda: converted, tmp_path / "back")
    for found, expected in zip(logits(tmp_path / "back"), logits(ours), strict=True):
        same(found, expected)
    task, data = stage_file.read_segmentation(tmp_path / "back")
    assert task == TASK and stage_file.read(tmp_path / "back")["classes"] == NAMES
    assert data.masks.zero_is_ignored and data.masks.num_classes == 5
    assert (data.masks == DATA.masks) == (form == "mae")
    if form == "hf":
        verify.check(verify.verify(converted))


def test_back_again_is_bit_for_bit(tmp_path):
    """Without LayerScale, which becomes part of other weights."""
    folder = write(tmp_path / "stage", a_stage(layer_scale=0.0))
    export(folder, tmp_path / "mae", "mae")
    converted = convert.read(tmp_path / "mae" / "checkpoint.pth")
    subject = stage_file.read_subject(folder)
    expected = flatten({"params": subject.variables["params"], "batch_stats": subject.variables["batch_stats"]})
    found = flatten({"params": converted.params, **converted.state})
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize(
    ("task", "model", "why"),
    [
        ({"head": Fpn(8), "aux": None}, {}, "has no 'fpn' head; export it with --format=mae"),
        ({"head": Linear(), "aux": None}, {}, "has no 'linear' head"),
        ({"pyramid": Pyramid(width=8)}, {}, "has a pyramid of the encoder's width alone"),
        ({"aux": Fcn(12, level=1)}, {}, "has an auxiliary head on level 2 alone"),
        ({}, {"dist_token": True}, "has no distillation token"),
        ({}, {"last_block_heads": 2}, "block 4 has 2 heads and the others 3, which Hugging Face cannot express"),
    ],
)
def test_what_hugging_face_cannot_hold(task, model, why, tmp_path):
    folder = write(tmp_path / "stage", a_stage(dataclasses.replace(TASK, **task), **model))
    with pytest.raises(InputError, match=why):
        export(folder, tmp_path / "hf", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]
    export(folder, tmp_path / "mae", "mae")  # which can
    if "level" in why:
        return  # not seen in the weights, but said beside them
    convert.write(lambda: convert.read(tmp_path / "mae" / "checkpoint.pth"), tmp_path / "back")
    for found, expected in zip(logits(tmp_path / "back"), logits(folder), strict=True):
        same(found, expected)


def test_formats_without_a_head_for_pixels(ours, tmp_path):
    with pytest.raises(InputError, match=r"--format=timm cannot hold a head for pixels .*: choose one of hf, mae$"):
        export(ours, tmp_path / "out", "timm")


@functools.cache
def _beit(folder):
    """A small BeitForSemanticSegmentation as transformers writes it, none of whose weights is as by initialisation."""
    transformers = pytest.importorskip("transformers", minversion="5.20")
    config = transformers.BeitConfig(
        hidden_size=24, num_hidden_layers=5, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8,
        use_relative_position_bias=True, use_absolute_position_embeddings=False, layer_scale_init_value=0.5,
        out_indices=[2, 3, 4, 5], auxiliary_channels=12, use_mask_token=True, id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)},
    )  # fmt: skip
    model = transformers.BeitForSemanticSegmentation(config).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in (*model.named_parameters(), *model.named_buffers()):
            if x.is_floating_point():
                noise = (
                    torch.rand(x.shape, generator=rng) if "running_var" in name else torch.randn(x.shape, generator=rng)
                )
                x.add_(noise * (1 if x.ndim == 1 else x[0].numel() ** -0.5))
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    processor = transformers.BeitImageProcessor(
        size=size, do_reduce_labels=True, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def beit(tmp_path_factory):
    """(folder, model)"""
    folder = tmp_path_factory.mktemp("beit")
    return folder, _beit(folder)


def test_beit_is_converted(beit, tmp_path):
    folder, model = beit
    converted = convert.read(folder)
    differences = verify.verify(converted)
    verify.check(differences)
    assert any(d.name == "logits" for d in differences)
    convert.write(lambda: converted, tmp_path / "out")
    task, data = stage_file.read_segmentation(tmp_path / "out")
    assert task == dataclasses.replace(TASK, head=UPer(24)) and (data.mean, data.std) == ((0.5,) * 3,) * 2
    assert data.masks == Masks(5, zero_is_ignored=True, scale=(128, 32))
    with torch.no_grad():
        same(logits(tmp_path / "out")[0], model(torch_images(data)).logits)
    assert stage_file.read(tmp_path / "out")["classes"] == NAMES
    notes = "\n".join(converted.lines())
    assert "behind blocks 1, 2, 3, 4, as transformers counts its out_indices" in notes and "3 heads" in notes
    assert "there are no absolute positions: ours are zeros" in notes


def test_blocks_that_beit_was_trained_on(beit, tmp_path):
    """Which transformers does not read: those of out_indices, from 0."""
    folder, _ = beit
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["out_indices"] = [1, 2, 3, 4]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"the checkpoint \(--taps\)\.taps is \(0, 1, 2, 3\); a pyramid is made"):
        convert.read(tmp_path)
    settings["out_indices"] = [2, 3, 4, 4]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert convert.read(tmp_path, Told(taps=[2, 3, 4, 5])).layout.task.taps == (2, 3, 4, 5)
    settings["out_indices"] = "all"
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="out_indices is 'all'; give the blocks that are read: --taps="):
        convert.read(tmp_path)


@pytest.mark.slow
def test_a_converted_one_is_measured_and_paints(beit, tmp_path, capsys):
    folder, _ = beit
    out, rng = str(tmp_path / "out"), np.random.default_rng(0)
    assert main(["convert", str(folder), out, "--verify"]) == 0
    for i in range(3):
        for part, values in (("images", (40, 60, 3)), ("masks", (40, 60))):
            (tmp_path / "wall" / part / "val").mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256 if part == "images" else 6, values, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "wall" / part / "val" / f"{i}.png")
    shutil.copytree(tmp_path / "wall", tmp_path / "bed")
    results = {}
    for order in (NAMES, NAMES[::-1]):
        tree = tmp_path / order[0]
        (tree / "classes.txt").write_text("\n".join(order))
        for flags in ([], ["--ratios=0.5,1,1.5", "--flip"]):
            capsys.readouterr()
            command = ["eval", out, "--suite=segmentation", f"--data={tree}", f"--out={tmp_path / 'e'}"]
            assert main([*command, *flags]) == 0
            said = capsys.readouterr().out
            assert ("which are in another order" in said) == (order != NAMES)
            report = json.loads((tmp_path / "e" / "eval.json").read_text())
            results[order[0], bool(flags)] = report["results"]
    assert results["wall", False] != results["wall", True] and results["wall", False] != results["bed", False]
    assert "--flip=True" in report["notes"][0] and "--ratios=(0.5, 1.0, 1.5)" in report["notes"][0]
    assert main(["predict", out, str(tree / "images"), f"--out={tmp_path / 'p'}"]) == 0
    with Image.open(tmp_path / "p" / "val" / "0.png") as mask:
        assert mask.size == (60, 40) and np.asarray(mask).max() < 5
    assert main(["inspect", out]) == 0
    assert "segmentation into 5 classes by uper" in capsys.readouterr().out
    assert main(["eval", out, "--suite=segmentation"]) == 2
    assert "names no data: give --data=PATH" in capsys.readouterr().err
    for ratios in ("x", "0", "-1,1"):
        assert main([*command, f"--ratios={ratios}"]) == 2
        assert "give numbers above 0, e.g. 0.5,0.75" in capsys.readouterr().err


def test_a_classifier_of_beit_comes_back(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.20")
    config = transformers.BeitConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=16, patch_size=8,
        use_relative_position_bias=True, layer_scale_init_value=0.5, num_labels=4, layer_norm_eps=1e-6,
    )  # fmt: skip
    transformers.BeitForImageClassification(config).save_pretrained(tmp_path)
    converted = convert.read(tmp_path)
    verify.check(verify.verify(converted))
    assert converted.layout.model.relative_position and converted.layout.model.num_classes == 4


# mmseg


@pytest.mark.parametrize("star", [False, True])
def test_mmseg_s_layout(star, tmp_path):
    heads = 12 if star else 3
    model = mmseg.write(tmp_path / "x.pth", star=star, heads=heads)
    converted = convert.read(tmp_path / "x.pth", Told(taps=[1, 2, 3, 4], zero_is_ignored=True))
    convert.write(lambda: converted, tmp_path / "out")
    task, data = stage_file.read_segmentation(tmp_path / "out")
    pyramid = Pyramid(width=96, hidden=48, fc=40) if star else Pyramid()
    assert task == dataclasses.replace(TASK, pyramid=pyramid) and data.masks.zero_is_ignored
    with torch.no_grad():
        for found, expected in zip(logits(tmp_path / "out"), model(torch_images()), strict=True):
            same(found, expected)
    assert stage_file.read(tmp_path / "out")["classes"] == ["wall", "sky", "tree", "road", "bed "]
    assert (converted.layout.model.num_heads, converted.layout.model.dist_token) == (heads, star)
    said = "\n".join(converted.lines())
    assert (
        f"{'TinyMIM*-T, ' if star else ''}UPerNet in mmseg's layout" in said
        and "as its biases by distance have" in said
    )
    assert "ignored, follows from the sizes: backbone.blocks.0.attn.relative_position_index" in said
    with pytest.raises(InputError, match="--verify has no reference of mmseg's classes"):
        verify.verify(converted)
    # And out again, by the same names.
    export(tmp_path / "out", tmp_path / "again", "mae")
    state = torch.load(tmp_path / "again" / "checkpoint.pth")["state_dict"]
    left = {
        key for key in model.state_dict() if not key.endswith(("index", "num_batches_tracked", "gamma_1", "gamma_2"))
    }
    assert set(state) == left


def test_mmseg_s_layout_that_is_not_whole(tmp_path):
    mmseg.write(tmp_path / "x.pth")
    content = torch.load(tmp_path / "x.pth")
    state, told = content["state_dict"], Told(taps=[1, 2, 3, 4])

    def read(change, told=told):
        torch.save({"state_dict": {**state, **change}}, tmp_path / "y.pth")
        return convert.read(tmp_path / "y.pth", told)

    assert read({}).layout.classes is None
    assert not read({}).layout.masks.zero_is_ignored
    with pytest.raises(InputError, match=r"taps is \(1, 2, 3, 4\)|taps is"):
        read({}, Told(taps=[1, 2, 3, 5]))
    with pytest.raises(InputError, match="decode_head.x.weight has no place in a UPerNet in mmseg's layout checkpoint"):
        read({"decode_head.x.weight": torch.ones(2)})
    name = "decode_head.psp_modules.0.1.conv.weight"
    del state[name]
    with pytest.raises(InputError, match=f"there is no {name} of four dimensions: only UPerNet behind a ViT"):
        read({})


def test_blocks_are_by_default_those_of_the_released_files(tmp_path):
    mmseg.write(tmp_path / "x.pth", depth=12, width=12, taps=(4, 6, 8, 12))
    found = convert.read(tmp_path / "x.pth").layout
    assert found.task.taps == (4, 6, 8, 12)
    assert any("behind blocks 4, 6, 8, 12, as BEiT, MAE and TinyMIM have it (--taps)" in note for note in found.notes)
