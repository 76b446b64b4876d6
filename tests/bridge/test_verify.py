"""What is compared, how differences are counted and told, and what stops the comparison."""

import dataclasses
import json
import sys

import numpy as np
import pytest

pytest.importorskip("torch", reason="the source's own model runs in PyTorch")

import torch

from tests import torch_files as files
from tests.bridge.test_convert import CFG, DECODER, HEAD, KINDS, TOLD, hugging_face, written
from tinymim_jax.bridge import convert, verify
from tinymim_jax.bridge.layout import Told
from tinymim_jax.bridge.torch_reference import mae, vit
from tinymim_jax.bridge.verify import Difference
from tinymim_jax.runtime.errors import InputError

PER_BLOCK = {f"block {i} {part}" for i in (1, 2) for part in ("tokens", "q", "k", "v")}


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, 16, 16, 3)).astype(np.float32), rng.uniform(size=(2, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("mae_encoder", {"tokens"}),
        ("mae_full", {"tokens", "reconstruction"}),
        ("mae_finetuned", {"tokens", "logits"}),
        ("tinymim_star", {"logits"}),  # the reference's tokens lie behind the neck, ours before it
    ],
)
def test_what_is_compared(name, outputs, tmp_path):
    path, _ = written(name, tmp_path)
    differences = verify.verify(convert.read(path, KINDS[name].told))
    assert {d.name for d in differences} == PER_BLOCK | outputs
    verify.check(differences)


@pytest.mark.parametrize(
    ("key", "first"),
    [
        ("encoder/block1/attn/qkv/bias", "block 1 tokens"),
        ("encoder/block2/mlp/fc2/bias", "block 2 tokens"),
        ("encoder/norm/scale", "tokens"),
        ("pretext/decoder/pred/kernel", "reconstruction"),
        ("pretext/decoder/mask_token", "reconstruction"),
        ("encoder/pos_embed", "block 1 tokens"),
    ],
)
def test_one_wrong_array_is_found(key, first, tmp_path):
    path, _ = written("mae_full", tmp_path)
    converted = convert.read(path, KINDS["mae_full"].told)
    *parents, leaf = key.split("/")
    node = converted.params
    for part in parents:
        node = node[part]
    node[leaf] = node[leaf].copy()
    node[leaf].flat[0] += 0.1
    with pytest.raises(InputError, match=f"^{first} differs by .*, more than 0.0001; "):
        verify.check(verify.verify(converted))


def test_the_reference_is_the_source_itself(tmp_path):
    """`_reference` loads the converted names into the project's own PyTorch model; the file's model is a third party."""
    path = tmp_path / "x.pth"
    model = files.mae_full(path, CFG, DECODER)
    converted = convert.read(path, Told(num_heads=3, decoder_heads=2))
    images, noise = inputs()
    theirs = verify._reference(converted, images, noise)
    with torch.no_grad():
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        pred = model(pixels, torch.from_numpy(noise))[1].numpy()
        tokens, trace = model.encode(pixels)
    np.testing.assert_array_equal(theirs["reconstruction"], pred)
    np.testing.assert_array_equal(theirs["tokens"], tokens.numpy())
    np.testing.assert_array_equal(theirs["block 2 k"], trace[1].k.transpose(1, 2).numpy())
    assert theirs["block 1 q"].shape == (2, 5, 3, 8)


