import pytest

from tinymim_jax.report import tables
from tinymim_jax.training.chain import ranked

ROWS = {name: {"mean": mean, "stderr": 0.5, "values": [mean]} for name, mean in (("a", 1.0), ("b", 3.0), ("c", 2.0))}


@pytest.mark.parametrize(
    ("paper", "expected"),
    [
        ({"a": 70.0, "b": 80.0, "c": 75.0}, {"rank_correlation": 1.0}),
        ({"a": 80.0, "b": 70.0, "c": 75.0}, {"rank_correlation": -1.0}),
        ({"a": 70.0, "b": 75.0, "c": 80.0}, {"rank_correlation": 0.5}),
        ({"a": 70.0, "b": 80.0}, {}),
        ({"a": 70.0, "b": 70.0, "c": 70.0}, {}),
        ({}, {}),
    ],
)
def test_rank_correlation_with_the_paper(paper, expected):
    assert ranked(ROWS, paper) == pytest.approx(expected)


def test_the_paper_stands_beside_ours():
    paper = {"a": 70.0, "b": 80.0, "c": 75.0}
    compared = {"metric": "val/top1", "rows": ROWS, "paper": paper, **ranked(ROWS, paper)}
    said = tables.text({"config": "study", "stages": {}, "compare": {"T": compared}})
    assert "paper" in said and "80.0" in said and "rank correlation with the paper: 1.00" in said
