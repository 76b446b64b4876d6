"""Trees of images and masks as people have them."""

import os
import pickle
import re

import numpy as np
import pytest
from PIL import Image

from tinymim_jax.data import class_list, dense, sources
from tinymim_jax.data.sources import need_labels, open_source
from tinymim_jax.experiment.config import Data, Masks
from tinymim_jax.runtime.errors import InputError

KEYS = ("a", "b", "c")


def write(root, images, masks, keys=KEYS, ending=".jpg", suffix=""):
    """Of pair number i, the image is 4 + i wide, and all of its mask is i."""
    for i, key in enumerate(keys):
        for folder, kind, name in ((images, "RGB", key + ending), (masks, "L", f"{key}{suffix}.png")):
            file = root / folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new(kind, (4 + i, 3), i if kind == "L" else (90, 80, 70)).save(file)


def pairs(path, **fields):
    return open_source(Data("pairs", path=str(path), **fields))


def check(source, keys=KEYS):
    """Each image comes with the mask of its own."""
    assert [os.path.splitext(os.path.basename(source.describe(i)))[0] for i in range(len(source))] == list(keys)
    for i in range(len(source)):
        record = source[i]
        assert set(record) == {"image", "mask", "label"} and record["label"] == -1
        classes = dense.classes_of(record, source.describe(i), Masks(3))
        assert classes.shape[1] == 4 + classes[0, 0] == dense.sizes(source)[i, 1] and (classes == classes[0, 0]).all()
    assert source.labels().tolist() == [-1] * len(source)


@pytest.mark.parametrize(
    ("images", "masks", "val"),
    [
        ("images/training", "annotations/training", "validation"),
        ("train", "trainannot", "val"),
        ("train", "train_labels", "test"),
        ("images/train", "masks/train", "val"),
        ("images/train", "labels/train", "validation"),
        ("train/images", "train/masks", "val"),
        ("training/imgs", "training/gt", "test"),
    ],
)
def test_layouts_with_splits(images, masks, val, tmp_path):
    write(tmp_path, images, masks)
    of_val, masks_of_val = (re.sub("train(ing)?", val, part) for part in (images, masks))
    write(tmp_path, of_val, masks_of_val, keys=("x", "y"))
    for split, folder, keys in (("train", images, KEYS), ("val", of_val, ("x", "y"))):
        source = pairs(tmp_path, split=split)
        check(source, keys)
        assert source.describe(0) == f"{tmp_path}/{folder}/{keys[0]}.jpg"
        has_other_name = split not in folder.split("/")
        assert source.notes == ((f"read from {tmp_path}/{folder}",) if has_other_name else ())
    with pytest.raises(
        InputError, match="has no images with masks of split 'extra'; name a tree with images/extra and"
    ):
        pairs(tmp_path, split="extra")


def test_one_split_is_not_divided(tmp_path):
    write(tmp_path, "images/train", "masks/train")
    with pytest.raises(InputError, match="has no images with masks of split 'val'"):
        pairs(tmp_path, split="val")


@pytest.mark.parametrize(("images", "masks"), [("images", "masks"), ("image", "label"), ("images", "annotations")])
def test_a_tree_without_splits(images, masks, tmp_path):
    keys = [f"{i:03d}" for i in range(60)]
    for i in range(0, 60, 3):
        write(tmp_path, images, masks, keys[i : i + 3])
    train, val, test, both = (pairs(tmp_path, split=split) for split in ("train", "val", "test", ""))
    check(both, keys)
    shown = [{source.describe(i) for i in range(len(source))} for source in (train, val, test)]
    assert (
        shown[1] == shown[2] and not shown[0] & shown[1] and len(shown[0] | shown[1]) == 60 and 1 <= len(shown[1]) <= 15
    )
    assert "images is not split" in train.notes[0] or "image is not split" in train.notes[0]
    assert both.notes == () and len(pairs(tmp_path, split="val", val_fraction=0.5)) > 20
    with pytest.raises(InputError, match="has no images with masks of split 'part'"):
        pairs(tmp_path, split="part")


