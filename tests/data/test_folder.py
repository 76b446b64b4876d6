"""Trees of images as people have them, against walks and readers that are not ours."""

import collections
import os

import numpy as np
import pytest
from PIL import Image

from tests.data.test_sources import jpeg, write_tree
from tinymim_jax.data import manifest
from tinymim_jax.data.decode import EXTENSIONS, NOT_READ, decode
from tinymim_jax.data.folder import held_out
from tinymim_jax.data.manifest import Settings
from tinymim_jax.data.prepare import Packer
from tinymim_jax.data.sources import open_source
from tinymim_jax.experiment.config import Data
from tinymim_jax.runtime.errors import InputError

ODD_NAMES = (
    "a b", "a[1]", "[a-z]", "a\\b", "ü", "a*?", "~x", "#h", "100%20", "a:b", "file:x", "x\ny", "-d", "'q'", 'q"', "{a,b}",
    " lead", "trail ", "日本語", "a!b$c`d", "&;|<>", "tab\t", "a?b=c#d", "e\u0301", "x.y.z", "train-00000", "😀",
)  # fmt: skip


def folder(path, **fields):
    return open_source(Data("folder", path=str(path), **fields))


def names(source):
    return [os.path.relpath(source.describe(i), source._root) for i in range(len(source))]


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8))


def write_every_kind(root):
    """An image with each of the endings that Pillow writes, some in capitals; returns the endings."""
    written = set()
    for i, (end, kind) in enumerate(sorted(Image.registered_extensions().items())):
        for mode in ("RGB", "RGBA", "P", "L", "1") if kind in Image.SAVE else ():
            file = root / f"image{i}{end.upper() if i % 3 == 0 else end}"
            size = {"size": (32, 32)} if kind == "ICNS" else {}
            try:
                image = picture(i).convert(mode).resize((32, 32)) if size else picture(i).convert(mode)
                image.save(file, kind)
                written.add(end)
                break
            except (OSError, ValueError, KeyError, SystemError):
                file.unlink(missing_ok=True)
    return written


def read_by_pillow(path):
    """RGB pixels, or None; what Pillow runs other programs for, or cannot tell apart, is not asked."""
    try:
        with Image.open(path) as image:
            return None if image.format in NOT_READ or image.mode == "F" else np.asarray(image.convert("RGB"))
    except Exception:
        return None


def test_the_files_are_those_that_pillow_reads(tmp_path):
    for name in ("ant", "bee/inner/most"):
        (tmp_path / "train" / name).mkdir(parents=True)
    written = write_every_kind(tmp_path / "train/ant")
    assert len(written) >= 30 and {".tif", ".tiff", ".ppm", ".pgm", ".gif", ".avif", ".jp2", ".tga"} <= written
    write_tree(
        tmp_path / "train/bee", {"a.jpg": jpeg(1), "inner/b.TIF": jpeg(2, "TIFF"), "inner/most/c.gif": jpeg(3, "GIF")}
    )
    noise = {"notes.txt": b"x", "inner/list.csv": b"x", "README": b"x", ".hidden.jpg": jpeg(4), "inner/._c.gif": b"x"}
    write_tree(tmp_path / "train/bee", noise)
    expected, others = {}, 0
    for where, _, files in os.walk(tmp_path / "train"):
        for file in files:
            pixels = read_by_pillow(os.path.join(where, file))
            if pixels is not None and not file.startswith("."):
                expected[os.path.relpath(os.path.join(where, file), tmp_path / "train")] = pixels
            else:
                others += 1
    source = folder(tmp_path)
    found = names(source)
    assert set(found) - set(expected) <= {
        f for f in found if f.endswith((".pfm", ".PFM"))
    }  # floating-point: said below
    assert set(expected) <= set(found) and found == sorted(found)
    for i, name in enumerate(found):
        if name in expected:
            np.testing.assert_array_equal(np.asarray(decode(source[i]["image"], name)), expected[name])
    (note,) = source.notes
    assert note.startswith(f"{others - (len(found) - len(expected))} files left out: ") and "1 .txt" in note
    assert "1 without an ending" in note and "1 .csv" in note and "2 hidden" in note


