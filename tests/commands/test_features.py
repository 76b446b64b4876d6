"""`features` and `predict` as a user types them; their numbers are tested in tests/evals/test_inference.py."""

import csv
import sys

import numpy as np
import pytest
from PIL import Image

import tinymim_jax
from tinymim_jax.__main__ import main


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Four images in a folder, one of them no image."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "x").mkdir(parents=True)
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 30 + i, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / "x" / f"é, {i}.png")
    (tmp_path / "photos" / "x" / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    return tmp_path


def test_features_of_a_folder(finished, here, capsys):
    call = ["features", str(finished / "distill"), "photos", "--on_bad_image=skip"]
    assert main([*call, "--out=a/f.npz"]) == 0
    assert capsys.readouterr().out == "wrote a/f.npz: 3 images, 12 features each\n"
    names, features = tinymim_jax.load(finished / "distill").features("photos", on_bad_image="skip")
    with np.load("a/f.npz") as found:
        assert found["names"].tolist() == names == [f"x/é, {i}.png" for i in range(3)]
        np.testing.assert_array_equal(found["features"], features)
    assert main([*call, "--out=f.npz", "--block=2", "--pool=cls"]) == 0
    with np.load("f.npz") as found:
        assert found["features"].shape == (3, 12) and np.abs(found["features"] - features).max() > 1e-3
    assert sorted(p.name for p in here.iterdir()) == ["a", "f.npz", "photos"]


def test_features_as_parquet(finished, here, capsys, monkeypatch):
    call = ["features", str(finished / "mae"), "photos", "--on_bad_image=skip", "--out=f.parquet"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        assert main(call) == 2
    assert capsys.readouterr().err == "error: --out=FILE.parquet needs pyarrow: pip install 'tinymim_jax[parquet]'\n"
    assert not (here / "f.parquet").exists()
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install pyarrow")
    assert main(call) == 0
    found, (names, features) = parquet.read_table("f.parquet"), tinymim_jax.load(finished / "mae").features(
        "photos", on_bad_image="skip"
    )  # fmt: skip
    assert found["names"].to_pylist() == names
    np.testing.assert_array_equal(np.array(found["features"].to_pylist(), np.float32), features)


def test_predictions_of_a_folder(finished, here, capsys):
    call = ["predict", str(finished / "finetune"), "photos", "--on_bad_image=skip", "--out=p.csv"]
    assert main([*call, "--top=3"]) == 0
    assert capsys.readouterr().out == "wrote p.csv: 3 images\n"
    model = tinymim_jax.load(finished / "finetune")
    names, (probabilities, classes) = model.predictions("photos", k=3, on_bad_image="skip")
    assert model.classes == list("0123456789")
    with open("p.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["name", *(f"{what}_{i}" for what in ("class", "probability") for i in (1, 2, 3))]
    assert [row[0] for row in rows] == names
    assert [row[1:4] for row in rows] == [[model.classes[i] for i in best] for best in classes]
    np.testing.assert_allclose([[float(cell) for cell in row[4:]] for row in rows], probabilities, atol=1e-6)


BAD = {
    "no file": (["features", "CKPT", "photos"], "--out=: name a file that ends in .npz or .parquet"),
    "another kind of file": (["features", "CKPT", "photos", "--out=f.csv"], "--out=f.csv: name a file that ends in .npz or .parquet"),
    "a folder": (["predict", "CKPT", "photos", "--out=d.csv"], "--out=d.csv is a folder; name a file"),
    "no head": (["predict", "CKPT", "photos", "--out=f.csv"], "the model has no head"),
    "no such block": (["features", "CKPT", "photos", "--out=f.npz", "--block=9", "--on_bad_image=skip"], "block 9 is beyond the model's 2 blocks"),
    "a bad image": (["features", "CKPT", "photos", "--out=f.npz"], "x/bad.jpg: cannot be decoded"),
    "no such images": (["features", "CKPT", "gone", "--out=f.npz"], "gone"),
    "no such checkpoint": (["features", "gone", "photos", "--out=f.npz"], "gone does not exist"),
    "no images at all": (["features", "CKPT", "d.csv", "--out=f.npz"], "d.csv"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_leaves_nothing(case, finished, here, capsys):
    argv, message = BAD[case]
    (here / "d.csv").mkdir()
    before = sorted(here.rglob("*"))
    assert main([str(finished / "distill") if word == "CKPT" else word for word in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert sorted(here.rglob("*")) == before
