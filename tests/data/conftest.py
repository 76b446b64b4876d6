import pytest

from tinymim_jax.data import fast_jpeg
from tinymim_jax.data.shards import encode_record


def write_shard(path, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for image, label in records:
        writer.write(encode_record(image, label))
    writer.close()


@pytest.fixture
def shards(tmp_path):
    write_shard(tmp_path / "train-00001-of-00002.array_record", [(b"c", 0), (b"d", 2)])
    write_shard(tmp_path / "train-00000-of-00002.array_record", [(b"a", 2), (b"b", 1), (b"\x00\xff", 0)])
    write_shard(tmp_path / "val-00000-of-00001.array_record", [(b"v", 7)])
    return tmp_path


@pytest.fixture(params=[True, False], ids=["simd", "pillow"])
def either_resizer(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(fast_jpeg, "cykooz_resizer", None)
    elif fast_jpeg.cykooz_resizer is None:
        pytest.skip("cykooz-resizer is not installed")
