import io
import json
import shutil
import warnings

import numpy as np
from PIL import Image

from tests.conftest import tiny_distill, tiny_mae
from tinymim_jax.data.fields import IMAGE_LABEL
from tinymim_jax.experiment import stage_file
from tinymim_jax.report import figures, tables
from tinymim_jax.tasks.contract import Panels
from tinymim_jax.tasks.pictures import GREY


def test_every_picture_is_written_and_is_not_blank(finished, tmp_path):
    workdir = tmp_path / "work"
    shutil.copytree(finished, workdir)
    paths = figures.write(workdir, {"stages": dict.fromkeys(("mae", "distill", "finetune")), "compare": {}})
    names = ["loss.png", "mae_mae.png", "distill_distill.png", "finetune_val_classes.png"]
    assert [p.name for p in paths] == names  # nothing was evaluated while it was trained
    for path in paths:
        assert np.asarray(Image.open(path).convert("L")).std() > 10


def stages(workdir, *names):
    return {name: stage_file.read_stage(workdir / name) for name in names}


def test_the_curve_shows_the_logged_losses(finished):
    figure = figures.loss_curves(finished, stages(finished, "mae", "distill"))
    assert [axes.get_title() for axes in figure.axes] == ["mae", "distill"]
    lines = [json.loads(line) for line in (finished / "mae" / "metrics.jsonl").read_text().splitlines()]
    drawn = figure.axes[0].get_lines()[0].get_ydata()
    np.testing.assert_array_equal(drawn, [line["loss"] for line in lines if "epoch" in line])


def test_a_stage_of_no_steps_has_no_curve(finished, tmp_path):
    (tmp_path / "mae").mkdir()
    shutil.copy(finished / "mae" / "stage.json", tmp_path / "mae")
    (tmp_path / "mae" / "metrics.jsonl").touch()
    with warnings.catch_warnings(action="error"):  # matplotlib's, of a legend without lines
        assert not figures.loss_curves(tmp_path, stages(tmp_path, "mae")).axes[0].get_lines()


def test_what_was_evaluated_while_training_is_a_curve_over_epochs(finished, tmp_path):
    for name in ("finetune", "mae"):
        (tmp_path / name).mkdir()
        shutil.copy(finished / name / "stage.json", tmp_path / name)
    lines = [{"step": 4, "epoch": 2.0, "loss": 1.0}, {"step": 8, "epoch": 4.0, "loss": 1.0}]
    # The first evaluation took longer than the four steps behind it.
    lines += [{"step": s, "val/top1": float(s), "val/top5": 50.0, "val/images": 9.0} for s in (8, 2)]
    lines += [{"step": 8, "replica0/val/top1": 7.0}]
    (tmp_path / "finetune" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    once = [{"step": 8, "epoch": 1.0, "loss": 1.0}, {"step": 8, "knn/top1_k3": 20.0}]
    (tmp_path / "mae" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in once))
    figure = figures.evaluation_curves(tmp_path, stages(tmp_path, "mae", "finetune"))
    assert [axes.get_title() for axes in figure.axes] == ["val/top1", "val/top5"]  # kNN was measured at the end alone
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].get_lines()]
    assert sorted(drawn) == [([1.0, 4.0], [2.0, 8.0]), ([4.0], [7.0])]
    (tmp_path / "finetune" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    assert figures.evaluation_curves(tmp_path, stages(tmp_path, "mae", "finetune")) is None


def test_classes_are_drawn_with_their_names():
    table = np.array([[3, 1], [0, 0]])
    figure = figures.by_class(np.array([75.0, np.nan]), table, np.array(["ant", "bee"]), "a model", "accuracy")
    bars, grid = figure.axes[:2]
    assert [bar.get_width() for bar in bars.patches] == [75.0, 0.0] and "mean 75.0 %" in bars.get_title()
    assert [label.get_text() for label in grid.get_yticklabels()] == ["ant", "bee"]
    np.testing.assert_array_equal(grid.get_images()[0].get_array(), [[75, 25], [0, 0]])
    assert bars.yaxis_inverted()  # class 0 stands at the top, as in the table beside it


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
    sides = ["teacher\nblock 2 of 3\nmean of 6 heads", "student\nblock 2 of 2\nmean of 6 heads"]
    assert panels.column_labels == ["", *[f"{kind} {side}" for kind in ("QK", "VV") for side in sides]]
    assert (len(panels.rows), panels.box) == (6, (8, 8, 8))
    maps = np.array([row[1:] for row in panels.rows])
    assert maps.shape == (6, 4, 2, 2)
    # CLS has the rest of the row.
    assert ((maps > 0) & (maps < 1)).all() and (maps.sum(axis=(2, 3)) < 1).all()


def test_panels_are_drawn_as_they_are():
    image, low, high = np.full((4, 4, 3), 0.25), np.full((2, 2), 0.1), np.full((2, 2), 0.4)
    figure = figures.drawn(Panels("a title", [[image, low, high]], ["row"], ["", "A", "B"], (2, 2, 2)), "stage")
    assert figure.get_suptitle() == "stage: a title"
    assert [axes.get_title() for axes in figure.axes[:3]] == ["", "A", "B"] and figure.axes[0].get_ylabel() == "row"
    pictures = [axes.get_images()[0] for axes in figure.axes[:3]]
    for picture, expected in zip(pictures, (image, low, high), strict=True):
        np.testing.assert_allclose(np.asarray(picture.get_array(), np.float64), expected)
    assert [picture.get_clim() for picture in pictures[1:]] == [(0, 0.4)] * 2  # one scale
    assert len(figure.axes) == 4 and figure.axes[3].get_ylim() == (0, 0.4)  # its colour bar
    assert figure.axes[0].patches[0].get_bbox().bounds == (1.5, 1.5, 2, 2)


def test_each_pair_of_maps_has_its_own_scale_and_negative_values_are_seen():
    maps = [np.full((2, 2), value) for value in (0.1, 0.4, -0.5, 0.9)]
    figure = figures.drawn(Panels("", [[np.zeros((4, 4, 3)), *maps]]), "stage")
    assert [axes.get_images()[0].get_clim() for axes in figure.axes[1:5]] == [(0, 0.4)] * 2 + [(-0.5, 0.9)] * 2


def test_a_table_keeps_to_the_characters_of_standard_output(monkeypatch):
    results = {"config": "digits", "stages": {"mae": {"loss": 0.5}}, "compare": {}}
    for encoding in ("ascii", "latin-1", "cp1252"):
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        assert "mae" in tables.text(results).encode(encoding).decode(encoding)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    assert not tables.text(results).isascii()


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
    batch = figures._samples(IMAGE_LABEL, data, Source())
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], [40, 40, 80, 120, 160, 200])
