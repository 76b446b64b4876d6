import numpy as np
import pytest

from tests.report import analyses as made
from tinymim_jax.report import analyses, figures, images, plots
from tinymim_jax.runtime.errors import InputError


def charts(kind):
    arrays = {name: np.asarray(value) for name, value in made.ALL[kind]().items()}
    return arrays, {chart.key: chart for chart in analyses.analysis_charts(arrays, "a stage x")}


def test_cka_has_the_first_layer_of_model_1_at_the_bottom():
    arrays, found = charts("cka")
    chart = found["a_stage_x"]
    assert (chart.rows, chart.columns) == (["block0", "norm"], ["block0", "block1", "norm"])
    assert (chart.y_label, chart.x_label) == ("layers of one", "layers of other")
    assert (chart.high, chart.bottom_up) == (1.0, True)
    np.testing.assert_array_equal(chart.values, arrays["cka"])


def test_cka_of_a_model_with_itself():
    arrays = {name: np.asarray(value) for name, value in made.cka(models=["one"]).items()}
    (chart,) = analyses.analysis_charts(arrays, "x")
    assert (chart.y_label, chart.x_label) == ("layers of one", "layers of one")


def test_attention_is_a_box_a_block_over_heads():
    arrays, found = charts("attention")
    assert list(found) == ["a_stage_x_distance", "a_stage_x_entropy"]
    chart = found["a_stage_x_distance"]
    np.testing.assert_array_equal(chart.values, arrays["distance"])
    assert (chart.names, chart.level, chart.y_label) == (["1", "2", "3"], 18.2, "distance, pixels")
    assert (found["a_stage_x_entropy"].level, found["a_stage_x_entropy"].y_label) == (2.77, "entropy, nats")


def test_a_choice_of_relation_maps_shows_that_one():
    arrays, found = charts("relation")
    pictures, kl = found["a_stage_x_maps"], found["a_stage_x_kl"]
    assert list(pictures.axes.values()) == [["1", "2"], ["5 → 6"], ["qk", "vv"], ["1", "2", "3"]]
    panels = pictures.grids[1, 0, 1, 2]
    expected = [arrays["images"][1], arrays["teacher"][1, 0, 1, 2], arrays["student"][1, 0, 1, 2]]
    for image, value in zip(panels.rows[0], expected, strict=True):
        np.testing.assert_allclose(image, value / 255, atol=1e-6)
    assert f"KL {arrays['kl'][0, 1, 2]:.3g}" in panels.column_labels[2]
    assert kl.rows == ["5 → 6 qk", "5 → 6 vv"]
    np.testing.assert_array_equal(kl.values, arrays["kl"][0])


def test_spectra_are_bars_and_neighbours_rows():
    _, found = charts("spectrum")
    assert [list(chart.values) for chart in found.values()] == [[3.0, 7.5], [1.0, 2.0]]
    arrays, found = charts("neighbours")
    (panels,) = found["a_stage_x"].grids.values()
    assert panels.captions == [["", "0.90", "0.80", "0.70"], ["", "0.60", "0.50", "0.40"]]
    np.testing.assert_allclose(panels.rows[1][2], arrays["nearest"][1, 1] / 255)


def test_classes_are_drawn_with_their_names():
    arrays = {"per_class": [75.0, np.nan], "confusion": [[3, 1], [0, 0]], "classes": ["ant", "bee"]}
    bars, grid = analyses.analysis_charts({name: np.array(value) for name, value in arrays.items()}, "a model")
    assert (bars.names, plots.plain(bars.values)) == (["ant", "bee"], [75.0, None]) and "mean 75.0 %" in bars.title
    assert bars.names == grid.rows == grid.columns and not grid.bottom_up
    np.testing.assert_array_equal(grid.values, [[75, 25], [0, 0]])


def test_arrays_of_no_analysis_have_no_charts():
    assert analyses.analysis_charts({"logits": np.zeros(3)}, "x") == []
    assert analyses.analysis_charts({"kind": np.array("of tomorrow")}, "x") == []


def test_blocks_with_fewer_heads_have_boxes():
    arrays = {name: np.asarray(value) for name, value in made.attention().items()}
    arrays["distance"][:2, 2:] = np.nan  # as they are stored
    chart = analyses.analysis_charts(arrays, "x")[0]
    medians = [line.get_ydata()[0] for line in figures.draw(chart).axes[0].get_lines()[4::6]]
    expected = [np.median(arrays["distance"][block, :2]) for block in (0, 1)]
    np.testing.assert_allclose(medians, [*expected, np.median(arrays["distance"][2])])


def test_each_image_of_relation_maps_is_stored_once():
    _, found = charts("relation")
    stored = images.pictures(found["a_stage_x_maps"], images.Room(10**6))
    assert len(stored["images"]) == 2 + 2 * 2 * 2 * 3  # and a map of each side, image, relation and head


def test_relations_without_images_have_no_maps():
    arrays = {name: np.asarray(value) for name, value in made.relation(images=0).items()}
    assert [chart.key for chart in analyses.analysis_charts(arrays, "x")] == ["x_kl"]


def test_a_damaged_file(tmp_path):
    made.save(tmp_path)
    whole = (tmp_path / "cka.npz").read_bytes()
    for content in (b"", b"x", whole[:100], whole[:-30], whole[:200] + b"\0" * 100 + whole[300:]):
        (tmp_path / "cka.npz").write_bytes(content)
        with pytest.raises(InputError, match=r"cka.npz is damaged \(\w+\); evaluate again$"):
            analyses.read(tmp_path / "cka.npz")