def test_all_splits_together(tmp_path):
    write(tmp_path, "images/training", "annotations/training")
    write(tmp_path, "images/validation", "annotations/validation", keys=("x", "y"))
    check(pairs(tmp_path, split=""), (*KEYS, "x", "y"))


@pytest.mark.parametrize("suffix", ["_mask", "_label", "_gt", "_labelIds", "-seg", "_L", ".mask"])
def test_names_of_masks_may_end_otherwise(suffix, tmp_path):
    write(tmp_path, "images", "masks", suffix=suffix, ending=".png")
    check(pairs(tmp_path, split=""))


def test_an_image_whose_name_ends_like_a_mask(tmp_path):
    write(tmp_path, "images", "masks", keys=("a", "a_gt", "b"))
    check(pairs(tmp_path, split=""), ("a", "a_gt", "b"))


def test_folders_within(tmp_path):
    write(tmp_path, "images/train", "masks/train", keys=("rome/1", "rome/2", "turin/1"))
    source = pairs(tmp_path)
    check(source, ("1", "2", "1"))
    assert source.describe(2) == f"{tmp_path}/images/train/turin/1.jpg"


def test_sources_and_their_files_survive_pickling(tmp_path):
    write(tmp_path, "train", "trainannot")
    source = pairs(tmp_path)
    again = pickle.loads(pickle.dumps(source))
    assert again[1] == source[1] and again.describe(1) == source.describe(1)
    with source.open_image(1) as file:
        assert file.read() == source[1]["image"]


def test_what_is_left_out_is_said(tmp_path):
    write(tmp_path, "train", "trainannot")
    write(tmp_path, "train/../other", "trainannot", keys=("z",))
    (tmp_path / "train" / "notes.txt").write_text("x")
    notes = pairs(tmp_path).notes
    assert "1 file left out: 1 .txt" in notes
    assert f"masks without an image left out: 1, first {tmp_path}/trainannot/z.png" in notes


def test_need_labels(tmp_path):
    write(tmp_path, "train", "trainannot")
    (tmp_path / "classes.txt").write_text("one\ntwo\nthree\n")
    with pytest.raises(InputError, match="a.jpg and the others have no classes"):
        need_labels(pairs(tmp_path))


def message(path, **fields):
    with pytest.raises(InputError) as error:
        source = pairs(path, **fields)
        for i in range(len(source)):
            dense.classes_of(source[i], source.describe(i), Masks(3))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_trees(tmp_path):
    assert message("") == "data.path is empty; set it to the tree that holds images and masks"
    assert message(tmp_path / "gone") == f"{tmp_path}/gone: no such folder; name a tree of images and masks"
    assert message(tmp_path).startswith(f"{tmp_path}: has no images with masks of split 'train'; name a tree")
    (tmp_path / "train").mkdir()
    assert message(tmp_path) == f"{tmp_path}/train: there are no masks for it; put them into {tmp_path}/trainannot"
    (tmp_path / "trainannot").mkdir()
    assert message(tmp_path) == f"{tmp_path}/train: a folder without images; add some, or remove it"
    write(tmp_path, "train", "elsewhere")
    assert message(tmp_path) == f"{tmp_path}/trainannot: a folder without images; add some, or remove it"
    write(tmp_path, "train", "trainannot", keys=("a", "c"))
    assert message(tmp_path) == (
        f"{tmp_path}/train/b.jpg: has no mask {tmp_path}/trainannot/b.* (1 of 3 images have none); add masks, or remove"
        " such images"
    )
    (tmp_path / "train_masks").mkdir()
    assert message(tmp_path) == f"{tmp_path}: both trainannot and train_masks may hold the masks of train; keep one"


