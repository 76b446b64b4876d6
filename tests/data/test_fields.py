"""Records of other fields than an image and its label go the same way."""

import dataclasses
import pickle

import jax
import numpy as np
import pytest

from tests.conftest import tiny_mae
from tinymim_jax.data import pipeline
from tinymim_jax.data.fields import IMAGE_LABEL, Fields
from tinymim_jax.data.rows import EvalRows, TrainRows, image_rng
from tinymim_jax.experiment.config import Data
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.mae import MaeTask
from tinymim_jax.training.setup import make_setup

DATA = Data("digits", image_size=6)
EVAL = dataclasses.replace(DATA, transform="eval")


class Segmented:
    """Images whose mask is their first colour; number 3 has none. A class, so that workers can import it."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        image = np.random.default_rng(index).integers(0, 256, (9, 9, 3), np.uint8)
        return {"image": image, "mask": None if index == 3 else image[..., 0]}

    def describe(self, index):
        return f"number {index}"


def empty_mask(data):
    size = data.image_size
    return {"image": np.zeros((size, size, 3), np.uint8), "mask": np.zeros((size, size), np.int16)}


def read_mask(record, name, data, rng):
    """One crop for both."""
    if record["mask"] is None:
        raise InputError(f"{name}: has no mask")
    top, left = rng.integers(0, 9 - data.image_size, 2, endpoint=True)
    part = np.s_[top : top + data.image_size, left : left + data.image_size]
    return {"image": record["image"][part], "mask": record["mask"][part]}


def empty_views(data):
    return {"image": np.zeros((2, data.image_size, data.image_size, 3), np.uint8), "area": np.zeros((2,), np.float32)}


def read_views(record, name, data, rng):
    views = [IMAGE_LABEL.read({**record, "label": 0}, name, data, rng)["image"] for _ in range(2)]
    return {"image": np.stack(views), "area": np.array([view.mean() for view in views])}


MASKS, VIEWS = Fields(empty_mask, read_mask), Fields(empty_views, read_views)


def test_the_fields_of_images_and_labels():
    batch = IMAGE_LABEL.batch(DATA, 4)
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "image": ((4, 6, 6, 3), "uint8"),
        "label": ((4,), "int32"),
        "is_valid": ((4,), "bool"),
        "index": ((4,), "int32"),
    }
    assert not batch["is_valid"].any() and (batch["index"] == -1).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_masks_are_cropped_with_their_images(mesh, workers, caplog):
    data = dataclasses.replace(EVAL, on_bad_image="skip", workers=workers)
    batches = list(pipeline.eval_batches(data, Segmented(), batch_size=4, mesh=mesh, fields=MASKS))
    assert len(batches) == 3
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    assert {name: (value.shape, value.dtype.name) for name, value in whole.items()} == {
        "image": ((12, 6, 6, 3), "uint8"),
        "mask": ((12, 6, 6), "int16"),
        "is_valid": ((12,), "bool"),
        "index": ((12,), "int32"),
    }
    assert whole["is_valid"].tolist() == [i not in (3, 10, 11) for i in range(12)]
    np.testing.assert_array_equal(whole["mask"], whole["image"][..., 0])
    valid = whole["is_valid"]
    assert whole["mask"][valid].any(axis=(1, 2)).all() and not whole["mask"][~valid].any()
    assert ("number 3: has no mask" in caplog.text) == (not workers)


def test_what_a_record_lacks_stops(mesh):
    with pytest.raises(InputError, match=r"^number 3: has no mask, or leave such images out with on_bad_image=skip"):
        list(pipeline.eval_batches(EVAL, Segmented(), batch_size=5, mesh=mesh, fields=MASKS))


def test_two_views_of_an_image_differ_and_are_drawn_from_its_own_generator():
    rows = pipeline.train_rows(DATA, Segmented(), 5, 7, VIEWS)
    batch = rows(3)
    views = batch["image"].reshape(5, 2, -1)
    assert (views[:, 0] != views[:, 1]).any(axis=1).all()
    np.testing.assert_allclose(batch["area"], views.mean(axis=2), rtol=1e-6)
    for row, index in enumerate(batch["index"]):
        own = read_views(Segmented()[int(index)], "", DATA, image_rng(7, 1, int(index)))
        np.testing.assert_array_equal(batch["image"][row], own["image"])


@pytest.mark.parametrize(
    "rows", [EvalRows(EVAL, Segmented(), 2, 0, 1, MASKS), TrainRows(DATA, Segmented(), 4, 0, 1, VIEWS, 5)]
)
def test_rows_reach_workers_by_pickle(rows):
    sent = pickle.loads(pickle.dumps(rows))
    assert sent.fields == rows.fields
    jax.tree.map(np.testing.assert_array_equal, sent(0), rows(0))


def test_processes_share_a_batch():
    parts = [TrainRows(DATA, Segmented(), 4, process, 2, VIEWS, 5)(1) for process in range(2)]
    joined = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
    jax.tree.map(np.testing.assert_array_equal, joined, TrainRows(DATA, Segmented(), 4, 0, 1, VIEWS, 5)(1))


def test_device_memory_holds_no_other_fields(monkeypatch):
    """Said before anything runs."""
    stage = tiny_mae()
    stage.data.resident = True
    monkeypatch.setattr(MaeTask, "fields", MASKS)
    with pytest.raises(InputError, match=r"this task reads more; set data\.resident=False"):
        make_setup(stage, "mae", {}, 40)
