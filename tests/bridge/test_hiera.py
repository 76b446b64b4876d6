"""Hiera's checkpoints, there and back: transformers' classes with random weights, Meta's and MAE-Lite's files."""

import json

import numpy as np
import pytest

pytest.importorskip("torch", reason="the models that are converted are PyTorch's")
pytest.importorskip("transformers", reason="whose Hiera is the other side")

import torch
from safetensors.numpy import load_file
from transformers import HieraConfig, HieraForImageClassification, HieraForPreTraining, HieraModel

from tinymim_jax.__main__ import main
from tinymim_jax.bridge import convert, hiera
from tinymim_jax.bridge.layout import Told
from tinymim_jax.experiment import stage_file
from tinymim_jax.experiment.config import Hiera
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.weights.parameters import flatten

SIZES = {"embed_dim": 8, "depths": [1, 2, 3, 1], "image_size": [64, 64], "num_heads": [2, 4, 8, 16]}
MAE = {"num_query_pool": 2, "decoder_hidden_size": 12, "decoder_depth": 2, "decoder_num_heads": 3}
LABELS = {"num_labels": 5, "id2label": dict(enumerate("abcde")), "label2id": {n: i for i, n in enumerate("abcde")}}
CLASSES = {
    "classifier": (HieraForImageClassification, LABELS),
    "mae": (HieraForPreTraining, MAE),
    "encoder": (HieraModel, {}),
}


@pytest.fixture(scope="module", params=CLASSES)
def theirs(request, tmp_path_factory):
    """(kind, the folder of a model there)."""
    cls, settings = CLASSES[request.param]
    torch.manual_seed(0)
    model = cls(HieraConfig(**SIZES, **settings))
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, folder


def metas(folder, prefix=""):
    """The arrays of a transformers folder by Meta's names."""
    arrays = load_file(folder / "model.safetensors")
    depths = SIZES["depths"]
    begin = "hiera." if any(name.startswith("hiera.") for name in arrays) else ""
    return {prefix + hiera._from_hf(name, depths, begin): torch.from_numpy(a) for name, a in arrays.items()}


def test_there_and_back(theirs, tmp_path, capsys):
    kind, folder = theirs
    assert main(["convert", str(folder), str(tmp_path / "ours"), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "largest relative difference" in said and "Hiera, width 8 to 64, 1+2+3+1 blocks" in said
    assert ("reconstruction" in said) == (kind == "mae") and ("logits" in said) == (kind == "classifier")
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), "--format=hf"]) == 0
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    dropped = {name for name in before if name.startswith("pooler.")}
    assert before.keys() - dropped == after.keys()
    for name, array in after.items():
        np.testing.assert_array_equal(array, before[name])
    cls, _ = CLASSES[kind]
    model = cls.from_pretrained(tmp_path / "back", **({"add_pooling_layer": False} if kind == "encoder" else {}))
    assert model.config.depths == SIZES["depths"] and model.config.num_heads == SIZES["num_heads"]
    if kind == "classifier":
        assert model.config.id2label == dict(enumerate("abcde"))
        assert stage_file.read(tmp_path / "ours")["classes"] == list("abcde")
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "meta"), "--format=mae"]) == 0
    assert main(["convert", str(tmp_path / "meta" / "checkpoint.pth"), str(tmp_path / "again"), "--verify"]) == 0
    assert convert.read(tmp_path / "meta" / "checkpoint.pth").layout.made_from
    first, second = (flatten(convert.read(path).params) for path in (folder, tmp_path / "meta" / "checkpoint.pth"))
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


