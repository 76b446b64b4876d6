"""What is read from a file, what is refused, and that nothing in it is run."""

import argparse
import collections
import json
import os
import pickle
import sys

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("torch", reason="checkpoints in PyTorch's format are written with torch")

import torch
from safetensors.numpy import save_file

from tinymim_jax.bridge import files
from tinymim_jax.runtime.errors import InputError

WEIGHTS = {"cls_token": torch.arange(6.0).reshape(1, 1, 6), "norm.weight": torch.ones(6)}


def save(path, content=WEIGHTS, **options):
    torch.save(content, path, **options)
    return path


def refused(path, message):
    with pytest.raises(InputError, match=message) as error:
        files.check_values(files.read(path), half=False)
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value) and str(path) in str(error.value)


def is_same(source):
    assert set(source.arrays) == set(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        np.testing.assert_array_equal(source.arrays[name], tensor.numpy())
    return True


# PyTorch's files


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".tar", ".pth.tar"])
def test_a_state_dict_under_each_suffix(tmp_path, suffix):
    source = files.read(save(tmp_path / f"x{suffix}"))
    assert is_same(source) and (source.format, source.settings, source.beside) == ("pth", {}, {})


@pytest.mark.parametrize("content", [WEIGHTS, {k: torch.nn.Parameter(v) for k, v in WEIGHTS.items()}])
def test_a_file_of_torch_before_1_6(tmp_path, content):
    assert is_same(files.read(save(tmp_path / "x.pth", content, _use_new_zipfile_serialization=False)))


@pytest.mark.parametrize("entry", files.CONTAINERS)
def test_weights_in_an_entry(tmp_path, entry):
    beside = {
        "optimizer": ({"state": {}}, "state of the optimiser"),
        "scaler": ({}, "state of the training loop"),
        "lr_scheduler": ({}, "state of the training loop"),
        "epoch": (3, "progress of the training"),
        "best_acc": (0.5, "progress of the training"),
        "args": (argparse.Namespace(model="m", lr=1.0), "settings of the training"),
        "model_ema": (dict(WEIGHTS), "averaged weights; the plain ones are taken (--ema)"),
        "amp": ({}, "beside the weights"),
    }
    content = {entry: collections.OrderedDict(WEIGHTS), **{name: value for name, (value, _) in beside.items()}}
    source = files.read(save(tmp_path / "x.pth", content))
    assert is_same(source)
    assert source.beside == {name: why for name, (_, why) in beside.items()}
    assert source.settings == {"model": "m", "lr": 1.0}


@pytest.mark.parametrize(
    ("args", "settings"),
    [(argparse.Namespace(a=1), {"a": 1}), ({"a": 1}, {"a": 1}), (None, {}), ([1], {}), ("a", {}), (torch.ones(1), {})],
)
def test_settings_of_any_kind(tmp_path, args, settings):
    source = files.read(save(tmp_path / "x.pth", {"model": WEIGHTS, "args": args}))
    assert is_same(source) and source.settings == settings


def test_our_own_settings_come_before_args(tmp_path):
    content = {"model": WEIGHTS, "args": {"a": 1}, "tinymim_jax": {"made_by": "tinymim_jax"}}
    source = files.read(save(tmp_path / "x.pth", content))
    assert source.settings == {"made_by": "tinymim_jax"}
    assert source.beside["tinymim_jax"] == "settings of the training"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: [WEIGHTS], r"holds a list, not a dict of weights; save model.state_dict\(\)"),
        (lambda: torch.ones(3), "holds a Tensor, not a dict"),
        (lambda: {**WEIGHTS, "step": [3]}, "step is a list, not a tensor"),
        (lambda: {**WEIGHTS, "step": torch.tensor([3])}, "step is int64, not a float"),
        (lambda: {"weighs": {"more": WEIGHTS}}, "weighs is a dict, not a tensor"),
        (lambda: {"state_dict_ema": WEIGHTS, "epoch": 3}, "state_dict_ema is a dict, not a tensor; .* try --ema"),
        (lambda: {"model": WEIGHTS, "net": WEIGHTS}, "the entry 'net' holds tensors and is of no known kind"),
        (lambda: {**WEIGHTS, "x": torch.eye(4).to_sparse()}, "x is sparse, nested, quantised or complex"),
        (lambda: {**WEIGHTS, "x": torch.eye(4).to_sparse_csr()}, "x is sparse, nested, quantised or complex"),
        (lambda: {**WEIGHTS, "x": torch.ones(3) * 1j}, "x is sparse, nested, quantised or complex"),
        (
            lambda: {**WEIGHTS, "x": torch.ones(3).to(torch.float8_e4m3fn)},
            r"x is torch.float8_e4m3fn on cpu; save it as plain",
        ),
        (
            lambda: {**WEIGHTS, "x": torch.ones(3, device="meta")},
            "x is torch.float32 on meta; save it as plain float32",
        ),
        (
            lambda: {**WEIGHTS, "x": torch.ones(1).expand(10**6, 10**6)},
            r"x has shape \[1000000, 1000000\], more than the file",
        ),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore")  # torch's, on sparse tensors
