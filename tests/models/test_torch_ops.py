"""Each operation and its gradient against torch's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import reference
from tests.models.segment import draw, nchw, to_torch
from tests.models.test_vit import is_uniform
from tinymim_jax.models import torch_ops

torch = pytest.importorskip("torch")
F = torch.nn.functional


def compare(ours, theirs, x, rtol=2e-6):
    """Values and the gradient of x [B, H, W, C], of functions of NHWC and of NCHW."""
    wide = nchw(x)
    expected = theirs(wide)
    out, pull = jax.vjp(ours, jnp.asarray(x))
    reference.close(out, expected.detach().permute(0, 2, 3, 1), rtol)
    cotangent = draw(*out.shape, seed=9)
    expected.backward(nchw(cotangent).detach())
    reference.close(pull(jnp.asarray(cotangent))[0], wide.grad.permute(0, 2, 3, 1), rtol)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(20, 14), (3, 11), (5, 7), (1, 1)])
def test_resize(method, size):
    x = draw(2, 5, 7, 3)
    compare(
        lambda x: torch_ops.resize(x, size, method),
        lambda x: F.interpolate(x, size, mode=method, align_corners=False),
        x,
    )


def test_rows_of_a_resize_matrix():
    for method in ("bilinear", "bicubic"):
        np.testing.assert_allclose(torch_ops.resize_matrix(6, 13, method).sum(axis=1), 1)
        np.testing.assert_array_equal(torch_ops.resize_matrix(4, 4, method), np.eye(4))
    np.testing.assert_allclose(torch_ops.resize_matrix(2, 4), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])


def test_resize_in_bfloat16_stays_there_and_float32_is_exact():
    x = draw(1, 4, 4, 2)
    small = torch_ops.resize(jnp.asarray(x, jnp.bfloat16), (8, 8))
    assert small.dtype == jnp.bfloat16
    reference.close(small, torch_ops.resize(jnp.asarray(x), (8, 8)), 0.02)
    text = jax.jit(lambda x: torch_ops.resize(x, (8, 8))).lower(x).as_text()
    assert text.count("precision = [HIGHEST, HIGHEST]") == 2  # else a TPU would round to bfloat16


@pytest.mark.parametrize("bins", [1, 2, 3, 6, 9])
def test_adaptive_average_pool(bins):
    """Bins overlap where they do not divide the side, and if there are more of them than rows."""
    compare(
        lambda x: torch_ops.adaptive_average_pool(x, bins),
        lambda x: F.adaptive_avg_pool2d(x, bins),
        draw(2, 8, 7, 3),
    )


@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_max_pool(size):
    compare(torch_ops.max_pool2, lambda x: F.max_pool2d(x, 2, 2), draw(2, *size, 3))
    compare(torch_ops.max_pool2, lambda x: F.max_pool2d(x, 2, 2), draw(2, *size, 3).round())  # some are the same


def test_the_maximum_is_not_looked_for():
    """Of what XLA makes twice, with other roundings, `max` has no gradient; and what is no number is not lost."""
    tokens, kernel, factors = draw(3, 17, 32), draw(32, 32, seed=1), draw(32, seed=2)

    def pooled(pool, tokens):
        x = tokens + (tokens @ kernel + factors) * factors
        return pool(x[:, 1:].reshape(3, 4, 4, 32)).sum()

    assert np.isfinite(jax.jit(jax.grad(functools.partial(pooled, torch_ops.max_pool2)))(tokens)).all()
    x = jnp.ones((1, 2, 2, 1))
    for i, j in np.ndindex(2, 2):
        assert np.isnan(torch_ops.max_pool2(x.at[0, i, j].set(jnp.nan)))


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_conv(size, stride, use_bias):
    x, conv = draw(2, 5, 6, 3), torch_ops.Conv(4, jnp.float32, size, stride, use_bias)
    params = reference.random_params(conv.init, x)
    assert set(params) == ({"kernel", "bias"} if use_bias else {"kernel"})
    weight = to_torch(params["kernel"]).permute(3, 2, 0, 1).contiguous().requires_grad_()
    bias = to_torch(params["bias"]) if use_bias else None
    compare(lambda x: conv.apply({"params": params}, x), lambda x: F.conv2d(x, weight, bias, stride, size // 2), x)
    weight.grad = None
    (F.conv2d(nchw(x), weight, bias, stride, size // 2) ** 2).sum().backward()
    grads = jax.grad(lambda p: (conv.apply({"params": p}, x) ** 2).sum())(params)
    reference.close(grads["kernel"], weight.grad.permute(2, 3, 1, 0))


def test_up_conv():
    x, up = draw(2, 3, 4, 5), torch_ops.UpConv(6, jnp.float32)
    params = reference.random_params(up.init, x)
    theirs = torch.nn.ConvTranspose2d(5, 6, 2, 2).double()
    with torch.no_grad():
        theirs.weight.copy_(to_torch(params["kernel"]).permute(0, 3, 1, 2))
        theirs.bias.copy_(to_torch(params["bias"]))
    compare(lambda x: up.apply({"params": params}, x), theirs, x)
    theirs.zero_grad()
    (theirs(nchw(x)) ** 2).sum().backward()
    grads = jax.grad(lambda p: (up.apply({"params": p}, x) ** 2).sum())(params)
    reference.close(grads["kernel"], theirs.weight.grad.permute(0, 2, 3, 1))
    reference.close(grads["bias"], theirs.bias.grad)


def test_initial_values_are_torch_s_default():
    x = jnp.zeros((1, 2, 2, 40))
    ours = {
        "conv": (torch_ops.Conv(64, jnp.float32, 3), torch.nn.Conv2d(40, 64, 3)),
        "up": (torch_ops.UpConv(64, jnp.float32), torch.nn.ConvTranspose2d(40, 64, 2, 2)),
    }
    for module, theirs in ours.values():
        params = module.init(jax.random.key(0), x)["params"]
        bound = float(theirs.weight.detach().abs().max())  # of thousands of uniform numbers
        for name in ("kernel", "bias"):
            assert np.abs(params[name]).max() < bound * 1.001
        is_uniform(np.asarray(params["kernel"]), bound * 1.001)


def test_dropout_leaves_out_whole_channels():
    x, drop = jnp.ones((8, 4, 5, 32)), torch_ops.ChannelDropout(0.25)
    out = np.asarray(drop.apply({}, x, True, rngs={"drop_path": jax.random.key(0)}))
    assert (out == out[:, :1, :1]).all()
    np.testing.assert_allclose(np.unique(out), [0, 1 / 0.75], rtol=1e-6)
    assert abs((out == 0).mean() - 0.25) < 0.08
    np.testing.assert_array_equal(drop.apply({}, x, False), x)  # needs no rng
    np.testing.assert_array_equal(torch_ops.ChannelDropout(0.0).apply({}, x, True), x)
