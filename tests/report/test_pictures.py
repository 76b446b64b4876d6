import dataclasses

import jax
import numpy as np
import pytest

from tests.conftest import tiny_distill, tiny_mae
from tinymim_jax.data.fields import IMAGE_LABEL
from tinymim_jax.report import pictures
from tinymim_jax.runtime import sharding
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import Panels
from tinymim_jax.tasks.pictures import GREY


def test_a_reconstruction_differs_from_the_original_in_the_masked_patches_only(finished):
    panels = pictures.panels_of(tiny_mae(), "mae", finished)
    assert panels.row_labels == ["original", "masked", "reconstructed"]
    original, masked, reconstructed = np.array(panels.rows)
    assert original.shape == (6, 16, 16, 3)
    is_grey = (masked == GREY).all(axis=-1)
    assert is_grey.reshape(6, 2, 8, 2, 8).all(axis=(2, 4)).sum() == 6 * 3  # 3 of 4 patches
    np.testing.assert_array_equal(original[~is_grey], reconstructed[~is_grey])
    assert (original[is_grey] != reconstructed[is_grey]).mean() > 0.5


def test_relation_maps_are_the_rows_of_the_boxed_patch(finished):
    panels = pictures.panels_of(tiny_distill(), "distill", finished)
    sides = ["teacher\nblock 2 of 3\nmean of 6 heads", "student\nblock 2 of 2\nmean of 6 heads"]
    assert panels.column_labels == ["", *[f"{kind} {side}" for kind in ("QK", "VV") for side in sides]]
    assert (len(panels.rows), panels.box) == (6, (8, 8, 8))
    maps = np.array([row[1:] for row in panels.rows])
    assert maps.shape == (6, 4, 2, 2)
    # CLS has the rest of the row.
    assert ((maps > 0) & (maps < 1)).all() and (maps.sum(axis=(2, 3)) < 1).all()


def test_samples_are_columns_where_rows_are_labelled_and_else_rows():
    images = [[np.full((2, 2, 3), 10 * i + j) for j in range(3)] for i in range(2)]
    whole, *apart = pictures.choices(Panels("t", images, ["original", "masked"]))
    assert whole.rows is images
    assert [[image[0, 0, 0] for image in one.rows[0]] for one in apart] == [[0, 10], [1, 11], [2, 12]]
    assert [one.column_labels for one in apart] == [["original", "masked"]] * 3
    _, *apart = pictures.choices(Panels("t", images, [], ["image", "truth", "said"], (0, 0, 1)))
    assert [[image[0, 0, 0] for image in one.rows[0]] for one in apart] == [[0, 1, 2], [10, 11, 12]]
    assert {(tuple(one.column_labels), one.box) for one in apart} == {(("image", "truth", "said"), (0, 0, 1))}


def test_images_that_cannot_be_read_are_left_out_where_training_does_so():
    class Source:
        classes, notes = None, ()

        def __len__(self):
            return 12

        def __getitem__(self, index):
            image = b"damaged" if index in (0, 4) else np.full((8, 8, 3), 20 * index, np.uint8)
            return {"image": image, "label": 0}

        def describe(self, index):
            return f"image {index}"

    data = dataclasses.replace(tiny_mae().data, on_bad_image="skip")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    batch = pictures._samples(IMAGE_LABEL, data, Source(), mesh)
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], [40, 120, 160, 200])
    with pytest.raises(InputError, match="image 0"):
        pictures._samples(IMAGE_LABEL, dataclasses.replace(data, on_bad_image="stop"), Source(), mesh)
