import hashlib

import numpy as np
import pytest

from tinymim_jax.evals import subsets
from tinymim_jax.runtime.errors import InputError

SHA256 = {"imagenet_a": "973e8c3e530b", "imagenet_r": "a1d9a9ace309"}  # of the comma-joined indices


@pytest.mark.parametrize("name", SHA256)
def test_the_columns_are_the_published_ones(name):
    columns = subsets.columns(name).tolist()
    assert len(columns) == 200 and columns == sorted(set(columns))
    assert hashlib.sha256(",".join(map(str, columns)).encode()).hexdigest().startswith(SHA256[name])


def test_the_subsets_share_86_classes():
    assert len(set(subsets.columns("imagenet_a")) & set(subsets.columns("imagenet_r"))) == 86


def test_wnids_are_in_the_order_of_the_columns():
    wnids = subsets.imagenet_wnids()
    assert len(wnids) == 1000 and wnids == sorted(wnids)
    # Tench, goldfish, ... toilet tissue; the first class of ImageNet-A is the stingray.
    assert (wnids[0], wnids[1], wnids[6], wnids[999]) == ("n01440764", "n01443537", "n01498041", "n15075141")


def test_a_folder_s_labels_become_columns():
    wnids, columns = subsets.imagenet_wnids(), subsets.columns("imagenet_r")
    np.testing.assert_array_equal(subsets.targets("imagenet_r", tuple(wnids[c] for c in columns)), columns)
    np.testing.assert_array_equal(subsets.targets("imagenet_r", None), np.arange(1000))


@pytest.mark.parametrize("classes", [("cat",), ("n01440764",)])  # no wnid; a wnid that ImageNet-A has not
def test_an_unknown_class(classes):
    with pytest.raises(InputError, match=f"class folder '{classes[0]}' .* is no class of imagenet_a"):
        subsets.targets("imagenet_a", classes)
