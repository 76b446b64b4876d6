"""`inspect` of our own checkpoints and of others' files."""

import pytest

pytest.importorskip("torch", reason="the files that are inspected are PyTorch's")

from tests import torch_files as files
from tests.bridge.test_export import random_params, stage
from tests.weights.test_handoff import write_stage
from tinymim_jax.__main__ import main
from tinymim_jax.experiment import config

TINYMIM = config.ViT(48, 2, 12, last_block_heads=16, image_size=16, patch_size=8)


def inspected(path, capsys):
    assert main(["inspect", str(path)]) == 0
    return capsys.readouterr().out.splitlines()


def error(path, capsys):
    assert main(["inspect", str(path)]) == 2
    out = capsys.readouterr()
    assert out.err.startswith("error: ") and out.err.count("\n") == 1 and out.out == ""
    return out.err


def test_a_file_of_others(tmp_path, capsys):
    files.tinymim_pretrained(tmp_path / "x.pth", TINYMIM)
    out = inspected(tmp_path / "x.pth", capsys)
    assert out[0] == f"{tmp_path}/x.pth: TinyMIM, pre-trained"
    assert "note: 12 heads, as its arguments name tinymim_vit_base_patch16; 16 in the last block" in out
    assert out[-1].startswith("block 2: only its norm1 and q, k, v were trained; ")
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


def test_a_converted_checkpoint(tmp_path, capsys):
    files.tinymim_pretrained(tmp_path / "x.pth", TINYMIM)
    assert main(["convert", str(tmp_path / "x.pth"), str(tmp_path / "dst")]) == 0
    capsys.readouterr()
    out = inspected(tmp_path / "dst", capsys)
    assert out[0] == f"{tmp_path}/dst: converted checkpoint, TinyMIM, pre-trained, finished"
    assert "12 heads (16 in the last block)" in out[1]
    assert any(line.startswith("not trained: encoder/") for line in out)
    assert out[-1].startswith("  - dst: converted from x.pth (TinyMIM, pre-trained), sha256 ")


def test_a_stage(tmp_path, capsys):
    made = stage(config.Classify(), num_classes=5)
    write_stage(tmp_path / "ours", made, random_params(made.model))
    out = inspected(tmp_path / "ours", capsys)
    assert out[0] == f"{tmp_path}/ours: supervised training, 1 steps of digits, batch 4, finished"
    assert out[1].endswith("5 classes on the CLS token")
    (tmp_path / "ours" / "DONE").unlink()
    assert inspected(tmp_path / "ours", capsys)[0].endswith("not finished")


def truncated(path):
    files.tinymim_pretrained(path, TINYMIM)
    path.write_bytes(path.read_bytes()[:1000])


def workdir(path):
    (path / "mae").mkdir(parents=True)
    (path / "mae" / "stage.json").write_text("{}")


def damaged(path):
    path.mkdir()
    (path / "stage.json").write_text("{")


def hollow(path):
    """A finished stage whose checkpoints were deleted."""
    path.mkdir()
    made = stage(config.Classify(), num_classes=5)
    write_stage(path, made, random_params(made.model))
    import shutil

    shutil.rmtree(path / "checkpoints")


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("gone", lambda path: None, "gone does not exist"),
        ("x" * 300, lambda path: None, "does not exist"),
        ("x.pth", lambda path: path.write_text(""), "x.pth is empty"),
        ("x.pth", truncated, "x.pth is not a whole PyTorch checkpoint"),
        ("x.txt", lambda path: path.write_text("x"), "the name ends in none of .safetensors, .pth"),
        ("x.pth", lambda path: files.mae_encoder(path, config.ViT(24, 1, 3, image_size=16)), "how many heads"),
        ("folder", lambda path: path.mkdir(), "folder is not the folder of a stage: it has no stage.json"),
        ("work", workdir, "work is not the folder of a stage: name one of the stages in it: mae"),
        ("damaged", damaged, "stage.json is damaged; bring back a copy of it: "),
        ("hollow", hollow, "hollow has no checkpoint"),
    ],
)
def test_bad_input_gets_one_line(name, make, message, tmp_path, capsys):
    make(tmp_path / name)
    assert message in error(tmp_path / name, capsys)


def test_one_path_is_taken(capsys):
    assert main(["inspect", "a", "b"]) == 2
    assert "expected PATH, got a b; see --help" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    assert "python -m tinymim_jax inspect PATH" in capsys.readouterr().out
