"""What files state beside their weights, against what they were written with."""

from pathlib import Path

import pytest

from tinymim_jax.bridge import stated
from tinymim_jax.bridge.files import Source


def source(settings, form="huggingface"):
    return Source(Path("m/model.safetensors"), form, {}, settings, {})


@pytest.mark.parametrize(
    "settings",
    [
        {"id2label": {"1": "dog", "0": "zebra", "2": "ant"}},
        {"label_names": ["zebra", "dog", "ant"]},
        {"pretrained_cfg": {"label_names": ["zebra", "dog", "ant"]}},
        {"labels": ["zebra", "dog", "ant"]},
        {"classes": ["zebra", "dog", "ant"], "made_by": "tinymim_jax"},
    ],
)
def test_names_keep_the_order_of_the_outputs(settings):
    notes = []
    assert stated.classes(source(settings), 3, notes) == ["zebra", "dog", "ant"]
    assert notes == ["classes: zebra, dog, ant, as the file says"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}, "does not name"),
        ({}, "does not name"),
        ({"id2label": {"0": "a", "1": "b"}}, "not 3 different ones"),
        ({"label_names": ["a", "a", "b"]}, "not 3 different ones"),
        ({"id2label": {"0": "a", "1": "b", "7": "c"}}, "not 3 different ones"),
    ],
)
def test_names_that_are_no_names_are_said(settings, said):
    notes = []
    assert stated.classes(source(settings), 3, notes) is None
    assert said in notes[0]


def test_without_a_head_nothing_is_named():
    notes = []
    assert stated.classes(source({"id2label": {"0": "LABEL_0", "1": "b"}}), 0, notes) is None
    assert notes == []
