import dataclasses
import xml.etree.ElementTree

import numpy as np
import plotly.graph_objects
import pytest
from PIL import Image

from tests.report import analyses as made
from tinymim_jax.report import analyses, figures, plots
from tinymim_jax.report.charts import Bars, Boxes, Heatmap, Lines, Pictures, Points, Series, said
from tinymim_jax.tasks.contract import Panels

SERIES = [
    Series("a", [1, 2, 3], [0.5, np.nan, 0.3], [0.1, 0.1, 0.2], "a"),
    Series("a", [1, 2, 3], [0.6, 0.5, 0.4], None, "a", is_thin=True),
    Series("b", range(40), np.linspace(1, 2, 40), None, "b", run=1),
]
CHARTS = [
    Lines("lines", "Lines", "epoch", "loss", SERIES),
    Points("points", "Points", "published, %", "here, %", ["x", "y"], [80.0, 81.0], [40.0, 44.0], [0.5, None]),
    Bars("bars", "Bars", "%", ["ant", "bee"], [75.0, 0.0], [2.0, None], (0, 100)),
    Heatmap("map", "Map", "column", "row", ["0", "1"], ["0", "1", "2"], np.arange(6.0).reshape(2, 3), "%",
            error=np.array([[0.1, np.nan, 0.2]] * 2), bottom_up=True),
    Boxes("boxes", "Boxes", "block", "pixels", ["1", "2"], [[1, 2, 3], [2, 4, 9]], 2.5, "uniform"),
]  # fmt: skip


def drawn(chart):
    return figures.draw(chart).axes[0]


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.key)
def test_a_chart_is_a_png_and_an_svg_and_plotly_takes_it(chart, tmp_path):
    png, svg = figures.save([chart], tmp_path)
    assert (png.name, svg.name) == (f"{chart.key}.png", f"{chart.key}.svg")
    assert np.asarray(Image.open(png).convert("L")).std() > 10  # not blank
    assert xml.etree.ElementTree.fromstring(svg.read_text()).tag.endswith("svg")
    before = svg.read_bytes()
    figures.save([chart], tmp_path)
    assert svg.read_bytes() == before
    plotly.graph_objects.Figure(plots.plot(chart))  # raises on a property that plotly does not have
    assert chart.title in said(chart)


