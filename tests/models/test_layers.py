import functools
import itertools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import reference
from tinymim_jax.models import attention, layers


def normal(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def make(module, *args, seed=0):
    return reference.random_params(lambda key, x: module.init(key, x, *args[1:]), args[0], seed=seed)


def test_patchify_against_a_loop():
    images = normal(2, 6, 6, 3)
    np.testing.assert_array_equal(layers.patchify(images, 2), reference.patchify(images, 2))


def test_patchify_of_an_oblong():
    image = np.arange(2 * 4 * 3).reshape(1, 2, 4, 3)
    out = layers.patchify(image, 2)
    assert out.shape == (1, 2, 12)
    np.testing.assert_array_equal(out[0, 1], image[0, :, 2:].ravel())  # row, column, channel


def test_layer_norm():
    x = normal(4, 32, scale=1e-3)  # a variance of 1e-6: the epsilon shows
    module = layers.layer_norm(jnp.float32)
    params = make(module, x)
    reference.close(
        module.apply({"params": params}, x), reference.layer_norm(params, reference.f64(x)), 5e-6
    )  # sums of 32


def test_layer_norm_of_a_large_mean():
    # E[x^2] - E[x]^2 would lose the variance altogether.
    x = 3000 + normal(4, 256)
    out = layers.layer_norm(jnp.float32).apply({"params": {"scale": np.ones(256), "bias": np.zeros(256)}}, x)
    centred = reference.f64(x) - reference.f64(x).mean(-1, keepdims=True)
    np.testing.assert_allclose(out, centred / centred.std(-1, keepdims=True), atol=2e-3)


def test_layer_norm_statistics_in_float32():
    x = jnp.asarray(64 + normal(4, 512), jnp.bfloat16)
    module = layers.layer_norm(jnp.bfloat16)
    params = {"scale": np.ones(512, np.float32), "bias": np.zeros(512, np.float32)}
    out = module.apply({"params": params}, x)
    assert out.dtype == jnp.bfloat16
    expected = reference.layer_norm(params, reference.f64(x))
    np.testing.assert_allclose(reference.f64(out), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention(dtype):
    # Logits around 200 and close to each other: rounded to bfloat16 they would be off by up to 0.5.
    q, k, v = (normal(2, 3, 5, 4, seed=s, scale=scale) for s, scale in enumerate((1.0, 0.1, 1.0)))
    q, k, v = (jnp.asarray(x, dtype) for x in (q + 16, k + 6, v))
    out = attention.attention(q, k, v)
    assert out.dtype == dtype
    q, k, v = map(reference.f64, (q, k, v))
    expected = np.zeros(v.shape)
    for b, h in itertools.product(range(2), range(3)):
        expected[b, h] = reference.softmax(q[b, h] @ k[b, h].T / 2) @ v[b, h]
    np.testing.assert_allclose(reference.f64(out), expected, rtol=1e-4 if dtype == "float32" else 0.02, atol=2e-2)
    if dtype == "float32":
        reference.close(out, expected, 1e-4)  # logits of 200, as sums of 4, are off by up to 3e-5


def exact_attention(q, k, v, cotangent):
    """Its value and gradients in float64."""
    p = reference.softmax(q @ k.swapaxes(2, 3) * q.shape[-1] ** -0.5)
    out, dp = p @ v, cotangent @ v.swapaxes(2, 3)
    d = p * (dp - (dp * p).sum(-1, keepdims=True)) * q.shape[-1] ** -0.5
    return out, d @ k, d.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ cotangent


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("route", [attention.attention, attention._by_xla])
@pytest.mark.parametrize(
    ("heads", "n", "width", "scale"), [(3, 17, 7, 1), (5, 65, 24, 3), (2, 197, 64, 1), (1, 1025, 5, 6)]
)
def test_attention_and_its_gradient_against_float64(route, heads, n, width, scale, dtype):
    *args, cotangent = (jnp.asarray(normal(1, heads, n, width, seed=s, scale=scale), dtype) for s in range(4))

    def both(q, k, v, cotangent):
        out, pull = jax.vjp(route, q, k, v)
        return out, *pull(cotangent)

    # Logits of up to 300 are off by 2e-5 and more. On the CPU nothing but the results is rounded; elsewhere weights are.
    bound = 1e-4 + (0 if dtype == "float32" else 2**-8 if route is attention.attention else 2**-5)
    found = jax.jit(both)(*args, cotangent)
    for actual, wanted in zip(found, exact_attention(*map(reference.f64, (*args, cotangent))), strict=True):
        assert actual.dtype == dtype
        reference.close(reference.f64(actual), wanted, bound)


def heads(n, dtype="float32"):
    return [jnp.asarray(normal(2, 3, n, 8, seed=s), dtype) for s in range(3)]


def test_attention_by_cudnn_where_there_is_none():
    for call in (attention.cudnn_attention, attention._by_cudnn):
        np.testing.assert_array_equal(jax.jit(call)(*heads(5)), jax.jit(attention.attention)(*heads(5)))


def test_cudnn_that_a_gpu_is_without(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(RuntimeError, match="cuDNN"):
        jax.eval_shape(attention._by_cudnn, *heads(5, "bfloat16"))


@pytest.mark.parametrize("n", [5, 6])
def test_what_cudnn_is_asked_for(n, monkeypatch):
    """An even number of tokens; the one that is added is neither seen nor returned."""
    original, asked = jax.nn.dot_product_attention, []

    def plain(q, k, v, implementation, **lengths):
        assert implementation == "cudnn"
        asked.append((q.shape, list(lengths)))
        return original(q, k, v, implementation="xla", **lengths)

    def both(q, k, v, cotangent):
        out, pull = jax.vjp(attention._by_cudnn, q, k, v)
        return out, *pull(cotangent)

    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    args = *heads(n), jnp.asarray(normal(2, 3, n, 8, seed=3))
    for actual, wanted in zip(jax.jit(both)(*args), exact_attention(*map(reference.f64, args)), strict=True):
        reference.close(actual, wanted)
    assert asked == [((2, 6, 3, 8), ["query_seq_lengths", "key_value_seq_lengths"] if n == 5 else [])]


@pytest.mark.parametrize("replicas", [(), (2,)])
@pytest.mark.parametrize("n", [197, 50])
def test_attention_compiled_for_a_gpu_is_cudnns(n, replicas, cudnn):
    def calls(kind, platform, dtype="bfloat16"):
        def loss(*x):
            return jnp.sum(attention.ATTENTIONS[kind](*x).astype(jnp.float32) ** 2)

        args = [jax.ShapeDtypeStruct((*replicas, 2, 3, n, 64), dtype) for _ in range(3)]
        gradient = jax.grad(loss, argnums=(0, 1, 2))
        gradient = jax.vmap(gradient) if replicas else gradient
        lowered = jax.jit(gradient).trace(*args).lower(lowering_platforms=(platform,))
        return re.findall(r"__cudnn\$\w+", lowered.as_text())

    assert calls("cudnn", "cuda") == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert calls("cudnn", "cpu") == calls("xla", "cuda") == []
    with pytest.raises(NotImplementedError, match="float32"):  # which `validate` does not let come so far
        calls("cudnn", "cuda", "float32")


def test_attention_module_groups_channels_as_three_heads_width():
    x = normal(2, 5, 12)
    module = layers.Attention(num_heads=3, dtype=jnp.float32, kind="xla")
    params = make(module, x)
    assert params["qkv"]["kernel"].shape == (12, 3, 3, 4)
    assert params["qkv"]["bias"].shape == (3, 3, 4)
    out, qkv = jax.jit(module.apply)({"params": params}, x)
    expected, expected_qkv = reference.attention(params, reference.f64(x), 3)
    reference.close(out, expected)
    for actual, wanted in zip(qkv, expected_qkv, strict=True):
        assert actual.shape == (2, 5, 3, 4)
        reference.close(actual, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_and_its_derivative_against_float64(dtype):
    x = jnp.asarray(np.linspace(-9, 9, 2001), dtype)
    value, pull = jax.vjp(layers.gelu, x)
    (grad,) = pull(jnp.full_like(x, 3))
    exact = reference.f64(x)
    cdf = np.array([0.5 * math.erfc(-one / math.sqrt(2)) for one in exact])
    tolerance = {"atol": 5e-6} if dtype == "float32" else {"rtol": 2**-8, "atol": 5e-6}  # 9 rounds to 5e-7
    assert value.dtype == grad.dtype == dtype
    np.testing.assert_allclose(reference.f64(value), exact * cdf, **tolerance)
    derivative = cdf + exact * np.exp(-(exact**2) / 2) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(reference.f64(grad), 3 * derivative, **tolerance)


def test_mlp_has_the_exact_gelu():
    x = normal(2, 40, 8, scale=3.0)
    one = {"kernel": np.eye(8, dtype=np.float32), "bias": np.zeros(8, np.float32)}
    out = layers.Mlp(8, jnp.float32).apply({"params": {"fc1": one, "fc2": one}}, x)
    np.testing.assert_allclose(
        out, reference.gelu(reference.f64(x)), atol=5e-6
    )  # 12 rounds to 5e-7; the tanh form is off by 5e-4


def test_block():
    x = normal(2, 5, 12)
    module = layers.Block(4, 20, jnp.float32, "xla")
    params = make(module, x)
    out, trace = jax.jit(lambda p: module.apply({"params": p}, x))(params)
    np.testing.assert_array_equal(out, trace.out)
    for name, expected in reference.block(params, reference.f64(x), 4).items():
        reference.close(getattr(trace, name), expected)


def test_drop_path_is_per_sample_and_per_branch():
    rate, batch = 0.25, 400
    x = normal(batch, 2, 8)
    module = layers.Block(2, 8, jnp.float32, "xla")
    params = make(module, x)
    apply = jax.jit(lambda key: module.apply({"params": params}, x, rate, rngs={"drop_path": key}))
    out, trace = apply(jax.random.key(3))
    # out = x + a attn_out + b mlp_out: solve for a and b of each sample.
    factors = []
    for b in range(batch):
        branches = np.stack([np.ravel(trace.attn_out[b]), np.ravel(trace.mlp_out[b])], axis=1)
        solution, residual, *_ = np.linalg.lstsq(branches, np.ravel(out[b] - x[b]), rcond=None)
        assert residual < 1e-8  # one factor a branch for all tokens and channels
        factors.append(solution)
    factors = np.array(factors)
    kept = np.round(factors * (1 - rate))
    np.testing.assert_allclose(factors, kept / (1 - rate), atol=1e-3)  # 0, or scaled up by what is kept
    assert set(np.unique(kept)) == {0, 1}
    np.testing.assert_allclose(kept.mean(axis=0), 1 - rate, atol=0.07)  # 3 standard deviations
    both = (kept.sum(axis=1) == 2).mean()
    np.testing.assert_allclose(both, (1 - rate) ** 2, atol=0.08)  # the two branches are drawn apart
    assert not np.array_equal(out, apply(jax.random.key(4))[0])
    np.testing.assert_array_equal(out, apply(jax.random.key(3))[0])


class Plain(nn.Module):
    """Blocks as plain children."""

    heads: tuple

    @nn.compact
    def __call__(self, x, drop_path=None, capture=()):
        trace = {}
        for i, count in enumerate(self.heads, 1):
            x, trace[i] = layers.Block(count, 20, jnp.float32, "xla", name=f"block{i}")(x)
        return x, {i: trace[i] for i in capture}


class Together(nn.Module):
    heads: tuple
    remat: bool = False

    @nn.compact
    def __call__(self, x, drop_path=None, capture=()):
        blocks = [layers.Block(count, 20, jnp.float32, "xla", parent=None) for count in self.heads]
        return layers.run_blocks(self, blocks, x, drop_path, remat=self.remat, capture=capture)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_blocks_run_together_are_what_they_are_apart(remat):
    x, heads = normal(2, 5, 12), (4, 4, 2, 4)
    plain, together = Plain(heads), Together(heads, remat)
    params = together.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, plain.init(jax.random.key(0), x))

    def loss(model, params):
        out, trace = model.apply(params, x, capture=(2,))
        return (out**2).mean() + (trace[2].q ** 2).mean(), (out, trace)

    results = [jax.jit(jax.value_and_grad(functools.partial(loss, m), has_aux=True))(params) for m in (plain, together)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *results)


def test_the_initial_values_of_blocks_are_drawn_apart():
    params = Together((4, 4, 2)).init(jax.random.key(0), normal(2, 5, 12))["params"]
    kernels = [np.asarray(params[f"block{i}"]["mlp"]["fc1"]["kernel"]) for i in (1, 2, 3)]
    bound = (6 / (12 + 20)) ** 0.5
    for kernel in kernels:
        assert 0.9 * bound < np.abs(kernel).max() <= bound
        np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.15)
    for a, b in itertools.combinations(kernels, 2):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.25


def test_blocks_drop_paths_apart_and_at_their_own_rates():
    x, rates = normal(300, 1, 12), [0.0, 0.5, 0.5]
    model = Together((4, 4, 4))
    params = model.init(jax.random.key(0), x)
    apply = jax.jit(lambda key: model.apply(params, x, rates, (1, 2, 3), rngs={"drop_path": key})[1])
    trace = apply(jax.random.key(1))
    ins = {1: x, 2: trace[1].out, 3: trace[2].out}
    is_dropped = {i: np.all(np.isclose(trace[i].mid, ins[i], atol=1e-7), axis=(1, 2)) for i in trace}
    assert not is_dropped[1].any()
    for i in (2, 3):
        np.testing.assert_allclose(is_dropped[i].mean(), 0.5, atol=0.09)  # 3 standard deviations
    np.testing.assert_allclose((is_dropped[2] & is_dropped[3]).mean(), 0.25, atol=0.075)


def test_equal_blocks_are_traced_and_compiled_once_and_dead_ones_not_at_all(monkeypatch):
    x, model = normal(2, 5, 12), Together((4,) * 8)
    params = jax.jit(model.init)(jax.random.key(0), x)

    def lowered(capture=(), use=lambda out, trace: out.sum()):
        return jax.jit(lambda p: use(*model.apply(p, x, capture=capture))).lower(params)

    def erfs(text):  # a block has one
        return len(re.findall(r"chlo.erf ", text))

    assert erfs(lowered().as_text()) == 1
    assert erfs(lowered((3,)).as_text()) == 2
    dead = lowered((3,), lambda out, trace: trace[3].q.sum())
    assert erfs(dead.as_text()) == 1  # blocks 1 and 2; nothing of 3 behind its q
    calls = re.compile(r" call\(.*inlineable")
    assert len(calls.findall(lowered().compile().as_text())) == 8
    assert len(calls.findall(dead.compile().as_text())) == 2
    with layers.for_other_devices():
        assert "inlineable" not in lowered().as_text()
