import io
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from tinymim_jax.data.decode import decode_mask
from tinymim_jax.data.sources import open_source
from tinymim_jax.experiment.config import Data, Masks
from tinymim_jax.runtime.errors import InputError


def jpeg(value, kind="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (10, 8), (value, value, value)).save(buffer, kind)
    return buffer.getvalue()


def write_tree(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


@pytest.fixture
def tree(tmp_path):
    files = {"train/cat/b.JPEG": jpeg(1), "train/cat/a.png": jpeg(2, "PNG"), "train/ant/z.jpg": jpeg(3)}
    noise = {"train/ant/notes.txt": b"x", "train/ant/._z.jpg": b"x", "train/.cache/a.jpg": b"x", "train/list.csv": b"x"}
    write_tree(tmp_path, files | noise)
    return tmp_path


def test_digits_are_the_scans_in_order():
    from sklearn.datasets import load_digits

    train, test = open_source(Data("digits")), open_source(Data("digits", split="test"))
    assert (len(train), len(test)) == (1297, 500)
    images = np.stack([s[i]["image"] for s in (train, test) for i in range(len(s))])
    assert images.shape == (1797, 8, 8, 3) and images.dtype == np.uint8
    np.testing.assert_allclose(images, load_digits().images[..., None] / 16 * 255 * np.ones(3), atol=0.5)
    np.testing.assert_array_equal(np.concatenate([train.labels(), test.labels()]), load_digits().target)
    assert test[3]["label"] == load_digits().target[1300]
    assert test.describe(3) == "image 3 of digits test"


def test_folder(tree):
    source = open_source(Data("folder", path=str(tree)))
    assert [source.describe(i) for i in range(len(source))] == [
        f"{tree}/train/{n}" for n in ("ant/z.jpg", "cat/a.png", "cat/b.JPEG")
    ]
    assert source.labels().tolist() == [source[i]["label"] for i in range(3)] == [0, 1, 1]
    assert source[2]["image"] == jpeg(1)


def test_folder_below_home(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree.parent))
    assert len(open_source(Data("folder", path=f"~/{tree.name}"))) == 3


def test_folder_of_links(tree):
    (tree / "few").mkdir()
    (tree / "few" / "dog").symlink_to(tree / "train" / "cat")
    (tree / "few" / "none").symlink_to(tree / "gone")
    source = open_source(Data("folder", path=str(tree), split="few"))
    assert source.classes == ("dog",) and source[1]["image"] == jpeg(1)


def test_folder_errors(tree):
    def message(**fields):
        with pytest.raises(InputError) as error:
            open_source(Data("folder", **{"path": str(tree), **fields}))
        return str(error.value)

    assert f"{tree}/val: no such folder" in message(split="val")
    (tree / "empty").mkdir()
    assert f"{tree}/empty/: a folder without images" in message(split="empty")
    (tree / "train" / "dog").mkdir()
    assert f"{tree}/train/dog: a folder without images" in message()


def test_folder_file_that_went_away(tree):
    source = open_source(Data("folder", path=str(tree)))
    (tree / "train/ant/z.jpg").unlink()
    with pytest.raises(InputError, match=r"ant/z\.jpg: cannot be read \(No such file"):
        source[0]


def write_tfds(folder):
    """A data set "tiny" of six encoded JPEGs, as `tfds build` would prepare it."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "tiny"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(6):
                yield i, {"image": io.BytesIO(jpeg(i * 40)), "label": i % 3}

    Tiny(data_dir=folder, file_format="array_record").download_and_prepare()


def write_masked_tfds(folder, feature):
    """A data set "masked" of images with masks and no labels."""
    import tensorflow_datasets as tfds

    class Masked(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "masked"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image, mask = tfds.features.Image(shape=(None, None, 3)), tfds.features.Image(shape=(None, None, 1))
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"image": image, feature: mask})
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(3):
                mask = io.BytesIO()
                Image.new("L", (10, 8), i).save(mask, "PNG")
                yield i, {"image": io.BytesIO(jpeg(i)), feature: io.BytesIO(mask.getvalue())}

    Masked(data_dir=folder, file_format="array_record").download_and_prepare()


@pytest.mark.parametrize("feature", ["annotation", "segmentation_mask"])
def test_tfds_with_masks(feature, tmp_path):
    write_masked_tfds(tmp_path, feature)
    source = open_source(Data("tfds", name="masked", path=str(tmp_path), masks=Masks(3)))
    for i in range(3):
        record = source[i]
        value = int(record["mask"].flat[0])
        assert set(record) == {"image", "mask", "label"} and record["label"] == -1
        assert record["image"] == jpeg(value)
        np.testing.assert_array_equal(decode_mask(record, ""), np.full((8, 10), value))


def test_tfds_without_tensorflow(tmp_path):
    write_tfds(tmp_path)
    data = Data("tfds", name="tiny", path=str(tmp_path))
    source = open_source(data)
    found = {source[i]["image"]: source[i]["label"] for i in range(len(source))}
    assert found == {jpeg(i * 40): i % 3 for i in range(6)}  # the bytes as they were: not decoded
    again = pickle.loads(pickle.dumps(source))
    assert again[4] == source[4]
    np.testing.assert_array_equal(again.labels(), [source[i]["label"] for i in range(6)])
    assert source.describe(4) == "record 4 of tfds tiny, split train"
    for wrong in (Data("tfds", name="tiny", path=str(tmp_path / "elsewhere")),
                  Data("tfds", name="tiny", path=str(tmp_path), split="val")):  # fmt: skip
        with pytest.raises(
            InputError, match=r"^tfds 'tiny'.*tfds build tiny --file_format=array_record, or use an"
        ) as error:
            open_source(wrong)
        assert "\n" not in str(error.value)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("kind", ["digits", "folder", "array_record", "scenes"])
def test_sources_survive_pickling(kind, request):
    paths = {"folder": "tree", "array_record": "shards"}
    source = open_source(Data(kind, path=str(request.getfixturevalue(paths[kind])) if kind in paths else ""))
    again = pickle.loads(pickle.dumps(source))
    assert len(again) == len(source)
    np.testing.assert_equal(again[1], source[1])


def test_subset_takes_as_many_of_each_class():
    whole = open_source(Data("digits"))
    few = open_source(Data("digits", per_class=5, subset_seed=3))
    assert np.bincount(few.labels()).tolist() == [5] * 10
    assert few.labels().tolist() == [few[i]["label"] for i in range(50)]
    numbers = [int(few.describe(i).split()[1]) for i in range(50)]
    assert numbers == sorted(set(numbers))
    np.testing.assert_array_equal(few[7]["image"], whole[numbers[7]]["image"])
    zeros = np.flatnonzero(whole.labels() == 0)
    expected = np.random.default_rng((3, 0)).choice(zeros, 5, replace=False)
    assert [n for n in numbers if n in zeros] == sorted(expected.tolist())
    other = open_source(Data("digits", per_class=5, subset_seed=4))
    assert [other.describe(i) for i in range(50)] != [few.describe(i) for i in range(50)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "val"}, "unknown choice 'val'; choose one of train, test"),
        ({"per_class": 500}, r"class 0 has \d+ images"),
        ({"num_examples": 1000}, "num_examples is 1000, .* has 1297 images"),
        ({"num_examples": 1297, "per_class": 2}, "num_examples is 1297, .* has 20 images"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(InputError, match=message):
        open_source(Data(**{"source": "digits", **fields}))


def test_num_examples_counts_after_the_choice():
    assert len(open_source(Data("digits", per_class=2, num_examples=20))) == 20