def test_the_reconstruction_is_of_a_masked_image(tmp_path):
    path, _ = written("mae_full", tmp_path)
    converted = convert.read(path, KINDS["mae_full"].told)
    images, noise = inputs()
    ours = verify._ours(converted, images, noise)["reconstruction"]
    keep, _, _ = mae.random_masking(torch.from_numpy(noise), 0.75)
    seen = images.copy()
    for i, patch in enumerate(keep[:, 0].tolist()):
        row, column = divmod(patch, 2)
        seen[i, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
    hidden = np.where(seen == images, images + 1, images)

    def reconstruct(pixels):
        return verify._ours(converted, pixels, noise)["reconstruction"]

    assert np.abs(reconstruct(seen) - ours).max() > 1e-3
    np.testing.assert_array_equal(reconstruct(hidden), ours)


def test_a_difference_is_of_the_largest_values():
    theirs, ours = np.array([1.0, -4.0, 2.0], np.float32), np.array([1.0, -4.5, 2.25], np.float32)
    assert verify.difference("x", theirs, ours) == Difference("x", 0.5, 0.125)
    assert verify.difference("x", np.zeros(3), np.zeros(3)).relative == 0
    assert np.isnan(verify.difference("x", np.ones(2), np.array([1, np.nan])).relative)


@pytest.mark.parametrize("relative", [1.1e-4, float("nan"), float("inf")])
def test_check_stops_at_the_limit(relative):
    good = Difference("block 1 q", 1.0, 1e-4)
    verify.check([good])
    with pytest.raises(
        InputError, match=r"^logits differs by \S+, more than 0.0001; .*--num_heads, --last_block_heads"
    ):
        verify.check([good, Difference("logits", 1.0, relative)])


def test_the_table_has_a_row_for_each_block_and_output():
    parts = [Difference(f"block {i} {part}", 1e-7, i * 1e-6) for i in (1, 2) for part in verify.PARTS]
    lines = verify.table([*parts, Difference("logits", 2e-7, 3e-5)]).splitlines()
    assert lines[0].split() == ["tokens", "q", "k", "v"]
    assert lines[2].split() == ["block", "2", *["1.0e-07", "/", "2.0e-06"] * 4]
    assert lines[3].split() == ["logits", "2.0e-07", "/", "3.0e-05"]
    assert lines[4:] == ["largest relative difference 3.0e-05, in logits (cells: absolute / relative)"]


# What stops it


def test_torch_is_missing(tmp_path, monkeypatch):
    path, _ = written("timm_safetensors", tmp_path)
    converted = convert.read(path, TOLD)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"^--verify needs torch: pip install 'tinymim_jax\[verify\]'"):
        verify.verify(converted)


def test_transformers_is_missing(tmp_path, monkeypatch):
    converted = convert.read(hugging_face("ViTModel", tmp_path / "hf"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"^--verify of a Hugging Face folder needs transformers: .*\[verify\]"):
        verify.verify(converted)


def test_a_bug_of_the_reference_is_no_bad_input(tmp_path, monkeypatch):
    path, _ = written("timm_safetensors", tmp_path)
    monkeypatch.setattr(vit.ViT, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        verify.verify(convert.read(path, TOLD))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["ViTModelX"]}, "architectures names no class of transformers"),
        ({"architectures": ["pipeline"]}, "architectures names no class of transformers"),
        ({"architectures": ["logging"]}, "architectures names no class of transformers"),
        ({"architectures": ["AutoModel"]}, "architectures names no class of transformers"),
        ({"architectures": []}, "architectures names no class of transformers"),
        ({"architectures": None}, "architectures names no class of transformers"),
        ({"architectures": ["ViTModel"]}, "architectures names ViTModel, which has no logits"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but the weights have 2"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1, but the weights have 2"),
        ({"hidden_size": 48}, "hidden_size is 48, but the weights have 24"),
        ({"image_size": 32}, "image_size is 32, but the weights have 16"),
        ({"layer_norm_eps": "x"}, "layer_norm_eps is 'x'; it must be above 0"),
    ],
    ids=str,
)
def test_a_config_that_is_not_of_these_weights(changes, message, tmp_path):
    path = hugging_face("ViTForImageClassification", tmp_path / "hf")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(InputError, match=message) as error:
        verify.verify(convert.read(path))
    assert "\n" not in str(error.value)


def test_heads_of_the_last_block_count(tmp_path):
    """A model of 3 and 4 heads is not one of 3."""
    path = tmp_path / "x.pth"
    files.deit(path, dataclasses.replace(HEAD, last_block_heads=4))
    right, wrong = (convert.read(path, Told(num_heads=3, last_block_heads=last)) for last in (4, None))
    verify.check(verify.verify(right))
    images, noise = inputs()
    theirs, ours = verify._ours(right, images, noise), verify._ours(wrong, images, noise)
    same = {
        name for name in theirs if theirs[name].shape == ours[name].shape and np.array_equal(theirs[name], ours[name])
    }
    assert "block 1 tokens" in same and not {"block 2 tokens", "tokens", "logits"} & same