def test_pixels_whose_range_nobody_says_are_refused(tmp_path):
    Image.new("F", (4, 4), 0.5).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match="floating-point"):
        decode((tmp_path / "x.tif").read_bytes(), "x.tif")


def test_endings_are_of_what_can_be_decoded():
    assert not EXTENSIONS & {".eps", ".ps", ".pdf", ".wmf", ".mpg", ".h5", ".txt", ""}


@pytest.mark.parametrize("place", ["file", "class", "sub-folder", "split", "path"])
def test_odd_names(place, tmp_path):
    for i, odd in enumerate(ODD_NAMES):
        parts = {"path": f"tree{i}", "split": "train", "class": "c", "sub-folder": "s", "file": "f"} | {place: odd}
        inner = tmp_path / str(i) / parts["path"] / parts["split"] / parts["class"] / parts["sub-folder"]
        inner.mkdir(parents=True)
        (inner / f"{parts['file']}.jpg").write_bytes(jpeg(i))
        source = folder(tmp_path / str(i) / parts["path"], split=parts["split"])
        assert len(source) == 1 and source.classes == (parts["class"],), odd
        assert source[0] == {"image": jpeg(i), "label": 0}, odd
        assert os.path.samefile(source.describe(0), inner / f"{parts['file']}.jpg")
    assert len(ODD_NAMES) >= 20


def test_a_link_to_a_folder_above_it_is_not_followed(tmp_path):
    write_tree(tmp_path, {"train/dog/a.jpg": jpeg(1), "train/dog2/b.jpg": jpeg(2), "far/c.jpg": jpeg(3)})
    (tmp_path / "train/dog/loop").symlink_to(tmp_path / "train/dog")
    (tmp_path / "train/dog/up").symlink_to(tmp_path)
    (tmp_path / "train/dog2/far").symlink_to(tmp_path / "far")
    (tmp_path / "train/dog2/dog").symlink_to(tmp_path / "train/dog/a.jpg")
    assert names(folder(tmp_path)) == ["dog/a.jpg", "dog2/b.jpg", "dog2/far/c.jpg"]


@pytest.mark.parametrize("inside", ["train", "."])
def test_images_without_classes(tmp_path, inside):
    write_tree(tmp_path / inside, {f"{i:02d}.jpg": jpeg(i) for i in range(12)} | {"notes.txt": b"x"})
    source = folder(tmp_path)
    assert source.classes == () and [source[i]["image"] for i in range(12)] == [jpeg(i) for i in range(12)]
    assert set(source.labels()) == {-1} and source.notes == ("1 file left out: 1 .txt",)
    with pytest.raises(InputError, match=r"00\.jpg and the others have no classes; sort them"):
        folder(tmp_path, per_class=2)
    with pytest.raises(InputError, match="no such folder" if inside == "train" else "neither splits nor classes"):
        folder(tmp_path, split="val")
    settings = Settings()
    packed = manifest.new(Data("folder", path=str(tmp_path)), source, settings)
    packed.shards[packed.name(0)] = Packer(source, str(tmp_path), packed, settings)(0)
    from etils.epath import Path

    packed.save(Path(tmp_path))
    again = open_source(Data("array_record", path=str(tmp_path)))
    assert again.classes == () and again[3]["label"] == -1 and len(again) == 12


def test_images_beside_class_folders_are_left_out_aloud(tmp_path):
    write_tree(
        tmp_path / "train", {"a/1.jpg": jpeg(1), "b/1.jpg": jpeg(2), "loose.jpg": jpeg(3), "more.TIFF": jpeg(4, "TIFF")}
    )
    source = folder(tmp_path)
    assert len(source) == 2 and source.notes == ("2 files left out: 2 beside the class folders",)