@pytest.mark.parametrize(
    ("container", "prefix"), [("model_state", ""), ("model", "module.model."), ("model_state", "_orig_mod.")]
)
def test_files_of_meta_and_mae_lite(theirs, tmp_path, container, prefix, capsys):
    kind, folder = theirs
    state = metas(folder, prefix)
    if kind == "encoder":
        state = {name: array for name, array in state.items() if not name.startswith(f"{prefix}norm.")}
    if prefix == "module.model.":
        state["module.tch_model.pos_embed"] = torch.zeros(1, 4, 8)
        state["module.attn_adapter.adapter1.weight"] = torch.zeros(8, 8, 1, 1)
    torch.save({container: state, "epoch": 3}, tmp_path / "file.pth")
    assert main(["convert", str(tmp_path / "file.pth"), str(tmp_path / "ours"), "--verify", "--num_heads=2",
                 *(["--decoder_heads=3"] if kind == "mae" else [])]) == 0  # fmt: skip
    assert "licence: CC-BY-NC 4.0 if these are the weights of facebookresearch/hiera" in capsys.readouterr().out
    like, own = (
        flatten(convert.read(p, Told(num_heads=2, decoder_heads=3)).params) for p in (folder, tmp_path / "file.pth")
    )
    for name, array in own.items():
        np.testing.assert_array_equal(array, like[name])


def test_what_a_file_does_not_tell_is_said(tmp_path):
    model = HieraForImageClassification(HieraConfig(**{**SIZES, "num_heads": [1, 2, 4, 8]}, num_labels=5))
    model.save_pretrained(tmp_path / "hf")
    torch.save({"model_state": metas(tmp_path / "hf")}, tmp_path / "file.pth")
    found = convert.read(tmp_path / "file.pth").layout
    assert found.model == Hiera(8, (1, 2, 3, 1), 1, image_size=64, num_classes=5)
    assert any("1 heads in the first stage" in note and "--num_heads" in note for note in found.notes)
    assert found.kind == "Hiera, classifier" and found.classes is None
    assert main(["convert", str(tmp_path / "file.pth"), str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), "--format=hf"]) == 0
    assert HieraForImageClassification.from_pretrained(tmp_path / "back").classifier.out_features == 5


def test_timm_s_layout_holds_a_classifier(theirs, tmp_path, capsys):
    kind, folder = theirs
    assert main(["convert", str(folder), str(tmp_path / "ours")]) == 0
    status = main(["export", str(tmp_path / "ours"), str(tmp_path / "timm"), "--format=timm"])
    if kind != "classifier":
        assert status == 2 and "timm's Hiera has a head and its norm" in capsys.readouterr().err
        return
    settings = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert settings["architecture"] == "hiera_base_224" and settings["model_args"]["stages"] == SIZES["depths"]
    names = set(load_file(tmp_path / "timm" / "model.safetensors"))
    assert {"head.norm.weight", "head.fc.bias", "blocks.1.proj.weight", "pos_embed"} <= names
    first, second = (flatten(convert.read(path).params) for path in (folder, tmp_path / "timm"))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": [1, 1, 4, 1]}, "depths is .1, 1, 4, 1., and only .1, 2, 3, 1. can be converted here"),
        ({"masked_unit_attention": [True, False, False, False]}, "masked_unit_attention is"),
        ({"mlp_ratio": 3.0}, "mlp_ratio is 3.0, and only 4.0 can be converted here"),
        ({"embed_dim": 16}, "embed_dim is 16, and only 8 can be converted here"),
    ],
)
def test_a_config_of_another_model_is_refused(change, message, tmp_path):
    HieraForImageClassification(HieraConfig(**SIZES, num_labels=5)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=message):
        convert.read(tmp_path)


def test_a_part_of_a_model_and_several_are_refused(tmp_path):
    HieraForImageClassification(HieraConfig(**SIZES, num_labels=5)).save_pretrained(tmp_path)
    state = metas(tmp_path)
    cases = {
        "or of odd shapes": {name: a for name, a in state.items() if name != "pos_embed"},
        "several models": {f"{one}.{name}": a for one in "ab" for name, a in state.items()},
        "there is no blocks.2.mlp.fc1.bias": {n: a for n, a in state.items() if n != "blocks.2.mlp.fc1.bias"},
        "patch_embed, pos_embed or the blocks are missing": {**state, "pos_embed": torch.zeros(3)},
        "extra has no place in a Hiera, classifier checkpoint": {**state, "extra": torch.zeros(3)},
    }
    for message, arrays in cases.items():
        torch.save({"model_state": arrays}, tmp_path / "file.pth")
        with pytest.raises(InputError, match=message):
            convert.read(tmp_path / "file.pth")
