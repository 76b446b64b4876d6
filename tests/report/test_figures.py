import json

import numpy as np
import pytest
from PIL import Image

from tests.conftest import tiny_distill, tiny_mae
from tinymim_jax.experiment import config, stage_file
from tinymim_jax.report import figures
from tinymim_jax.training import chain as chain_lib


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    chain_lib.run_chain(config.Config("tiny", {"mae": tiny_mae(), "distill": tiny_distill()}), folder)
    return folder


def test_every_picture_is_written_and_is_not_blank(workdir):
    paths = figures.write(workdir, ["mae", "distill"])
    assert [p.name for p in paths] == ["loss.png", "mae_mae.png", "distill_distill.png"]
    for path in paths:
        assert np.asarray(Image.open(path).convert("L")).std() > 10


def test_the_curve_shows_the_logged_losses(workdir):
    figure = figures.loss_curves(workdir, ["mae", "distill"])
    assert [axes.get_title() for axes in figure.axes] == ["mae", "distill"]
    lines = [json.loads(line) for line in (workdir / "mae" / "metrics.jsonl").read_text().splitlines()]
    drawn = figure.axes[0].get_lines()[0].get_ydata()
    np.testing.assert_array_equal(drawn, [line["loss"] for line in lines if "epoch" in line])


def images_of(axes):
    return np.asarray(axes.get_images()[0].get_array(), np.float64)


def test_a_reconstruction_differs_from_the_original_in_the_masked_patches_only(workdir):
    figure = figures.reconstructions(stage_file.read_stage(workdir / "mae"), "mae", workdir)
    original, masked, reconstructed = np.array([images_of(a) for a in figure.axes]).reshape(3, 6, 16, 16, -1)
    is_grey = (masked == figures.GREY).all(axis=-1)
    assert is_grey.reshape(6, 2, 8, 2, 8).all(axis=(2, 4)).sum() == 6 * 3  # 3 of 4 patches
    np.testing.assert_array_equal(original[~is_grey], reconstructed[~is_grey])
    assert (original[is_grey] != reconstructed[is_grey]).mean() > 0.5


def test_relation_maps_are_the_rows_of_the_boxed_patch(workdir):
    figure = figures.relation_maps(stage_file.read_stage(workdir / "distill"), "distill", workdir)
    assert [a.get_title() for a in figure.axes[1:5]] == ["QK teacher", "QK student", "VV teacher", "VV student"]
    maps = np.array([images_of(axes) for axes in figure.axes[1:5]])
    assert maps.shape == (4, 2, 2)
    assert ((maps > 0) & (maps < 1)).all() and (maps.sum(axis=(1, 2)) < 1).all()  # CLS has the rest of the row


def test_the_table_names_everything():
    row = {"mean": 84.0, "stderr": 2.31, "values": [80.0, 84.0, 88.0]}
    results = {
        "config": "digits",
        "stages": {"mae_l": {"loss": 0.47321, "knn/top1_k10": 86.4}, "untrained": {"knn/top1_k10": 54.0}},
        "compare": {"T": {"metric": "val/top1", "rows": {"chain": row, "one": {**row, "stderr": None}}}},
    }
    text = figures.table(results)
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

    _, images = figures._samples(tiny_mae(), Source())
    np.testing.assert_allclose(images[:, 0, 0, 0] * 255, [40, 40, 80, 120, 160, 200])