def test_contents_that_are_no_weights(tmp_path, content, message):
    refused(save(tmp_path / "x.pth", content()), message)


class Runs:
    """Unpickled, it runs a command."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


def malicious(path, kind, proof):
    content = {"args": Runs(proof), "model": dict(WEIGHTS)}
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=int(kind[-1])))
    else:
        save(path, content, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.mark.parametrize("kind", ["pickle2", "pickle4", "zip", "legacy"])
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".tar"])
def test_code_is_not_run(tmp_path, kind, suffix):
    proof = tmp_path / "PROOF"
    path = malicious(tmp_path / f"x{suffix}", kind, proof)
    unknown = "is not a whole PyTorch checkpoint"  # torch's reader knows protocol 2 only
    refused(path, unknown if kind == "pickle4" else r"would run code when unpickled, .*\(posix\.system\), and is not")
    assert not proof.exists()
    with path.open("rb") as file:  # the trap works: without the restriction it does run
        if kind.startswith("pickle"):
            pickle.load(file)
        else:
            torch.load(file, weights_only=False)
    assert proof.exists()


def test_a_pickled_module_is_not_opened(tmp_path):
    refused(save(tmp_path / "x.pth", torch.nn.Linear(2, 2)), r"holds more than .*\(torch.nn.modules.linear.Linear\)")


def test_torchscript_is_not_opened(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "would run code when unpickled")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_pth(tmp_path, legacy, share):
    path = save(tmp_path / "x.pth", {"model": WEIGHTS}, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    path.write_bytes(data[: max(1, int(share * len(data)))])
    refused(path, r"x.pth is not a whole PyTorch checkpoint \(\w+.*\); download it again")


# safetensors


def safetensors(path, arrays):
    save_file(arrays, path)
    return path


def numpy_weights(dtype=np.float32):
    return {name: tensor.numpy().astype(dtype) for name, tensor in WEIGHTS.items()}


def test_safetensors(tmp_path):
    source = files.read(safetensors(tmp_path / "x.safetensors", numpy_weights()))
    assert is_same(source) and (source.format, source.settings, source.beside) == ("safetensors", {}, {})


@pytest.mark.parametrize("length", [1, 7, 8, 30, -30, -1])
def test_truncated_safetensors(tmp_path, length):
    path = safetensors(tmp_path / "x.safetensors", numpy_weights())
    path.write_bytes(path.read_bytes()[:length])
    refused(path, r"x.safetensors is not a whole safetensors file \(SafetensorError.*\); download it again")


def test_safetensors_with_something_behind(tmp_path):
    path = safetensors(tmp_path / "x.safetensors", numpy_weights())
    path.write_bytes(path.read_bytes() + b"x")
    refused(path, "is not a whole safetensors file")


def test_a_pth_called_safetensors(tmp_path):
    refused(save(tmp_path / "x.safetensors"), "is not a whole safetensors file")
    refused(safetensors(tmp_path / "x.pth", numpy_weights()), "is not a whole PyTorch checkpoint")


# Folders


def folder(path, config, preprocessor=None):
    path.mkdir()
    safetensors(path / "model.safetensors", numpy_weights())
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if preprocessor is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return path


def test_folders(tmp_path):
    source = files.read(folder(tmp_path / "hf", {"model_type": "vit"}, {"image_mean": [0.5, 0.5, 0.5]}))
    assert is_same(source) and source.format == "huggingface"
    assert source.path == tmp_path / "hf" / "model.safetensors"
    assert source.settings == {"model_type": "vit", "preprocessor": {"image_mean": [0.5, 0.5, 0.5]}}
    assert files.read(folder(tmp_path / "timm", {"architecture": "vit"})).format == "timm"


@pytest.mark.parametrize("text", ["", "[]", "3", "null", '"x"', "{", "{'a': 1}", "[" * 100_000, "\xff\xfe"])
def test_a_config_that_is_no_json_object(tmp_path, text):
    path = folder(tmp_path / "x", {})
    (path / "config.json").write_bytes(text.encode("latin1"))
    refused(path, r"config.json is not a JSON object; save the model again")


def test_a_damaged_preprocessor(tmp_path):
    refused(folder(tmp_path / "x", {}, []), r"preprocessor_config.json is not a JSON object")


def test_folders_that_lack_a_file(tmp_path):
    refused(tmp_path, r"has no config.json, which tells the heads: download it, or name a file in the folder")
    path = folder(tmp_path / "x", {})
    (path / "model.safetensors").unlink()
    refused(path, r"has none of model.safetensors, .*pytorch_model.bin.index.json; save it again with save_pretrained")


def test_pytorch_model_bin(tmp_path):
    path = folder(tmp_path / "x", {"model_type": "vit"})
    (path / "model.safetensors").rename(tmp_path / "aside")
    save(path / "pytorch_model.bin")
    source = files.read(path)
    assert is_same(source) and (source.format, source.path) == ("huggingface", path / "pytorch_model.bin")
    (tmp_path / "aside").rename(path / "model.safetensors")
    assert files.read(path).path == path / "model.safetensors"  # as transformers chooses


def sharded(path, form, config=True):
    """A folder of two shards, and their index, which is returned."""
    path.mkdir()
    names = [f"model-{i}.{form}" for i in (1, 2)]
    for name, (key, tensor) in zip(names, WEIGHTS.items(), strict=True):
        save(path / name, {key: tensor}) if form == "bin" else safetensors(path / name, {key: tensor.numpy()})
    index = path / ("pytorch_model.bin.index.json" if form == "bin" else "model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict(zip(WEIGHTS, names, strict=True))}))
    if config:
        (path / "config.json").write_text(json.dumps({"architecture": "vit"}))
    return index


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_shards(tmp_path, form):
    index = sharded(tmp_path / "x", form)
    source = files.read(tmp_path / "x")
    assert is_same(source) and (source.format, source.path) == ("timm", index)
    assert [f.name for f in files.locate(tmp_path / "x")[1]] == [f"model-1.{form}", f"model-2.{form}"]
    assert is_same(files.read(sharded(tmp_path / "y", form, config=False)))  # the index itself
    (tmp_path / "x" / f"model-2.{form}").unlink()
    refused(tmp_path / "x", rf"x/model-2.{form}, which holds a part of the weights, is missing; download it")


@pytest.mark.parametrize(
    "shards",
    [None, {}, [], {"a": 3}, {"a": ["x.bin"]}, {"a": ""}, {"a": "../x.bin"}, {"a": "/x.bin"}, {"a": "b/x.bin"}],
)
def test_an_index_that_names_no_files_beside_it(tmp_path, shards):
    (tmp_path / "x.index.json").write_text(json.dumps({"weight_map": shards}))
    refused(tmp_path / "x.index.json", "x.index.json: weight_map does not name files beside it; save the model again")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 345\n"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "config.json"])
def test_a_pointer_of_git_lfs(tmp_path, name):
    path = folder(tmp_path / "x", {})
    (path / "model.safetensors").unlink()
    (path / name).write_bytes(POINTER)
    if name == "config.json":
        save(path / "pytorch_model.bin")
    refused(path, f"x/{name} is a git-lfs pointer: git lfs pull, or download")
    if name != "config.json":
        refused(path / name, f"x/{name} is a git-lfs pointer: git lfs pull, or download")


# What stands in and beside the entry with the weights


@pytest.mark.parametrize("entry", ["model_ema", "state_dict_ema", "ema", "ema_state_dict", "averaged_model"])
@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"module": w, "decay": 0.9}], ids=["plain", "wrapped"])
def test_averaged_weights(tmp_path, entry, wrap):
    averaged = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    path = save(tmp_path / "x.pth", {"state_dict": WEIGHTS, entry: wrap(averaged), "epoch": 3})
    plain, ema = files.read(path), files.read(path, ema=True)
    assert is_same(plain) and plain.beside[entry] == "averaged weights; the plain ones are taken (--ema)"
    assert ema.beside["state_dict"] == "plain weights; the averaged ones are taken"
    for name, tensor in averaged.items():
        np.testing.assert_array_equal(ema.arrays[name], tensor)


def test_no_averaged_weights(tmp_path):
    for path in (
        save(tmp_path / "x.pth", {"model": WEIGHTS, "ema_decay": 0.9}),
        safetensors(tmp_path / "x.safetensors", numpy_weights()),
    ):
        with pytest.raises(InputError, match="has no averaged weights .*; leave out --ema"):
            files.read(path, ema=True)
    both = {"model": WEIGHTS, "ema": WEIGHTS, "ema_best": WEIGHTS}  # which one?
    with pytest.raises(InputError, match="the entry 'ema_best' holds tensors and is of no known kind"):
        files.read(save(tmp_path / "y.pth", both), ema=True)


def test_entries_in_entries(tmp_path):
    content = {"model": {"module": {"state_dict": WEIGHTS, "step": 1}, "config": {}}, "args": {"a": 1}}
    source = files.read(save(tmp_path / "x.pth", content))
    assert is_same(source) and source.settings == {"a": 1} and set(source.beside) == {"step", "config", "args"}
    content["model"] = content  # without end
    refused(save(tmp_path / "y.pth", content), "is a dict, not a tensor")


@pytest.mark.parametrize(
    "number",
    [3, 0.5, "vit", None, True, np.float64(0.5), np.int64(3), np.bool_(True), torch.tensor(3), torch.tensor(True)],
    ids=repr,
)
def test_numbers_beside_the_weights(tmp_path, number):
    source = files.read(save(tmp_path / "x.pth", {**WEIGHTS, "n": number}))
    assert is_same(source) and source.beside == {"n": "a number beside the weights"}
    assert is_same(files.read(save(tmp_path / "y.pth", {"model": WEIGHTS, "n": number})))


def test_a_counter_in_safetensors(tmp_path):
    source = files.read(safetensors(tmp_path / "x.safetensors", {**numpy_weights(), "n": np.array(3)}))
    assert is_same(source) and source.beside == {"n": "a number beside the weights"}


def test_a_float_of_no_dimension_is_a_weight(tmp_path):
    assert "scale" in files.read(save(tmp_path / "x.pth", {**WEIGHTS, "scale": torch.tensor(2.0)})).arrays


# Names, and values


def test_names(tmp_path):
    refused(tmp_path / "gone.pth", "gone.pth does not exist; give a .pth or .safetensors file")
    refused(tmp_path / f"{'x' * 300}.pth", "does not exist")
    (tmp_path / "empty.pth").write_bytes(b"")
    refused(tmp_path / "empty.pth", "empty.pth is empty; download it again")
    refused(save(tmp_path / "x.zip"), r"ends in none of .safetensors, .pth, .pt, .tar, .bin, .ckpt; rename it")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_weights_must_be_asked_for(tmp_path, dtype):
    rounded = {name: torch.nn.Parameter(tensor.to(dtype)) for name, tensor in WEIGHTS.items()}
    source = files.read(save(tmp_path / "x.pth", rounded))
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(InputError, match=f"cls_token is {name}: these weights have been rounded; .* --half"):
        files.check_values(source, half=False)
    for key, array in files.check_values(source, half=True).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, rounded[key].detach().float().numpy())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_rounded_safetensors(tmp_path, dtype):
    source = files.read(safetensors(tmp_path / "x.safetensors", numpy_weights(dtype)))
    with pytest.raises(InputError, match="have been rounded"):
        files.check_values(source, half=False)
    for key, array in files.check_values(source, half=True).items():
        np.testing.assert_array_equal(array, WEIGHTS[key].numpy())  # small whole numbers, exact in 16 bits


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((3,), float("nan")), "x has values that are not finite"),
        (torch.full((3,), float("inf")), "x has values that are not finite"),
        (torch.tensor([float("inf"), float("-inf")]), "x has values that are not finite"),
        (torch.full((3,), 1e300, dtype=torch.float64), "x has values that are not finite"),
        (torch.ones(3, dtype=torch.int64), "x is int64, not a float"),
        (torch.ones(3, dtype=torch.bool), "x is bool, not a float"),
        (torch.ones(3, dtype=torch.uint8), "x is uint8, not a float"),
    ],
)
@pytest.mark.filterwarnings("error")  # one line is what the user gets
def test_values_that_are_no_weights(tmp_path, value, message):
    refused(save(tmp_path / "x.pth", {**WEIGHTS, "x": value}), message)


def test_large_values_are_finite(tmp_path):
    source = files.read(save(tmp_path / "x.pth", {"x": torch.full((100,), 3e38)}))
    assert files.check_values(source, half=False)["x"][0] == np.float32(3e38)


def test_float64_becomes_float32(tmp_path):
    source = files.read(save(tmp_path / "x.pth", {k: v.double() for k, v in WEIGHTS.items()}))
    assert {a.dtype for a in files.check_values(source, half=False).values()} == {np.dtype("float32")}


def test_a_missing_package(monkeypatch, tmp_path):
    assert files.need("json", "x", "y") is json
    path = save(tmp_path / "x.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(
        path, r"a PyTorch checkpoint \(unlike a .safetensors file\) needs torch: pip install 'tinymim_jax\[torch\]'"
    )


def test_printable():
    assert files.printable("a\nb\x1b[2J\udcff é") == "a?b?[2J? é"
