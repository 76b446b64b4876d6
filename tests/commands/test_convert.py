"""`convert` as a user types it: the report, what it writes, and one line with exit status 2 for each kind of bad input."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from tinymim_jax.experiment import stage_file

pytest.importorskip("torch", reason="the files that are converted are PyTorch's")

import torch
from safetensors.torch import save_file

from tests import torch_files as files
from tinymim_jax.__main__ import main
from tinymim_jax.bridge.torch_reference import vit
from tinymim_jax.experiment import config
from tinymim_jax.weights import handoff

CFG = config.ViT(24, 2, 3, image_size=16, patch_size=8)
HEADS = "--num_heads=3"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error(capsys, *argv):
    """The line that `convert` with `argv` ends with."""
    assert main(["convert", *argv]) == 2
    out = capsys.readouterr()
    assert out.err.startswith("error: ") and out.err.count("\n") == 1 and "wrote" not in out.out
    return out.err


# What it does


def test_convert_and_verify(here, capsys):
    files.mae_full(here / "x.pth", CFG, config.Decoder(16, 1, 2))
    argv = ["convert", "x.pth", "a/dst", "--verify", HEADS, "--decoder_heads=2", "--norm_pix"]
    assert main(argv) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "x.pth: MAE, with decoder"
    assert "note: 3 heads, as you say" in out and "weights: 50 tensors, 26,344 parameters" in out
    assert [line.split()[0] for line in out if " / " in line and "cells" not in line] == [
        "block",
        "block",
        "tokens",
        "reconstruction",
    ]
    assert any(line.startswith("largest relative difference ") for line in out)
    assert out[-1] == "wrote a/dst"
    assert handoff.finished(here / "a" / "dst")
    assert stage_file.read(here / "a" / "dst")["converted"]["norm_pix_loss"] is True
    assert sorted(p.name for p in here.rglob("*") if "partial" in p.name) == []
    assert "a/dst exists; name another folder, or delete it" in error(capsys, *argv[1:])


def test_eps_and_pixels_that_the_user_knows(here, capsys):
    files.deit(here / "x.pth", config.ViT(24, 2, 3, num_classes=5, image_size=16, patch_size=8))
    flags = ["--layer_norm_eps=1e-5", "--mean=0.5,0.25,0.125", "--std=1,0.5,2"]
    assert main(["convert", "x.pth", "dst", HEADS, *flags]) == 0
    assert stage_file.read_model(here / "dst").layer_norm_eps == 1e-5
    facts = stage_file.read(here / "dst")["converted"]
    assert facts["preprocessing"] == {"mean": [0.5, 0.25, 0.125], "std": [1.0, 0.5, 2.0]}
    assert facts["preprocessing_is_stated"] is True
    capsys.readouterr()
    for flag in ("--mean=a,b,c", "--mean=0.5", "--std=1,1,0", "--mean=nan,0,0", "--std=1,1,-1"):
        assert f"{flag}: give three numbers" in error(capsys, "x.pth", "other", HEADS, flag)
    assert not (here / "other").exists()


def test_flags_reach_the_model(here):
    files.deit(here / "x.pth", config.ViT(24, 2, 3, num_classes=5, image_size=16, patch_size=8))
    assert main(["convert", "x.pth", "dst", HEADS, "--last_block_heads=4"]) == 0
    model = stage_file.read_model(here / "dst")
    assert (model.num_heads, model.last_block_heads, model.num_classes) == (3, 4, 5)


def test_a_home_folder(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    files.mae_encoder(here / "x.pth", CFG)
    assert main(["convert", "~/x.pth", "~/dst", HEADS]) == 0
    assert handoff.finished(here / "dst")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_rounded_weights(dtype, suffix, here, capsys):
    path = here / f"x{suffix}"
    state = {k: v.to(dtype) for k, v in files.mae_encoder(path, CFG).state_dict().items()}
    (torch.save if suffix == ".pth" else save_file)(state, path)
    assert "these weights have been rounded" in error(capsys, path.name, "dst", HEADS)
    assert main(["convert", path.name, "dst", HEADS, "--half"]) == 0
    expected = state["cls_token"].float().numpy()
    np.testing.assert_array_equal(handoff.read_variables(here / "dst")["params"]["encoder"]["cls_token"], expected)


@pytest.mark.parametrize("argv", [[], ["--help"], ["x.pth", "-h"]])
def test_help(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["convert", *argv])
    assert stop.value.code == 0 and "python -m tinymim_jax convert SRC DST" in capsys.readouterr().out


# Bad input


class Runs:
    """Unpickled, it makes the file PROOF."""

    def __reduce__(self):
        return os.system, ("touch PROOF",)


def state(**changes):
    """A whole encoder; None takes a tensor away, "__" stands for a dot."""
    model = files.build(lambda: vit.ViT(CFG), seed=0).state_dict()
    model |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in model.items() if value is not None}


def pth(**changes):
    torch.save({"model": state(**changes)}, "x.pth")


def truncated(suffix, share):
    path = Path(f"x{suffix}")
    (files.mae_encoder if suffix == ".pth" else files.timm_safetensors)(path, CFG)
    data = path.read_bytes()
    path.write_bytes(data[: max(1, int(share * len(data)))])


def folder(settings, weights=None):
    """A Hugging Face folder `hf` of a whole encoder."""
    from tinymim_jax.bridge import formats

    arrays = {}
    for name, tensor in state().items():
        parts = formats.hf_names(name, "")
        arrays |= dict(zip(parts, (t.contiguous() for t in tensor.chunk(len(parts))), strict=True))
    Path("hf").mkdir()
    save_file(arrays if weights is None else weights, "hf/model.safetensors")
    if settings is not None:
        Path("hf/config.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))


def write_text(name, text):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)


GOOD = {
    "architectures": ["ViTModel"], "model_type": "vit", "hidden_size": 24, "num_hidden_layers": 2, "image_size": 16,
    "num_attention_heads": 3, "intermediate_size": 96, "patch_size": 8,
}  # fmt: skip
NAN = torch.full((24,), float("nan"))
BAD = {  # what -> what makes it, arguments, message
    "missing": (lambda: None, ["x.pth"], "x.pth does not exist"),
    "missing folder": (lambda: None, ["hf"], "hf does not exist"),
    "empty": (lambda: write_text("x.pth", ""), ["x.pth"], "x.pth is empty"),
    **{
        f"truncated {suffix} {share}": (
            lambda suffix=suffix, share=share: truncated(suffix, share), [f"x{suffix}"], f"x{suffix} is not a whole",
        )
        for suffix in (".pth", ".safetensors") for share in (0.0, 0.01, 0.3, 0.7, 0.99)
    },
    "text": (lambda: write_text("x.pth", "hello\n" * 100), ["x.pth"], "x.pth is not a whole PyTorch checkpoint"),
    "suffix": (lambda: write_text("x.npz", "hello"), ["x.npz"], "the name ends in none of .safetensors, .pth"),
    "code": (lambda: torch.save({"model": state(), "x": Runs()}, "x.pth"), ["x.pth"], "would run code when unpickled"),
    "pickled code": (lambda: Path("x.pth").write_bytes(pickle.dumps(Runs(), protocol=2)), ["x.pth"], "would run code"),
    "not a number": (lambda: pth(norm__weight=NAN), ["x.pth"], "norm.weight has values that are not finite"),
    "float16": (lambda: pth(norm__weight=torch.ones(24).half()), ["x.pth"], "norm.weight is float16"),
    "bfloat16": (lambda: pth(norm__weight=torch.ones(24).bfloat16()), ["x.pth"], "norm.weight is bfloat16"),
    "not a number, half": (
        lambda: pth(norm__weight=NAN.half()), ["x.pth", "--half"], "norm.weight has values that are not finite",
    ),
    "integers": (lambda: pth(norm__weight=torch.ones(24).int()), ["x.pth"], "norm.weight is int32, not a float"),
    "extra key": (lambda: pth(blocks__0__attn__q_norm__bias=torch.ones(8)), ["x.pth"], "q_norm.bias has no place"),
    "key with two lines": (lambda: pth(**{"a\nb": torch.ones(24)}), ["x.pth"], "a?b has no place"),
    "missing key": (lambda: pth(blocks__1__norm2__bias=None), ["x.pth"], "there is no blocks.1.norm2.bias"),
    "missing norm": (lambda: pth(norm__weight=None), ["x.pth"], "exactly one of norm and fc_norm is expected"),
    "positions": (lambda: pth(pos_embed=torch.ones(1, 4, 24)), ["x.pth"], "pos_embed is for 3 patches, which is no square"),
    "patch size": (
        lambda: pth(patch_embed__proj__weight=torch.ones(24, 3, 8, 4)), ["x.pth"], "patches of 8 x 4 and width 24; only 3 channels",
    ),
    "width": (lambda: pth(norm__weight=torch.ones(20)), ["x.pth"], "norm.weight has shape [20], expected [24]"),
    "heads unknown": (lambda: pth(), ["x.pth", "--num_heads="], "--num_heads="),
    "heads untold": (lambda: pth(), ["x.pth", None], "how many heads a model of width 24 has cannot be seen"),
    "heads that do not divide": (lambda: pth(), ["x.pth", "--num_heads=5"], "5 heads do not divide width 24"),
    "heads that are none": (lambda: pth(), ["x.pth", "--num_heads=0"], "--num_heads=0"),
    "heads that are text": (lambda: pth(), ["x.pth", "--num_heads=many"], "--num_heads=many"),
    "unknown flag": (lambda: pth(), ["x.pth", "--heads=3"], "heads"),
    "no config.json": (lambda: folder(None), ["hf"], "hf has no config.json, which tells the heads: download it"),
    "config.json of no JSON": (lambda: folder("{"), ["hf"], "hf/config.json is not a JSON object"),
    "config.json with a list": (lambda: folder([]), ["hf"], "hf/config.json is not a JSON object"),
    "heads of config.json": (
        lambda: folder(GOOD | {"num_attention_heads": "x"}), ["hf", None], "num_attention_heads is 'x'; it must be a whole",
    ),
    "activation": (lambda: folder(GOOD | {"hidden_act": "relu"}), ["hf"], "only hidden_act gelu is a plain ViT"),
    "other weights": (lambda: folder(GOOD, {"bert": torch.ones(3)}), ["hf"], "this is not a vision transformer"),
    "no class to verify": (
        lambda: folder(GOOD | {"architectures": ["pipeline"]}), ["hf", "--verify"], "architectures names no class",
    ),
    "wrong heads": (
        lambda: folder(GOOD), ["hf", "--verify", "--num_heads=4"], "the number of heads may be wrong (--num_heads",
    ),
    "a workdir": (lambda: write_text("work/mae/stage.json", "{}"), ["work"], "work has no config.json"),
    "a stage": (lambda: write_text("mae/stage.json", "{}"), ["mae"], "mae is a stage's folder, or converted already"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_leaves_nothing(case, here, capsys):
    if case in ("no class to verify", "wrong heads"):
        pytest.importorskip("transformers", reason="--verify of a Hugging Face folder runs transformers")
    make, argv, message = BAD[case]
    make()
    before = sorted(here.rglob("*"))
    flags = [] if None in argv or any(a.startswith("--num_heads") for a in argv) else [HEADS]
    assert message in error(capsys, *[a for a in argv if a], "dst", *flags)
    assert sorted(here.rglob("*")) == before  # no dst, no dst.partial, no PROOF
    assert not (here / "PROOF").exists()


def test_the_good_ones_are_good(here):
    """Without what is bad about them, the files above are converted."""
    pth()
    folder(GOOD)
    assert main(["convert", "x.pth", "a", HEADS]) == main(["convert", "hf", "b"]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x.pth"], "expected SRC DST, got x.pth; see --help"),
        (["x.pth", "a", "b"], "expected SRC DST, got x.pth a b"),
        (["x.pth", "there"], "there exists; name another folder, or delete it"),
        (["x.pth", "x.pth"], "x.pth exists; name another folder"),
        (["x.pth", "."], " exists; name another folder"),
        (["x.pth", "x.pth/dst"], "x.pth/dst cannot be made ("),
        (["x.pth", "/proc/dst"], "/proc/dst cannot be made ("),
        (["x.pth", "d" * 300], "cannot be made (File name too long)"),
        (["s" * 300 + ".pth", "dst"], "does not exist"),
    ],
)
def test_bad_destinations(argv, message, here, capsys):
    files.mae_encoder(here / "x.pth", CFG)
    (here / "there").mkdir()
    before = sorted(here.rglob("*"))
    assert message in error(capsys, *argv, HEADS)
    assert sorted(here.rglob("*")) == before


def test_what_was_there_before_is_not_harmed(here, capsys):
    """Nor what a killed run has left, which is nobody's to delete."""
    files.mae_encoder(here / "x.pth", CFG)
    write_text("dst.partial/stage.json", "half")
    assert main(["convert", "x.pth", "dst", HEADS]) == 0
    assert sorted(p.name for p in here.iterdir()) == ["dst", "dst.partial", "x.pth"]
