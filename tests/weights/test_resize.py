import math

import numpy as np
import pytest

from tinymim_jax.weights.resize import resize


def cubic(x, a=-0.75):
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resized(image, new):
    """[g, g, D] -> [new, new, D], pixel by pixel: 16 neighbours, the border repeated, half-pixel centres."""
    old = len(image)
    out = np.zeros((new, new, image.shape[-1]))
    for i in range(new):
        for j in range(new):
            y, x = (i + 0.5) * old / new - 0.5, (j + 0.5) * old / new - 0.5
            for r in range(math.floor(y) - 1, math.floor(y) + 3):
                for c in range(math.floor(x) - 1, math.floor(x) + 3):
                    pixel = image[min(max(r, 0), old - 1), min(max(c, 0), old - 1)]
                    out[i, j] += cubic(y - r) * cubic(x - c) * pixel
    return out


@pytest.mark.parametrize(("old", "new"), [(14, 32), (14, 12), (3, 7), (4, 1)])
def test_resize_against_a_loop(old, new):
    table = np.random.default_rng(0).normal(size=(1, 1 + old * old, 2)).astype(np.float32)
    out = resize(table, new)
    assert out.shape == (1, 1 + new * new, 2)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out[:, 0], table[:, 0])  # CLS is kept
    expected = resized(table[0, 1:].reshape(old, old, 2).astype(np.float64), new)
    np.testing.assert_allclose(out[0, 1:].reshape(new, new, 2), expected, atol=1e-6)


def test_resize_to_the_same_grid_changes_nothing():
    table = np.random.default_rng(0).normal(size=(1, 26, 4)).astype(np.float32)
    np.testing.assert_array_equal(resize(table, 5), table)


def test_resize_of_a_constant_is_constant():
    np.testing.assert_allclose(resize(np.full((1, 10, 1), 3.0), 8), 3.0, rtol=1e-12)
