import math

import numpy as np
import pytest

from tests.models import reference
from tinymim_jax.models import posembed


@pytest.mark.parametrize(("grid", "width"), [(3, 16), (14, 192)])
def test_sincos_against_a_loop(grid, width):
    table = posembed.sincos(grid, width)
    assert table.shape == (1, 1 + grid * grid, width)
    assert table.dtype == np.float32
    # Computed in float64 and rounded once: exact, not close.
    np.testing.assert_allclose(table[0], reference.sincos(grid, width).astype(np.float32), rtol=0, atol=6e-8)


def test_sincos_layout():
    width = 16
    table = posembed.sincos(2, width)[0]
    half, quarter = width // 2, width // 4
    assert not table[0].any()  # CLS
    right, below = table[2], table[3]  # patches (0, 1) and (1, 0)
    assert right[:quarter].all() and not right[half : half + quarter].any()  # first half: the column
    assert below[half : half + quarter].all() and not below[:quarter].any()  # second half: the row
    assert (right[half + quarter :] == 1).all() and (below[quarter:half] == 1).all()  # cosines follow sines
    assert right[0] == np.float32(math.sin(1)) and right[quarter] == np.float32(math.cos(1))
    assert right[1] == np.float32(math.sin(10000**-0.25))
