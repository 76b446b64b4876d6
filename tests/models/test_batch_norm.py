import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinymim_jax.models import batch_norm
from tinymim_jax.models.batch_norm import BatchNorm

EPSILON = 1e-3


def features(n, seed=0):
    """Columns far from zero, whose variances a one-pass formula would lose."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, 6)) * [0.01, 1, 3, 1, 5, 2] + [5, 0, 2, -3, 7, 0]).astype(np.float32)


def train(state, x):
    return BatchNorm(EPSILON).apply(state, x, True, mutable=["batch_stats"])


def test_it_is_torch_s():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.BatchNorm1d(6, affine=False, eps=EPSILON)
    state = BatchNorm(EPSILON).init(jax.random.key(0), features(4), False)
    for seed, n in enumerate((2, 9, 32)):
        out, state = train(state, features(n, seed))
        np.testing.assert_allclose(out, theirs(torch.tensor(features(n, seed))), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(state["batch_stats"]["mean"], theirs.running_mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state["batch_stats"]["var"], theirs.running_var, rtol=1e-5)
    out = BatchNorm(EPSILON).apply(state, features(5, 9), False)
    np.testing.assert_allclose(out, theirs.eval()(torch.tensor(features(5, 9))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("parts", "rows"), [(2, 8), (4, 3), (5, 1)])
def test_parts_leave_what_the_whole_batch_would(parts, rows):
    start = {"batch_stats": {"mean": np.arange(6, dtype=np.float32), "var": np.full(6, 2.5, np.float32)}}
    x = features(parts * rows)
    _, whole = train(start, x)
    each = [train(start, part)[1] for part in x.reshape(rows, parts, 6).swapaxes(0, 1)]
    merged = batch_norm.merge(start, jax.tree.map(lambda *values: jnp.stack(values), *each), rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), merged, whole)


def test_a_model_without_it_has_nothing_to_merge():
    assert batch_norm.merge({}, {}, 4) == {}