def test_bad_pairs(tmp_path):
    write(tmp_path, "train", "trainannot")
    twice = tmp_path / "trainannot" / "b_mask.png"
    Image.new("L", (5, 3)).save(twice)
    assert message(tmp_path) == (
        f"{tmp_path}/train/b.jpg: two files may be its mask, {tmp_path}/trainannot/b.png and b_mask.png; keep one"
    )
    twice.rename(tmp_path / "train" / "b.png")
    assert message(tmp_path) == f"{tmp_path}/train/b.jpg and b.png would share a mask; remove or rename one"
    (tmp_path / "train" / "b.png").unlink()
    sources._open.cache_clear()
    mask = tmp_path / "trainannot" / "b.png"
    for wrong, said in (
        (Image.new("L", (5, 4)), "is 5 x 3 pixels and its mask 5 x 4; both must be of one size"),
        (Image.new("RGB", (5, 3), (1, 2, 3)), "its mask is in colours (uint8[3, 5, 3]); save the number of"),
        (Image.new("L", (5, 3), 3), "its mask has the value 3, and classes are 0 to 2; raise masks.num_classes, or"),
    ):
        wrong.save(mask)
        assert message(tmp_path).startswith(f"{tmp_path}/train/b.jpg: {said}")
    source = pairs(tmp_path)
    mask.unlink()
    with pytest.raises(InputError, match=rf"^{mask}: cannot be read \(No such file"):
        source[1]


# Classes


def listed(path, text, name="classes.txt"):
    write(path, "train", "trainannot")
    (path / name).write_text(text)
    sources._open.cache_clear()
    return pairs(path)


def test_names_of_classes(tmp_path):
    source = listed(tmp_path, "sky\n\ntraffic light \ncar\n")
    assert source.classes == ("sky", "traffic light", "car") and source.colours is None
    data = Data("pairs", path=str(tmp_path), masks=Masks(3))
    assert open_source(data) is source
    data.masks.num_classes = 4
    with pytest.raises(
        InputError, match=f"data.masks.num_classes is 4, and {tmp_path} names 3 classes; correct either"
    ):
        open_source(data)


def test_colours_of_classes(tmp_path):
    source = listed(tmp_path, "sky 1 2 3\ntraffic light\t255, 0, 7\nroute 66 9 9 9\n")
    assert source.classes == ("sky", "traffic light", "route 66")
    np.testing.assert_array_equal(source.colours, [[1, 2, 3], [255, 0, 7], [9, 9, 9]])
    np.testing.assert_array_equal(class_list.colours(source, 3), source.colours)


def test_the_table_of_ade20k(tmp_path):
    rows = "Idx\tRatio\tTrain\tVal\tName\n1\t0.15\t11664\t1172\twall\n2\t0.1\t6046\t612\tbuilding, edifice\n"
    source = listed(tmp_path, rows, "objectInfo150.txt")
    assert source.classes == ("wall", "building, edifice")
    assert listed(tmp_path, "one\n").classes == ("one",)  # a list of one's own goes first


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("classes.txt", " \n", "names no classes; write one a line, or remove it"),
        (
            "classes.txt",
            "sky 1 2 3\ncar\n",
            ", line 2: 'car' is no NAME R G B with colours up to 255, as other lines are",
        ),
        ("classes.txt", "sky 1 2 256\n", ", line 1: 'sky 1 2 256' is no NAME R G B"),
        ("objectInfo150.txt", "wall\nsky\n", "is no table with a column Name between tabs"),
        ("objectInfo150.txt", "Idx\tName\n1\twall\n2\n", "is no table with a column Name between tabs"),
    ],
)
def test_bad_lists_of_classes(name, text, said, tmp_path):
    with pytest.raises(InputError) as error:
        listed(tmp_path, text, name)
    assert str(error.value).startswith(f"{tmp_path}/{name}") and said in str(error.value)


def test_colours_of_our_own():
    colours = class_list.palette(254)
    assert colours.shape == (254, 3) and colours.dtype == np.uint8 and len(np.unique(colours, axis=0)) == 254
    np.testing.assert_array_equal(class_list.palette(11), colours[:11])
    np.testing.assert_array_equal(class_list.colours(object(), 11), colours[:11])
    apart = np.abs(np.diff(colours.astype(int), axis=0)).sum(axis=1)
    assert apart.min() > 60