@pytest.mark.parametrize(
    ("there", "asked", "read"),
    [
        ("test", "val", "test"),
        ("val", "test", "val"),
        ("validation", "val", "validation"),
        ("val test", "test", "test"),
    ],
)
def test_the_evaluation_split_by_its_other_name(there, asked, read, tmp_path):
    write_tree(tmp_path, {f"{split}/a/{split}.jpg": jpeg(1) for split in ("train", *there.split())})
    source = folder(tmp_path, split=asked)
    assert names(source) == [f"a/{read}.jpg"]
    assert source.notes == (() if read == asked else (f"read from {tmp_path}/{read}",))


def test_shards_of_the_evaluation_split_by_its_other_name(shards):
    source = open_source(Data("array_record", path=str(shards), split="test"))
    assert source[0] == {"image": b"v", "label": 7} and source.notes == (f"read from {shards}/val*",)


def test_a_tree_that_is_not_split(tmp_path):
    sizes = {"ant": 300, "bee": 40, "cat": 2, "dog": 1}
    write_tree(tmp_path, {f"{name}/{i:03d}.jpg": jpeg(i % 250) for name, n in sizes.items() for i in range(n)})
    train, val, test = (folder(tmp_path, split=split) for split in ("train", "val", "test"))
    assert names(val) == names(test) and train.classes == val.classes == tuple(sizes)
    assert sorted(names(train) + names(val)) == sorted(f"{n}/{i:03d}.jpg" for n, k in sizes.items() for i in range(k))
    held = collections.Counter(name.split("/")[0] for name in names(val))
    assert 15 <= held["ant"] <= 45 and 1 <= held["bee"] <= 10 and held["cat"] == 1 and held["dog"] == 0
    assert "is not split: its 4 folders are classes, and about 10% of each" in train.notes[0]
    assert names(folder(tmp_path, split="val", val_seed=1)) != names(val)
    larger = names(folder(tmp_path, split="val", val_fraction=0.5))
    assert set(names(val)) - set(larger) <= {"cat/000.jpg", "cat/001.jpg"} and 120 <= len(larger) <= 220
    assert len(folder(tmp_path, split="val", val_fraction=1.0)) == 343
    with pytest.raises(InputError, match="holds no images"):
        folder(tmp_path, split="val", val_fraction=0.0)
    # Elsewhere, and with other files beside them, images stay where they are.
    (tmp_path / "ant").rename(tmp_path / "away")
    write_tree(tmp_path / "new", {f"ant/x{i}.jpg": jpeg(i) for i in range(100)} | {"bee/1.jpg": jpeg(1)})
    for file in sorted((tmp_path / "away").iterdir(), reverse=True):
        file.rename(tmp_path / "new/ant" / file.name)
    moved = {name for name in names(folder(tmp_path / "new", split="val")) if "x" not in name}
    assert moved - {"bee/1.jpg"} == {name for name in names(val) if name.startswith("ant")}


def test_held_out_does_not_see_the_order():
    files = [f"c/{i}" for i in range(200)]
    assert held_out(files, 0.3, 0) == held_out(files[::-1], 0.3, 0) and 30 < len(held_out(files, 0.3, 0)) < 90


@pytest.mark.parametrize("there", ["training/a", "Val/a", "valid/a", "test/a"])
def test_splits_of_other_names_are_no_classes(there, tmp_path):
    write_tree(tmp_path, {f"{there}/1.jpg": jpeg(1), "other/a/1.jpg": jpeg(2)})
    with pytest.raises(InputError, match=f"{tmp_path}/train: no such folder"):
        folder(tmp_path)


def test_all_images_below_a_path(tmp_path):
    """As `features` and `predict` go over a folder."""
    write_tree(
        tmp_path, {"b.jpg": jpeg(1), "a/x/y.tif": jpeg(2, "TIFF"), "train/z.jpg": jpeg(3), "empty/notes.txt": b"x"}
    )
    source = folder(tmp_path, split="")
    assert names(source) == ["a/x/y.tif", "b.jpg", "train/z.jpg"] and source.classes == ()
    assert source.notes == ("1 file left out: 1 .txt",)
