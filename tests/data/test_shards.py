import json

import pytest

from tests.data.conftest import write_shard
from tinymim_jax.data import sources
from tinymim_jax.data.shards import decode_record, encode_record
from tinymim_jax.data.sources import open_source
from tinymim_jax.experiment.config import Data
from tinymim_jax.runtime.errors import InputError


def test_array_record(shards):
    source = open_source(Data("array_record", path=str(shards)))
    assert [source[i] for i in range(len(source))] == [
        {"image": image, "label": label}
        for image, label in [(b"a", 2), (b"b", 1), (b"\x00\xff", 0), (b"c", 0), (b"d", 2)]
    ]
    assert source.labels().tolist() == [2, 1, 0, 0, 2]
    assert source.describe(2) == f"{shards}/train-00000-of-00002.array_record record 2"
    assert source.describe(3) == f"{shards}/train-00001-of-00002.array_record record 0"
    assert len(open_source(Data("array_record", path=str(shards), split="val"))) == 1


def test_array_record_errors(shards):
    with pytest.raises(InputError, match=r"extra\*\.array_record\*: no such files"):
        open_source(Data("array_record", path=str(shards), split="extra"))
    (shards / "val-x.array_record").write_bytes(b"not a record file" * 100)
    with pytest.raises(InputError, match=r"val-x\.array_record: not an array_record file"):
        open_source(Data("array_record", path=str(shards), split="val-x"))
    write_shard(shards / "none.array_record", [])
    with pytest.raises(InputError, match="holds no images"):
        open_source(Data("array_record", path=str(shards), split="none"))


def test_a_damaged_shard(shards):
    file = shards / "train-00000-of-00002.array_record"
    source = open_source(Data("array_record", path=str(shards)))
    content = bytearray(file.read_bytes())
    at = content.index(b"\x00\xff")
    content[at : at + 2] = b"zz"
    file.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"train-00000-of-00002.array_record record 2: cannot be read \(.*; mend it"):
        source[2]


def test_records_with_masks():
    assert decode_record(encode_record(b"i", -1, b"m")) == {"image": b"i", "label": -1, "mask": b"m"}
    assert decode_record(encode_record(b"i", 3)) == {"image": b"i", "label": 3}


@pytest.mark.parametrize("record", [b"", b"\xc1", encode_record(b"x", 1)[:-1], b"\x80", b"\x01"])
def test_foreign_record(record):
    with pytest.raises(InputError, match=r"^shard 3: not a msgpack map of image and label .*encode_record$"):
        decode_record(record, "shard 3")


def test_what_prepare_knows_of_its_shards(shards):
    manifest = {"num_shards": 2, "classes": ["ant", "bee", "cat"]}
    data = Data("array_record", path=str(shards))
    (shards / "train.json").write_text(json.dumps(manifest))
    assert open_source(data).classes == ("ant", "bee", "cat")
    sources._open.cache_clear()
    (shards / "train.json").write_text(json.dumps({**manifest, "classes": None, "num_shards": 5}))
    with pytest.raises(InputError, match="train.json: 3 of 5 shards are missing; run the prepare command again"):
        open_source(data)
    sources._open.cache_clear()
    (shards / "train.json").write_text("{")
    with pytest.raises(InputError, match="train.json is damaged; run the prepare command again"):
        open_source(data)