def test_lines_have_one_colour_a_group_and_one_entry_in_the_legend():
    axes = drawn(CHARTS[0])
    colours = [line.get_color() for line in axes.get_lines() if len(line.get_xdata()) > 2]
    assert len(set(colours)) == 2 and [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    traces = plots.plot(CHARTS[0])["data"]
    assert [trace["showlegend"] for trace in traces] == [True, False, True]
    one, same, other = (trace["line"]["color"] for trace in traces)
    assert one == same != other
    assert traces[0]["y"] == [0.5, None, 0.3] and traces[0]["error_y"]["array"] == [0.1, 0.1, 0.2]
    assert traces[0]["line"]["dash"] != traces[2]["line"]["dash"]  # another run


def test_a_chart_without_lines_has_no_legend(recwarn):
    assert drawn(Lines("none", "none", "epoch", "loss", [])).get_legend() is None
    assert not recwarn.list  # matplotlib's, of a legend without lines


def test_values_are_drawn_where_they_are():
    bars = drawn(CHARTS[2])
    assert [bar.get_width() for bar in bars.patches] == [75.0, 0.0] and bars.yaxis_inverted()
    trace, layout = (plots.plot(CHARTS[2])[part] for part in ("data", "layout"))
    assert trace[0]["x"] == [75.0, 0.0] and layout["yaxis"]["range"] == [1.5, -0.5]  # the first at the top
    for chart, is_up in ((CHARTS[3], True), (dataclasses.replace(CHARTS[3], bottom_up=False), False)):
        heatmap, plot = drawn(chart), plots.plot(chart)
        np.testing.assert_array_equal(heatmap.get_images()[0].get_array(), chart.values)
        assert heatmap.yaxis_inverted() is not is_up
        assert plot["data"][0]["z"] == [[0, 1, 2], [3, 4, 5]]
        assert plot["layout"]["yaxis"]["autorange"] == (True if is_up else "reversed")
    assert plot["data"][0]["customdata"][1] == [["1", "0", " ± 0.100"], ["1", "1", ""], ["1", "2", " ± 0.200"]]
    boxes = drawn(CHARTS[4])
    assert [line.get_ydata()[0] for line in boxes.get_lines() if line.get_linestyle() == "--"] == [2.5]
    assert [trace["y"] for trace in plots.plot(CHARTS[4])["data"][:2]] == [[1, 2, 3], [2, 4, 9]]


def test_odd_names_are_drawn_as_they_stand(tmp_path, recwarn):
    names = [r"$\nothing$", "x" * 200]
    chart = Heatmap("odd", r"$\odd$", "$", "a $ and $", names, names, np.eye(2), "$%$")
    axes = drawn(chart)
    assert [label.get_text() for label in axes.get_yticklabels()] == [names[0], "x" * 33 + "..."]
    assert len(figures.save([chart, dataclasses.replace(CHARTS[2], key="bars2", names=names)], tmp_path)) == 4
    assert not recwarn.list  # matplotlib's, of axes without room


def test_plotly_shows_tags_in_names_as_they_stand():
    drawn = plots.plot(Lines("k", "t", "<b>x</b>", "y", [Series("<a href='https://x'>a</a>", [1], [2])]))
    assert drawn["data"][0]["name"] == "&lt;a href='https://x'&gt;a&lt;/a&gt;"
    assert drawn["data"][0]["hovertemplate"] == "%{y:.4g} at &lt;b&gt;x&lt;/b&gt; %{x:.4g}"


def test_the_sentence_about_many_values_is_short():
    chart = Bars("k", "t", "%", [f"class {i}" for i in range(1000)], np.arange(1000.0))
    assert "class 19 19, and 980 more." in said(chart) and "class 20" not in said(chart)


def test_panels_are_drawn_as_they_are():
    image, low, high = np.full((4, 4, 3), 0.25), np.full((2, 2), 0.1), np.full((2, 2), 0.4)
    panels = Panels("a title", [[image, low, high]], ["row"], ["", "A", "B"], (2, 2, 2), [["", "0.5", ""]])
    figure = figures.draw(Pictures("key", "stage", {}, {(): panels}))
    assert figure.get_suptitle() == "stage: a title"
    assert [axes.get_title() for axes in figure.axes[:3]] == ["", "A", "B"] and figure.axes[0].get_ylabel() == "row"
    assert figure.axes[1].get_xlabel() == "0.5"
    pictures = [axes.get_images()[0] for axes in figure.axes[:3]]
    for picture, expected in zip(pictures, (image, low, high), strict=True):
        np.testing.assert_allclose(np.asarray(picture.get_array(), np.float64), expected)
    assert [picture.get_clim() for picture in pictures[1:]] == [(0, 0.4)] * 2  # one scale
    assert len(figure.axes) == 4 and figure.axes[3].get_ylim() == (0, 0.4)  # its colour bar
    assert figure.axes[0].patches[0].get_bbox().bounds == (1.5, 1.5, 2, 2)


def test_each_pair_of_maps_has_its_own_scale_and_negative_values_are_seen():
    maps = [np.full((2, 2), value) for value in (0.1, 0.4, -0.5, 0.9)]
    scales = list(Panels("", []).scales([np.zeros((4, 4, 3)), *maps]))
    assert scales == [([1, 2], (0.0, 0.4)), ([3, 4], (-0.5, 0.9))]


@pytest.mark.parametrize("kind", made.ALL)
def test_every_analysis_can_be_drawn_twice(kind, tmp_path):
    arrays = {name: np.asarray(value) for name, value in made.ALL[kind]().items()}
    charts = analyses.analysis_charts(arrays, kind)
    files = figures.save(charts, tmp_path)
    assert len(files) == sum(1 if isinstance(chart, Pictures) else 2 for chart in charts)
    for chart in charts:
        if not isinstance(chart, Pictures):
            plotly.graph_objects.Figure(plots.plot(chart))
