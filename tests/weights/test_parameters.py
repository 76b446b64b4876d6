import numpy as np
import pytest

from tinymim_jax.weights.parameters import flatten, fold, matches, paths, shapes_of, unflatten


def test_names_of_a_tree():
    tree = {"a": {"b": np.zeros((2, 3)), "c": {"d": np.zeros(4)}}}
    assert list(flatten(tree)) == ["a/b", "a/c/d"] and unflatten(flatten(tree))["a"]["c"]["d"] is tree["a"]["c"]["d"]
    assert paths(tree) == {"a": {"b": "a/b", "c": {"d": "a/c/d"}}}
    assert shapes_of(tree) == {"a/b": (2, 3), "a/c/d": (4,)}


def test_a_regex_matches_the_whole_name():
    assert matches(("x", "a/.*"), "a/b") and not matches(("a", "b"), "a/b") and not matches((), "a")


@pytest.mark.parametrize(
    ("keys", "others", "expected"),
    [
        ([], ["a/x"], ""),
        (["a/x"], [], "a"),
        (["a/x"], ["a/y"], "a/x"),
        (["a/x", "a/y"], ["b/x"], "a"),
        (["b/x", "a/y"], ["a/x"], "b, a/y"),
        (["block1/n/s", "block1/n/b", "block2/n/s", "block2/n/b"], ["block1/q", "block2/q"], "block1-2/n"),
        ([f"block{i}/n" for i in (2, 1, 4, 7, 8)], [f"block{i}/q" for i in range(1, 9)], "block1-2+4+7-8/n"),
        ([f"e/block{i}/n" for i in range(1, 13)], ["e/head"], "e/block1-12"),
        (["ab/x"], ["a/x"], "ab"),
    ],
)
def test_fold(keys, others, expected):
    assert fold(keys, [*keys, *others]) == expected
