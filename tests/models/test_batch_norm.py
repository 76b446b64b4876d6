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


# Of maps


def maps(n, seed=0, side=(3, 5)):
    return features(n * side[0] * side[1], seed).reshape(n, *side, 6)


def test_of_maps_it_is_torch_s():
    """Values, gradients and running statistics, in training and out of it; here n is small, so that n - 1 shows."""
    torch = pytest.importorskip("torch")
    theirs, ours = torch.nn.BatchNorm2d(6).double(), BatchNorm(affine=True)
    variables = ours.init(jax.random.key(0), maps(1), False)
    assert {name: float(v.mean()) for name, v in variables["params"].items()} == {"scale": 1, "bias": 0}
    params = {"scale": np.linspace(0.5, 2, 6, dtype=np.float32), "bias": np.linspace(-1, 1, 6, dtype=np.float32)}
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(params["scale"]))
        theirs.bias.copy_(torch.tensor(params["bias"]))
    state = variables["batch_stats"]

    def apply(params, x, train=True):
        return ours.apply({"params": params, "batch_stats": state}, x, train, mutable=["batch_stats"])

    for seed, n, side in ((1, 2, (3, 5)), (2, 3, (1, 1)), (3, 2, (4, 4))):
        x = maps(n, seed, side)
        wide = torch.tensor(x).double().permute(0, 3, 1, 2).requires_grad_()
        (expected := theirs(wide)).pow(3).sum().backward()
        out, pull, found = jax.vjp(apply, params, jnp.asarray(x), has_aux=True)
        np.testing.assert_allclose(out, expected.detach().permute(0, 2, 3, 1), rtol=1e-3, atol=1e-4)
        by_params, by_x = pull(3 * out**2)
        np.testing.assert_allclose(by_params["scale"], theirs.weight.grad, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(by_params["bias"], theirs.bias.grad, rtol=1e-3, atol=1e-3)
        # The first column, which spreads by a 500th of its mean, has little left of its gradient in float32.
        np.testing.assert_allclose(by_x[..., 1:], wide.grad.permute(0, 2, 3, 1)[..., 1:], rtol=1e-2, atol=1e-2)
        theirs.zero_grad()
        state = found["batch_stats"]
        assert state["count"] == side[0] * side[1]
        np.testing.assert_allclose(state["mean"], theirs.running_mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state["var"], theirs.running_var, rtol=1e-5)
    x = maps(2, 9)
    expected = theirs.eval()(torch.tensor(x).double().permute(0, 3, 1, 2)).detach().permute(0, 2, 3, 1)
    del state["count"]  # only a merge reads it
    np.testing.assert_allclose(
        ours.apply({"params": params, "batch_stats": state}, x, False), expected, rtol=1e-4, atol=1e-5
    )


def test_bfloat16_has_statistics_in_float32():
    x = jnp.asarray(maps(4), jnp.bfloat16)
    out, state = BatchNorm().apply(BatchNorm().init(jax.random.key(0), x, False), x, True, mutable=["batch_stats"])
    assert out.dtype == jnp.bfloat16 and {a.dtype for a in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(state["batch_stats"]["mean"], 0.1 * x.astype(jnp.float32).mean((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize(("parts", "rows", "side"), [(2, 3, (3, 5)), (4, 1, (2, 2)), (3, 2, (1, 1))])
def test_parts_of_maps_leave_what_the_whole_batch_would(parts, rows, side):
    layer = BatchNorm(affine=True)
    x = maps(parts * rows, side=side)
    variables = layer.init(jax.random.key(0), x, False)
    start = {"batch_stats": {"norm": {**variables["batch_stats"], "var": np.full(6, 2.5, np.float32)}}}

    def trained(x):
        state = {"params": variables["params"], "batch_stats": start["batch_stats"]["norm"]}
        return {"batch_stats": {"norm": layer.apply(state, x, True, mutable=["batch_stats"])[1]["batch_stats"]}}

    each = [trained(part) for part in x.reshape(rows, parts, *side, 6).swapaxes(0, 1)]
    merged = batch_norm.merge(start, jax.tree.map(lambda *values: jnp.stack(values), *each), rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), merged, trained(x))
