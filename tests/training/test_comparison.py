import pytest

from tinymim_jax.report import curves, tables, workdir
from tinymim_jax.training.chain import ordered, pace

ROWS = {name: {"mean": mean, "stderr": 0.2, "values": [mean]} for name, mean in (("a", 1.0), ("b", 3.0), ("c", 2.9))}


def found(correlation, clear, agree, contradicted):
    return {"rank_correlation": correlation, "clear": clear, "agree": agree, "contradicted": contradicted}


@pytest.mark.parametrize(
    ("paper", "expected"),
    [
        ({"a": 70.0, "b": 80.0, "c": 75.0}, found(1.0, 2, 2, [])),  # b and c are not told apart
        ({"a": 80.0, "b": 70.0, "c": 75.0}, found(-1.0, 2, 0, [["b", "a"], ["c", "a"]])),
        ({"a": 75.0, "b": 70.0, "c": 80.0}, found(-0.5, 2, 1, [["b", "a"]])),
        ({"a": 70.0, "b": 70.0, "c": 80.0}, found(pytest.approx(0.0), 1, 1, [])),  # nor, in the paper, a and b
        ({"a": 70.0, "b": 80.0}, {}),
        ({"a": 70.0, "b": 70.0, "c": 70.0}, {}),
        ({}, {}),
    ],
)
def test_agreement_with_the_paper(paper, expected):
    assert ordered(ROWS, paper) == expected


def test_a_row_of_one_run_is_told_apart_from_none():
    rows = {**ROWS, "b": {**ROWS["b"], "stderr": None}}
    assert ordered(rows, {"a": 70.0, "b": 80.0, "c": 75.0}) == found(1.0, 1, 1, [])


def compared(paper):
    return {"config": "study", "stages": {}, "compare": {"T 7": {"metric": "val/top1", "rows": ROWS, "paper": paper,
                                                               **ordered(ROWS, paper)}}}  # fmt: skip


def test_the_paper_stands_beside_ours():
    results = compared({"a": 75.0, "b": 70.0, "c": 80.0})
    said = tables.text(results)
    for part in ("its place", "80.0", "rank correlation with the paper: -0.50; 1 of the 2 pairs", "not so: b > a"):
        assert part in " ".join(said.split())
    assert "| b | 3.00 | 0.20 | 1 | 1 | 70.0 | 3 |" in tables.markdown(results)
    assert "| c | 2.90 | 0.20 | 1 | 2 | 80.0 | 1 |\n\nrank correlation" in tables.markdown(results)


def run(paper):
    return workdir.Run("study", None, {}, [], compared(paper)["compare"], {}, set(), [])


def test_ours_are_drawn_against_the_paper_or_alone():
    (chart,) = curves.comparisons([run({"a": 75.0, "b": 70.0, "c": 80.0})])
    assert (chart.key, chart.title) == ("compare_t_7", "T 7, rank correlation -0.50")
    assert (chart.names, chart.x) == (["b", "a", "c"], [70.0, 75.0, 80.0])
    assert [chart.y, chart.error] == [[ROWS[name][what] for name in "bac"] for what in ("mean", "stderr")]
    (bars,) = curves.comparisons([run({})])
    assert (list(bars.names), bars.values) == (list(ROWS), [row["mean"] for row in ROWS.values()])
    two = curves.comparisons([run({}), run({})])
    assert [chart.title for chart in two] == ["T 7 · study"] * 2


def test_how_long_those_that_are_left_will_take():
    work = {"a": 1e9, "b": 3e9, "c": 2e9}
    assert pace(work, work, 0.0) == "stage 1 of 3"
    assert pace(work, {"b": 3e9, "c": 2e9}, 60.0) == "stage 2 of 3, about 5 min left"
    assert pace(work, {"c": 2e9}, 12_000.0) == "stage 3 of 3, about 1 h 40 min left"
    for small in (0.0, 0.05):  # too little to tell
        assert pace({"a": small, "b": 1.0}, {"b": 1.0}, 5.0) == "stage 2 of 2"
