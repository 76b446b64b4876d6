"""`export` as a user types it; what it writes is tested in tests/bridge/test_export.py."""

import sys

import pytest

pytest.importorskip("torch", reason="the formats are PyTorch's")

from tests import torch_files as files
from tests.bridge.test_export import write
from tinymim_jax.__main__ import main
from tinymim_jax.experiment.config import ViT


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with the stages work/cls and work/distilled."""
    monkeypatch.chdir(tmp_path)
    for name in ("cls", "distilled"):
        write(tmp_path / "work" / name, name)
    return tmp_path


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("timm", ["README.md", "config.json", "model.safetensors"]),
        ("hf", ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]),
        ("mae", ["README.md", "checkpoint.pth"]),
    ],
)
def test_each_format(form, expected, here, capsys):
    assert main(["export", "work/cls", "a/dst", f"--format={form}"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"wrote a/dst/{name}" for name in expected]
    assert sorted(p.name for p in (here / "a" / "dst").iterdir()) == expected
    assert [p.name for p in (here / "a").iterdir()] == ["dst"]


def test_regrouped_heads(here, capsys):
    assert main(["export", "work/distilled", "dst", "--format=timm"]) == 2
    assert "give --regroup_heads to have it read with those of the others" in capsys.readouterr().err
    assert main(["export", "work/distilled", "dst", "--format=timm", "--regroup_heads"]) == 0


def test_a_converted_checkpoint(here):
    files.deit(here / "x.pth", ViT(24, 2, 3, num_classes=5, image_size=16, patch_size=8))
    assert main(["convert", "x.pth", "converted", "--num_heads=3"]) == 0
    assert main(["export", "converted", "dst", "--format=hf"]) == 0
    text = (here / "dst" / "README.md").read_text()
    assert "licence: Apache-2.0 if these are the weights of facebookresearch/deit" in text


BAD = {
    "no format": (["work/cls", "dst"], "--format is needed: timm, hf, mae or onnx"),
    "unknown format": (["work/cls", "dst", "--format=keras"], "--format=keras: unknown; choose one of timm, hf, mae, onnx"),
    "no destination": (["work/cls", "--format=timm"], "expected SRC DST, got work/cls; see --help"),
    "three paths": (["work/cls", "a", "b", "--format=timm"], "expected SRC DST, got work/cls a b"),
    "unknown flag": (["work/cls", "dst", "--format=timm", "--x"], "'x'"),
    "missing": (["gone", "dst", "--format=timm"], "gone does not exist"),
    "a workdir": (["work", "dst", "--format=timm"], "work is not the folder of a stage: name one of the stages in it: cls, distilled"),
    "an unfinished stage": (["unfinished", "dst", "--format=timm"], "unfinished has no finished stage: run that stage first"),
    "a file of others": (["x.pth", "dst", "--format=timm"], "x.pth"),
    "the destination is there": (["work/cls", "work", "--format=timm"], "work exists; name another folder, or delete it"),
    "the destination is the source": (["work/cls", "work/cls", "--format=timm"], "work/cls exists; name another folder"),
    "the destination is in a file": (["work/cls", "x.pth/dst", "--format=timm"], "x.pth/dst cannot be made ("),
    "other heads": (["work/distilled", "dst", "--format=hf"], "block 2 has 4 heads and the others 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_leaves_nothing(case, here, capsys):
    argv, message = BAD[case]
    (here / "x.pth").write_text("x")
    write(here / "unfinished", "cls", done=False)
    before = sorted(here.rglob("*"))
    assert main(["export", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert sorted(here.rglob("*")) == before


def test_a_package_that_is_missing(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["export", "work/cls", "dst", "--format=mae"]) == 2
    assert capsys.readouterr().err == "error: this format needs torch: pip install 'tinymim_jax[torch]'\n"
    assert sorted(p.name for p in here.iterdir()) == ["work"]


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "--format=timm|hf|mae|onnx" in capsys.readouterr().out
