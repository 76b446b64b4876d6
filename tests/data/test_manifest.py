import json

import pytest
from etils.epath import Path

from tests.data.conftest import write_shard
from tinymim_jax.data import manifest
from tinymim_jax.data.manifest import Settings
from tinymim_jax.data.sources import open_source
from tinymim_jax.experiment.config import Data
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError

DIGITS = Data("digits", split="test")


def new(split="test", **settings):
    data = Data("digits", split=split)
    return manifest.new(data, open_source(data), Settings(**{"images_per_shard": 200, **settings}))


def with_shards(folder):
    """A manifest of three shards, and the files."""
    made = new()
    for shard in made.missing():
        file = folder / made.name(shard)
        write_shard(file, [(b"image", shard)] * 4)
        size = file.stat().st_size
        made.shards[file.name] = {"records": 4, "bytes": size, "sha256": storage.sha256(file)}
    made.save(Path(folder))
    return made


def test_what_it_says(tmp_path):
    made = with_shards(tmp_path)
    assert (made.num_shards, made.images, made.classes) == (3, 500, list("0123456789"))
    assert made.source == {"source": "digits", "split": "test"} and made.settings["images_per_shard"] == 200
    assert made.name(1) == "test-00001-of-00003.array_record"
    assert manifest.read(Path(tmp_path / "test.json")) == made
    assert not list(tmp_path.glob(".*"))
    made.shards[made.name(0)]["skipped"] = ["a: is bad", "b: is bad"]
    assert made.images_done() == 14
    assert made.summary().startswith("test: 12 images in 3 shards, 0.00")
    assert made.summary().endswith("2 that cannot be read left out, listed in test.json")


def test_the_file_does_not_depend_on_the_order_of_completion(tmp_path):
    made = with_shards(tmp_path)
    content = (tmp_path / "test.json").read_bytes()
    made.shards = dict(reversed(made.shards.items()))
    made.save(Path(tmp_path))
    assert (tmp_path / "test.json").read_bytes() == content


def test_whole_shards_are_taken_over(tmp_path):
    made = with_shards(tmp_path)
    (tmp_path / made.name(0)).unlink()
    (tmp_path / made.name(2)).write_bytes(b"cut short")
    found = new()
    manifest.take_over(Path(tmp_path), found)
    assert found.missing() == [0, 2] and found.shards[made.name(1)] == made.shards[made.name(1)]
    empty = new()
    manifest.take_over(Path(tmp_path / "elsewhere"), empty)
    assert empty.missing() == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"short_side": 8}, r"settings\.short_side: null -> 8"),
        ({"quality": 90}, r"settings\.quality: 95 -> 90"),
        ({"images_per_shard": 100}, r"settings\.images_per_shard: 200 -> 100; num_shards: 3 -> 5"),
        ({"seed": 1}, r"settings\.seed: 0 -> 1"),
    ],
)
def test_other_settings_are_refused(tmp_path, settings, message):
    with_shards(tmp_path)
    with pytest.raises(InputError, match=rf"test\.json: its shards were made otherwise \({message}.*\); repeat"):
        manifest.take_over(Path(tmp_path), new(**settings))


def test_other_images_are_refused(tmp_path):
    with_shards(tmp_path)
    made = new()
    made.images, made.source = 499, {**made.source, "path": "elsewhere"}
    with pytest.raises(InputError, match=r'\(source\.path: null -> "elsewhere"; images: 500 -> 499\)'):
        manifest.take_over(Path(tmp_path), made)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2, "shards": {}}', '{"format": 1, "shards": {}}', "3"])
def test_another_file_is_no_manifest(tmp_path, content):
    (tmp_path / "test.json").write_text(content)
    for function in (lambda: manifest.take_over(Path(tmp_path), new()), lambda: manifest.verify(Path(tmp_path))):
        with pytest.raises(InputError, match=r"test\.json: no manifest of shards"):
            function()
    assert (tmp_path / "test.json").read_text() == content


@pytest.mark.parametrize(
    "other",
    ["test-00000-of-00002.array_record", "testing-00000-of-00003.array_record", "test.array_record", "te.array_record"],
)
def test_shards_in_the_way(tmp_path, other):
    (tmp_path / other).write_bytes(b"")
    (tmp_path / "train-00000-of-00002.array_record").write_bytes(b"")  # is not
    if other == "te.array_record":
        (tmp_path / other).rename(tmp_path / "te-00000-of-00003.array_record")
    with pytest.raises(InputError, match=r"te.*array_record: would be read along with split 'test'"):
        manifest.take_over(Path(tmp_path), new())


def test_a_split_that_cannot_name_files():
    source = open_source(DIGITS)
    for split in ("train[:10%]", "a/b", "", "../x", "a*"):
        with pytest.raises(InputError, match="cannot name files"):
            manifest.new(Data("digits", split=split), source, Settings())
    assert manifest.new(Data("digits", split="train+validation"), source, Settings()).num_shards == 1


def test_verify(tmp_path):
    made = with_shards(tmp_path)
    assert manifest.verify(Path(tmp_path)) == ["test: 12 images in 3 shards, 0.000 GB: as written"]
    file = tmp_path / made.name(1)
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"test-00001-of-00003\.array_record: is not as it was written; delete it and"):
        manifest.verify(Path(tmp_path))
    file.unlink()
    with pytest.raises(InputError, match=r"test-00001-of-00003\.array_record: is missing; "):
        manifest.verify(Path(tmp_path))
    saved = json.loads((tmp_path / "test.json").read_text())
    del saved["shards"][made.name(1)]
    (tmp_path / "test.json").write_text(json.dumps(saved))
    with pytest.raises(InputError, match="1 of the 3 shards of split 'test' have not been made; run prepare again"):
        manifest.verify(Path(tmp_path))
    with pytest.raises(InputError, match="holds no prepared shards"):
        manifest.verify(Path(tmp_path / "none"))
