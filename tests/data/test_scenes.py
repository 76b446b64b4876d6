import pickle

import numpy as np
import pytest

from tinymim_jax.data.decode import decode_mask
from tinymim_jax.data.digits import Digits
from tinymim_jax.data.sources import open_source
from tinymim_jax.experiment.config import Data, Masks
from tinymim_jax.runtime.errors import InputError


def scenes(split="train"):
    return open_source(Data("scenes", split=split, masks=Masks(11)))


def test_scenes_are_a_function_of_split_and_number():
    train, test = scenes(), scenes("test")
    assert (len(train), len(test)) == (400, 100) and train.classes == ("background", *"0123456789")
    again = pickle.loads(pickle.dumps(train))
    for i in (0, 17, 399):
        np.testing.assert_equal(train[i], again[i])
        np.testing.assert_equal(train[i], train[i])
    np.testing.assert_equal(train[-1], train[399])
    assert not np.array_equal(train[3]["mask"], test[3]["mask"]) and train.describe(3) == "scene 3 of train"
    with pytest.raises(IndexError):
        train[400]
    with pytest.raises(InputError, match="unknown choice 'dev'; choose one of train, test"):
        open_source(Data("scenes", split="dev"))


def test_what_scenes_show():
    shares, sizes, kinds = np.zeros(11), set(), set()
    source = scenes()
    for i in range(60):
        record = source[i]
        mask = decode_mask(record, "")
        assert record["image"].dtype == np.uint8 and record["image"].shape == (*mask.shape, 3) and record["label"] == -1
        shares += np.bincount(mask.ravel(), minlength=11) / mask.size / 60
        sizes.add(mask.shape)
        kinds.add(len(np.unique(mask)))
        # What is a digit stands out from what is around it.
        assert np.ptp(record["image"].mean(axis=-1)) > 40
    assert 0.7 < shares[0] < 0.95 and shares[1:].min() > 0.005 and min(kinds) >= 2 and max(kinds) >= 5
    heights, widths = zip(*sizes, strict=True)
    assert min(heights) >= 88 and max(heights) <= 104 and min(widths) >= 116 and max(widths) <= 140


def test_the_digits_are_those_of_the_split(monkeypatch):
    asked = set()
    read = Digits.__getitem__
    monkeypatch.setattr(Digits, "__getitem__", lambda self, i: asked.add((self._split, i)) or read(self, i))
    for split in ("train", "test"):
        scenes(split)[5]
    assert {split for split, _ in asked} == {"train", "test"}
    assert max(i for split, i in asked if split == "test") < 500
