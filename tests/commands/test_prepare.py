import numpy as np
import pytest
from PIL import Image

from tinymim_jax.__main__ import main
from tinymim_jax.commands.prepare import describe
from tinymim_jax.data.decode import decode
from tinymim_jax.data.sources import open_source
from tinymim_jax.experiment.config import Data
from tinymim_jax.runtime.errors import InputError


@pytest.fixture
def tree(tmp_path):
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            folder = tmp_path / "tree" / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return tmp_path / "tree"


def test_prepare_verify_and_read(tree, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [str(tree), str(out), "--short_side=20", "--workers=1"]
    assert main(["prepare", *arguments]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0].startswith("train: 6 images in 1 shards") and f"array_record:{out}" in said.out
    assert "train: img 6/6" in said.err and "img/s" in said.err
    assert main(["prepare", "--verify", str(out)]) == 0
    assert capsys.readouterr().out.count("as written") == 2
    source = open_source(Data("array_record", path=str(out), split="val"))
    assert sorted(source.labels()) == [0, 0, 0, 1, 1, 1]
    assert decode(source[0]["image"], "").size == (27, 20)

    assert main(["prepare", str(out), str(tmp_path / "again"), "--workers=1"]) == 0  # shards of shards
    again = open_source(Data("array_record", path=str(tmp_path / "again"), split="val"))
    assert {again[i]["image"] for i in range(6)} == {source[i]["image"] for i in range(6)}

    file = next(out.glob("val-*"))
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["prepare", "--verify", str(out)]) == 2
    assert f"error: {file}: is not as it was written; delete it" in capsys.readouterr().err


def test_digits(tmp_path):
    assert main(["prepare", "digits", str(tmp_path / "out"), "--workers=1", "--splits=test"]) == 0
    data = Data("digits", split="test")
    source, packed = open_source(data), open_source(Data("array_record", path=str(tmp_path / "out"), split="test"))
    assert len(packed) == 500
    index = int(np.random.default_rng(0).permutation(500)[7])
    np.testing.assert_array_equal(decode(packed[7]["image"], ""), source[index]["image"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["only"], "expected SRC DST, got only"),
        (
            ["none", "out"],
            "none: no such folder; name an ImageFolder tree, pairs:TREE, a folder of shards, or tfds:NAME",
        ),
        (["{tree}", "out", "--splits=train,extra"], "tree/extra: no such folder"),
        (["{tree}", "out", "--splits=train,tra"], "splits 'train' and 'tra' would be read together"),
        (["{tree}", "out", "--short_side=0"], "--short_side=0: 0 is not a positive integer"),
        (["{tree}", "out", "--quality=101"], "--quality=101"),
        (["{tree}", "out", "--workers=0"], "--workers=0"),
        (["{tree}", "out", "--on_bad_image=ignore"], "--on_bad_image"),
        (["tfds:none_of_it", "out", "--data_dir={tree}"], "tfds 'none_of_it', split 'train': cannot be opened"),
        (["--verify", "{tree}"], "holds no prepared shards"),
        (["--verify", "a", "b"], "expected DST, got a b"),
    ],
)
def test_bad_input(tree, tmp_path, monkeypatch, argv, message, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["prepare", *(arg.format(tree=tree) for arg in argv)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_source_is(tree, tmp_path, monkeypatch):
    assert describe(str(tree), "") == {"source": "folder", "path": str(tree)}
    assert describe("tfds:imagenet2012", "/data") == {"source": "tfds", "name": "imagenet2012", "path": "/data"}
    assert describe("digits", "") == {"source": "digits"}
    assert describe(f"pairs:{tree}", "") == {"source": "pairs", "path": str(tree)}
    monkeypatch.chdir(tmp_path)
    assert describe("tree", "") == {"source": "folder", "path": str(tree)}  # the same, from wherever it is called
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "train-0.array_record").write_bytes(b"")
    assert describe("digits", "") == {"source": "array_record", "path": str(tmp_path / "digits")}
    with pytest.raises(InputError, match="no such folder"):
        describe("elsewhere", "")
