import json
import shutil
import warnings

import numpy as np
from PIL import Image

from tests.conftest import tiny_distill, tiny_mae
from tinymim_jax.data.fields import IMAGE_LABEL
from tinymim_jax.report import figures, tables
from tinymim_jax.tasks.contract import Panels
from tinymim_jax.tasks.mae import GREY


def test_every_picture_is_written_and_is_not_blank(finished, tmp_path):
    workdir = tmp_path / "work"
    shutil.copytree(finished, workdir)
    paths = figures.write(workdir, ["mae", "distill", "finetune"])
    assert [p.name for p in paths] == ["loss.png", "mae_mae.png", "distill_distill.png"]
    for path in paths:
        assert np.asarray(Image.open(path).convert("L")).std() > 10


def test_the_curve_shows_the_logged_losses(finished):
    figure = figures.loss_curves(finished, ["mae", "distill"])
    assert [axes.get_title() for axes in figure.axes] == ["mae", "distill"]
    lines = [json.loads(line) for line in (finished / "mae" / "metrics.jsonl").read_text().splitlines()]
    drawn = figure.axes[0].get_lines()[0].get_ydata()
    np.testing.assert_array_equal(drawn, [line["loss"] for line in lines if "epoch" in line])


def test_a_stage_of_no_steps_has_no_curve(finished, tmp_path):
    (tmp_path / "mae").mkdir()
    shutil.copy(finished / "mae" / "stage.json", tmp_path / "mae")
    (tmp_path / "mae" / "metrics.jsonl").touch()
    with warnings.catch_warnings(action="error"):  # matplotlib's, of a legend without lines
        assert not figures.loss_curves(tmp_path, ["mae"]).axes[0].get_lines()


def test_a_reconstruction_differs_from_the_original_in_the_masked_patches_only(finished):
    panels = figures.panels_of(tiny_mae(), "mae", finished)
    assert panels.row_labels == ["original", "masked", "reconstructed"]
    original, masked, reconstructed = np.array(panels.rows)
    assert original.shape == (6, 16, 16, 3)
    is_grey = (masked == GREY).all(axis=-1)
    assert is_grey.reshape(6, 2, 8, 2, 8).all(axis=(2, 4)).sum() == 6 * 3  # 3 of 4 patches
    np.testing.assert_array_equal(original[~is_grey], reconstructed[~is_grey])
    assert (original[is_grey] != reconstructed[is_grey]).mean() > 0.5


def test_relation_maps_are_the_rows_of_the_boxed_patch(finished):
    panels = figures.panels_of(tiny_distill(), "distill", finished)
    assert panels.column_labels == ["", "QK teacher", "QK student", "VV teacher", "VV student"]
    assert (len(panels.rows), panels.box) == (6, (8, 8, 8))
    maps = np.array([row[1:] for row in panels.rows])
    assert maps.shape == (6, 4, 2, 2)
    # CLS has the rest of the row.
    assert ((maps > 0) & (maps < 1)).all() and (maps.sum(axis=(2, 3)) < 1).all()


def test_panels_are_drawn_as_they_are():
    image, low, high = np.full((4, 4, 3), 0.25), np.full((2, 2), 0.1), np.full((2, 2), 0.4)
    figure = figures.drawn(Panels("a title", [[image, low, high]], ["row"], ["", "A", "B"], (2, 2, 2)), "stage")
    assert figure.get_suptitle() == "stage: a title"
    assert [axes.get_title() for axes in figure.axes] == ["", "A", "B"] and figure.axes[0].get_ylabel() == "row"
    pictures = [axes.get_images()[0] for axes in figure.axes]
    for picture, expected in zip(pictures, (image, low, high), strict=True):
        np.testing.assert_allclose(np.asarray(picture.get_array(), np.float64), expected)
    assert [picture.get_clim() for picture in pictures[1:]] == [(0, 0.4)] * 2  # one scale
    assert figure.axes[0].patches[0].get_bbox().bounds == (1.5, 1.5, 2, 2)


def test_the_table_names_everything():
    row = {"mean": 84.0, "stderr": 2.31, "values": [80.0, 84.0, 88.0]}
    results = {
        "config": "digits",
        "stages": {"mae_l": {"loss": 0.47321, "knn/top1_k10": 86.4}, "untrained": {"knn/top1_k10": 54.0}},
        "compare": {"T": {"metric": "val/top1", "rows": {"chain": row, "one": {**row, "stderr": None}}}},
    }
    text = tables.text(results)
    for word in ("mae_l", "0.4732", "knn/top1_k10 86.40", "untrained", "T (val/top1)", "84.00", "2.31", "3"):
        assert word in text


def test_a_picture_takes_the_next_image_where_one_is_damaged():
    class Source:
        def __len__(self):
            return 12

        def __getitem__(self, index):
            if index in (0, 1):
                return {"image": b"damaged", "label": 0}
            return {"image": np.full((8, 8, 3), 20 * index, np.uint8), "label": 0}

        def describe(self, index):
            return f"image {index}"

    data = tiny_mae().data
    batch = figures._samples(IMAGE_LABEL.batch(data, figures.NUM_PICTURES), data, Source())
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], [40, 40, 80, 120, 160, 200])
