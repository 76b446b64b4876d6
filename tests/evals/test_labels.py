"""Which output a label means: by name, by number, by position, or nobody can say."""

import numpy as np
import pytest

from tinymim_jax.evals import labels
from tinymim_jax.evals.subsets import imagenet_wnids
from tinymim_jax.runtime.errors import InputError


@pytest.mark.parametrize(
    ("head", "data", "columns", "said"),
    [
        (["zebra", "ant", "dog"], ("ant", "dog", "zebra"), [1, 2, 0], "labels go by the names of the classes"),
        (["Great_Dane", "pug dog"], ("great dane", "Pug_dog"), [0, 1], "go by the names"),
        (["zebra", "ant", "dog"], ("dog", "zebra"), [2, 0], "2 of 3"),
        ([str(i) for i in (3, 1, 0, 2)], tuple("0123"), [2, 1, 3, 0], "go by the names"),  # before the number
        (["b", "B"], ("B", "b"), [1, 0], "go by the names"),  # where case tells them apart
        (None, tuple(sorted(map(str, range(12)))), [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9], "are the numbers"),
        (None, ("00", "01", "02"), [0, 1, 2], "are the numbers"),
        (["zebra", "ant"], ("0", "1"), [0, 1], "are the numbers"),
        (None, ("1", "2", "10"), None, "cannot be compared: output 0 of the model is taken to be '1'"),
        (None, ("ant", "dog"), None, "cannot be compared: output 0 of the model is taken to be 'ant'"),
        (["tench, Tinca tinca", "goldfish"], ("n01440764", "n01443537"), None, "cannot be compared"),
        (["crane", "pug", "crane"], ("pug",), [1], "1 of 3"),  # ImageNet has two kinds of cranes
        (["a", "b"], None, None, "does not name its classes"),
        (None, (), None, "does not name its classes"),
    ],
)
def test_how_a_label_finds_its_output(head, data, columns, said):
    found, text = labels.match(head, data, len(head or data or ()), "the data")
    assert (found if found is None else found.tolist()) == columns
    assert said in text


@pytest.mark.parametrize(
    ("head", "data", "outputs", "message"),
    [
        (["ant", "dog"], ("ant", "cat"), 2, r"tree/val has classes that are not the model's \('cat'\)"),
        (["ant", "dog"], ("ant", "cat", "dog"), 2, "'cat'"),
        (None, ("ant", "cat", "dog"), 2, "tree/val has 3 classes and the model 2"),
        (None, ("0", "1", "2"), 5, "has 3 classes and the model 5"),
        (None, tuple(f"n{i:08}" for i in range(1000)), 1000, "1000 wnids that are not ImageNet's"),
    ],
)
def test_classes_that_the_model_has_not(head, data, outputs, message):
    with pytest.raises(InputError, match=message):
        labels.match(head, data, outputs, "tree/val")


@pytest.mark.parametrize(
    ("head", "data", "columns", "said"),
    [
        (["sky", "road", "tree"], ("tree", "Sky", "road"), [2, 0, 1], "go by their names, which are in another order"),
        (["Sky", "traffic_light"], ("sky", "traffic light"), None, "classes go by their names"),
        (["building", "bed "], ("building, edifice", "bed"), None, "output 0 of it is taken to be 'building, edifice'"),
        (["plate", "screen", "screen"], ("plate", "screen", "crt screen"), None, "output 0 of it"),  # as mmseg's ADE20K
    ],
)
def test_how_a_class_of_masks_finds_its_output(head, data, columns, said):
    found, text = labels.order(head, data, "tree")
    assert (found if found is None else found.tolist()) == columns
    assert said in text


def test_classes_of_masks_that_would_be_mixed_up():
    with pytest.raises(
        InputError, match="tree: class 'road' is number 0 there and 1 of the model's, whose other names"
    ):
        labels.order(["sky", "road", "tree"], ("road", "sky", "car"), "tree")


def test_imagenet_has_an_order():
    wnids = tuple(imagenet_wnids())
    assert labels.match(None, wnids, 1000, "val") == (None, "labels are ImageNet's, in the order of the wnids")
    shuffled = [wnids[i] for i in np.random.default_rng(0).permutation(1000)]
    columns, _ = labels.match(shuffled, wnids, 1000, "val")
    assert [shuffled[i] for i in columns] == list(wnids)
