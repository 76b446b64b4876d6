import dataclasses
import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import reference
from tinymim_jax.experiment import recipes
from tinymim_jax.experiment.config import Optim, ViT
from tinymim_jax.models import layers, posembed
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.weights.parameters import matches

TINY = ViT(24, 3, 3, last_block_heads=6, image_size=16, patch_size=4)
HEADS = (3, 3, 6)
COUNTS = {"tiny": 5_524_416, "small": 21_665_664, "base": 85_798_656, "large": 303_301_632, "huge": 630_764_800}


def pictures(batch=2, seed=0, size=16):
    return np.random.default_rng(seed).normal(size=(batch, size, size, 3)).astype(np.float32)


def flat(tree):
    return flax.traverse_util.flatten_dict(tree, sep="/")


def shapes(cfg):
    images = jax.ShapeDtypeStruct((1, cfg.image_size, cfg.image_size, 3), "float32")
    return flat(jax.eval_shape(cfg.build().init, jax.random.key(0), images)["params"])


@functools.cache
def make(**changes):
    """A tiny model and parameters that are all far from their initial values."""
    model = dataclasses.replace(TINY, **changes).build()
    return model, reference.random_params(model.init, pictures())


@functools.cache
def compiled(model, capture):
    return jax.jit(lambda p, x, keep: model.apply({"params": p}, x, capture=capture, keep=keep))


def run(model, params, images, *, capture=(), keep=None):
    with jax.default_matmul_precision("highest"):
        return compiled(model, capture)(params, images, keep)


# Sizes


def test_no_size_is_untested():
    assert recipes.SIZES.keys() == COUNTS.keys()


@pytest.mark.parametrize("size", COUNTS)
def test_number_of_parameters(size):
    leaves = shapes(recipes.vit(size))
    assert sum(leaf.size for leaf in leaves.values()) == COUNTS[size]
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype("float32")}


def test_number_of_parameters_does_not_depend_on_heads():
    sizes = [sum(leaf.size for leaf in shapes(recipes.vit("base", last_block_heads=h)).values()) for h in (None, 16)]
    assert sizes == [COUNTS["base"]] * 2


def test_shapes():
    leaves = {name: leaf.shape for name, leaf in shapes(recipes.vit("base", last_block_heads=16)).items()}
    assert leaves["pos_embed"] == (1, 197, 768)
    assert leaves["cls_token"] == (1, 1, 768)
    assert leaves["patch_embed/kernel"] == (768, 768)
    assert leaves["block11/attn/qkv/kernel"] == (768, 3, 12, 64)
    assert leaves["block12/attn/qkv/kernel"] == (768, 3, 16, 48)
    assert leaves["block12/attn/qkv/bias"] == (3, 16, 48)
    assert leaves["block1/mlp/fc1/kernel"] == (768, 3072)
    assert "block13/norm1/scale" not in leaves
    assert shapes(recipes.vit("huge"))["pos_embed"].shape == (1, 257, 1280)


# Initial values


def test_initial_values():
    cfg = ViT(96, 2, 3, image_size=32, patch_size=16, num_classes=300)
    model = cfg.build()
    params = {
        k: np.asarray(v) for k, v in flat(jax.jit(model.init)(jax.random.key(0), pictures(size=32))["params"]).items()
    }
    d, p = 96, 16 * 16 * 3
    fans, kernels = {"patch_embed": (p, d)}, {}
    for i in (1, 2):
        fans |= {f"block{i}/attn/qkv": (d, 3 * d), f"block{i}/attn/proj": (d, d)}  # qkv as one [3D, D] matrix
        fans |= {f"block{i}/mlp/fc1": (d, 4 * d), f"block{i}/mlp/fc2": (4 * d, d)}
    for name, fan in fans.items():
        kernels[name] = params.pop(f"{name}/kernel")
        is_uniform(kernels[name], (6 / sum(fan)) ** 0.5)
    is_uniform(params.pop("patch_embed/bias"), p**-0.5)  # torch's default for a convolution
    is_normal(params.pop("cls_token"), 0.02, tolerance=0.35)
    is_normal(params.pop("head/kernel"), 2e-5)
    np.testing.assert_array_equal(params.pop("pos_embed"), posembed.sincos(2, d))
    for name, value in params.items():
        assert name.endswith(("/scale", "/bias")), name
        assert (value == name.endswith("/scale")).all(), name
    assert not np.array_equal(kernels["block1/attn/proj"], kernels["block2/attn/proj"])


def test_initial_values_of_deit():
    """timm: normal of std 0.02 for linear layers, heads, tokens and positions; the patch embedding as torch has it."""
    cfg = ViT(96, 2, 3, image_size=32, patch_size=16, num_classes=300, weight_init="deit", posembed="trainable")
    drawn = jax.jit(cfg.build().init)(jax.random.key(0), pictures(size=32))["params"]
    params = {name: np.asarray(value) for name, value in flat(drawn).items()}
    for name in ("kernel", "bias"):
        is_uniform(params.pop(f"patch_embed/{name}"), (16 * 16 * 3) ** -0.5)
    is_normal(params.pop("cls_token"), 0.02, tolerance=0.35)
    is_normal(params.pop("pos_embed"), 0.02, tolerance=0.15)
    for name in [name for name in params if name.endswith("/kernel")]:
        is_normal(params.pop(name), 0.02)
    for name, value in params.items():
        assert name.endswith(("/scale", "/bias")), name
        assert (value == name.endswith("/scale")).all(), name


def test_fixed_positions_are_never_drawn():
    model = dataclasses.replace(TINY, depth=1, last_block_heads=None, weight_init="deit").build()
    params = jax.jit(model.init)(jax.random.key(1), pictures())["params"]
    np.testing.assert_array_equal(params["pos_embed"], posembed.sincos(4, 24))


def is_uniform(values, bound):
    few = values.size < 1000
    assert np.abs(values).max() <= bound
    assert np.abs(values).max() > bound * (0.9 if few else 0.99)
    np.testing.assert_allclose(values.std(), bound / 3**0.5, rtol=0.2 if few else 0.03)
    assert abs(values.mean()) < bound * 5 / values.size**0.5
    assert (values < 0).any() and (values > 0).any()


def is_normal(values, std, tolerance=0.03):
    np.testing.assert_allclose(values.std(), std, rtol=tolerance)
    assert abs(values.mean()) < 4 * std / values.size**0.5
    assert np.abs(values).max() > 2 * std


# Forward pass


def test_every_tensor_against_float64():
    model, params = make()
    images = pictures()
    out = run(model, params, images, capture=(1, 2, 3))
    expected = reference.vit(params, images, 4, HEADS)
    assert list(out.trace) == [1, 2, 3]
    for i, wanted in enumerate(expected, 1):
        for name, value in wanted.items():
            reference.close(getattr(out.trace[i], name), value)
    reference.close(out.tokens, reference.layer_norm(params["norm"], expected[-1]["out"]))
    assert out.logits is None
    assert out.trace[2].q.shape == (2, 17, 3, 8) and out.trace[3].q.shape == (2, 17, 6, 4)


def test_keep_sees_only_some_patches():
    model, params = make()
    images = pictures()
    keep = np.array([[3, 11, 0, 7], [15, 2, 9, 1]])
    out = run(model, params, images, capture=(1, 3), keep=keep)
    expected = reference.vit(params, images, 4, HEADS, keep)
    reference.close(out.tokens, reference.layer_norm(params["norm"], expected[-1]["out"]))
    reference.close(out.trace[1].q, expected[0]["q"])


def test_mlp_ratio():
    model, params = make(mlp_ratio=1.5)
    assert params["block1"]["mlp"]["fc1"]["kernel"].shape == (24, 36)
    images = pictures()
    reference.close(
        run(model, params, images, capture=(3,)).trace[3].out, reference.vit(params, images, 4, HEADS)[-1]["out"]
    )


def test_only_captured_blocks_are_traced():
    model, params = make()
    for capture in ((), (2,), [3, 1]):
        out = jax.eval_shape(functools.partial(model.apply, capture=capture), {"params": params}, pictures())
        assert list(out.trace) == sorted(capture)


def test_pool_cls():
    model, params = make(num_classes=5)
    images = pictures()
    out = run(model, params, images)
    tokens = reference.layer_norm(params["norm"], reference.vit(params, images, 4, HEADS)[-1]["out"])
    reference.close(out.tokens, tokens)
    reference.close(out.logits, reference.linear(params["head"], tokens[:, 0]))
    assert "fc_norm" not in params


def test_pool_mean():
    model, params = make(num_classes=5, pool="mean")
    images = pictures()
    out = run(model, params, images)
    tokens = reference.vit(params, images, 4, HEADS)[-1]["out"]
    reference.close(out.tokens, tokens)  # not normed
    pooled = reference.layer_norm(params["fc_norm"], tokens[:, 1:].mean(axis=1))  # CLS is left out
    reference.close(out.logits, reference.linear(params["head"], pooled))
    assert "norm" not in params


def test_no_head_no_head_parameters():
    assert not {"head", "fc_norm"} & make()[1].keys()
    assert not {"head", "fc_norm", "norm"} & make(pool="mean")[1].keys()


def test_trainable_positions_start_as_the_fixed_ones():
    model = dataclasses.replace(TINY, depth=1, posembed="trainable").build()
    params = jax.jit(model.init)(jax.random.key(1), pictures())["params"]
    np.testing.assert_array_equal(params["pos_embed"], posembed.sincos(4, 24))


def test_layer_scale_multiplies_both_branches():
    """The same as kernels and biases in front of it that are multiplied by it; it is never decayed."""
    model, params = make(layer_scale=0.3)
    fresh = flat(jax.jit(model.init)(jax.random.key(0), pictures())["params"])
    names = {f"block{i}/gamma{j}/scale" for i in (1, 2, 3) for j in (1, 2)}
    assert names == {name for name in fresh if "gamma" in name}
    assert all((fresh[name] == np.float32(0.3)).all() and fresh[name].shape == (24,) for name in names)
    assert all(matches(Optim(lr=1.0).no_decay, f"encoder/{name}") for name in names)
    out = run(model, params, pictures(), capture=(1, 2, 3))
    folded = jax.tree.map(np.copy, params)
    for i in (1, 2, 3):
        for gamma, layer in (("gamma1", ("attn", "proj")), ("gamma2", ("mlp", "fc2"))):
            scale = folded[f"block{i}"].pop(gamma)["scale"]
            for value in folded[f"block{i}"][layer[0]][layer[1]].values():
                value *= scale
    expected = reference.vit(folded, pictures(), 4, HEADS)
    for i, wanted in enumerate(expected, 1):
        for name, value in wanted.items():
            reference.close(getattr(out.trace[i], name), value)
    assert dataclasses.replace(TINY, layer_scale=0.3).summary() == f"{TINY.summary()}, layer scale"
    assert dataclasses.replace(TINY, layer_scale=0.3).export_formats == ("hf", "mae")


# Errors


@pytest.mark.parametrize("block", [0, 4, -1])
def test_capture_of_a_block_that_is_not_there(block):
    model, params = make()
    with pytest.raises(InputError, match=f"block {block} is beyond the model's 3 blocks"):
        model.apply({"params": params}, pictures(), capture=(1, block))


@pytest.mark.parametrize("shape", [(2, 20, 16, 3), (2, 16, 20, 3), (2, 3, 16, 16)])
def test_wrong_image_size(shape):
    model, params = make()
    with pytest.raises(InputError, match=r"the model wants \[B, 16, 16, 3\]"):
        model.apply({"params": params}, np.zeros(shape, np.float32))


def test_images_that_are_not_normalised():
    model, params = make()
    with pytest.raises(InputError, match="images are uint8, the model wants floats"):
        model.apply({"params": params}, np.zeros((2, 16, 16, 3), np.uint8))


def test_capture_of_a_number():
    model, params = make()
    with pytest.raises(InputError, match=r"capture is 3; it is a sequence of blocks, e\.g\. \(3,\)"):
        model.apply({"params": params}, pictures(), capture=3)


# Drop path


def branch_factors(model, images):
    """a, b of out = x + a attn_out + b mlp_out, per block and sample: [depth, B, 2]."""
    params = reference.random_params(model.init, images)

    @jax.jit
    def traced(p, x):
        out = model.apply({"params": p}, x, capture=range(1, 4), train=True, rngs={"drop_path": jax.random.key(5)})
        return model.apply({"params": p}, x, capture=(1,)).trace[1], out.trace

    clean, trace = traced(params, images)
    x = clean.out - clean.attn_out - clean.mlp_out  # what enters block 1
    factors = []
    for i in range(1, 4):
        t = trace[i]
        samples = zip(t.attn_out, t.mlp_out, t.out - x, strict=True)
        factors.append(
            [
                np.linalg.lstsq(np.stack([np.ravel(a), np.ravel(m)], 1), np.ravel(y), rcond=None)[0]
                for a, m, y in samples
            ]
        )
        x = t.out
    return np.array(factors)


def test_constant_drop_path_spares_the_last_block():
    factors = branch_factors(make(drop_path=0.5)[0], pictures(64))
    np.testing.assert_allclose(factors[2], 1, atol=1e-3)
    for i in (0, 1):
        np.testing.assert_allclose(np.unique(factors[i].round(2)), [0, 2])


def test_linear_drop_path_ramps_from_0():
    factors = branch_factors(make(drop_path=0.5, drop_path_shape="linear")[0], pictures(64))
    np.testing.assert_allclose(factors[0], 1, atol=1e-3)
    np.testing.assert_allclose(np.unique(factors[1].round(2)), [0, 1.33], rtol=1e-6)  # 1 / (1 - 0.25)
    np.testing.assert_allclose(np.unique(factors[2].round(2)), [0, 2])
    # Drawn anew in every block.
    assert not np.array_equal(factors[1] > 0, factors[2] > 0)


def test_linear_drop_path_of_a_single_block():
    model = dataclasses.replace(TINY, depth=1, drop_path=0.5, drop_path_shape="linear").build()
    params = reference.random_params(model.init, pictures())
    # No rng: there is nothing to draw.
    out = jax.jit(lambda p, x: model.apply({"params": p}, x, train=True).tokens)(params, pictures())
    np.testing.assert_array_equal(out, run(model, params, pictures()).tokens)


def test_no_drop_path_outside_training():
    model, params = make(drop_path=0.5)
    out = run(model, params, pictures(), capture=(1, 2, 3)).tokens  # needs no rng
    np.testing.assert_array_equal(out, run(make()[0], params, pictures(), capture=(1, 2, 3)).tokens)


# Remat, attention and dtype


@pytest.mark.parametrize("remat", [False, True])
def test_cudnn_attends_in_every_block_on_a_gpu(remat, cudnn):
    fields = {"width": 48, "num_heads": 6, "depth": 3, "last_block_heads": 3, "dtype": "bfloat16", "remat": remat}
    model, params = make(**fields, attention="cudnn")
    plain, _ = make(**fields)
    np.testing.assert_array_equal(run(model, params, pictures()).tokens, run(plain, params, pictures()).tokens)

    def calls(model):
        gradient = jax.jit(jax.grad(lambda p: model.apply({"params": p}, pictures()).tokens.sum()))
        text = gradient.trace(params).lower(lowering_platforms=("cuda",)).as_text()
        return [reference.times_called(text, f"__cudnn$fmhaSoftmax{end}") for end in ("", "Backward")]

    assert calls(model) == [6 if remat else 3, 3]
    assert calls(plain) == [0, 0]


def test_remat_changes_neither_values_nor_gradients():
    results = []
    for remat in (False, True):
        model, params = make(remat=remat, drop_path=0.3, depth=2)

        def loss(p, model=model):
            rngs = {"drop_path": jax.random.key(1)}
            out = model.apply({"params": p}, pictures(), capture=(1,), train=True, rngs=rngs)
            return (out.tokens**3).mean() + (out.trace[1].v ** 2).mean()

        text = str(jax.make_jaxpr(loss)(params))
        assert ("remat" in text or "checkpoint" in text) == remat
        results.append((jax.tree.structure(params), jax.jit(jax.value_and_grad(loss))(params)))
    (plain_tree, plain), (remat_tree, again) = results
    assert plain_tree == remat_tree  # the same names
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, again)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_bfloat16(pool):
    model, params = make(dtype="bfloat16", num_classes=5, pool=pool)
    fresh = jax.eval_shape(model.init, jax.random.key(0), pictures())
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    out = run(model, params, pictures(), capture=(1, 3))
    assert {leaf.dtype for leaf in jax.tree.leaves((out.tokens, out.trace))} == {jnp.dtype("bfloat16")}
    assert out.logits.dtype == jnp.float32
    exact = run(make(num_classes=5, pool=pool)[0], params, pictures())
    reference.close(out.tokens, exact.tokens, 0.05)
    reference.close(out.logits, exact.logits, 0.05)
    with pytest.raises(AssertionError):
        reference.close(out.tokens, exact.tokens, 1e-4)  # it is computed in bfloat16


def test_images_of_any_float_type():
    model, params = make()
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), "bfloat16")
    assert jax.eval_shape(model.apply, {"params": params}, images).tokens.dtype == jnp.float32


@pytest.mark.parametrize("weight_init", ["mae", "deit"])
def test_blocks_are_traced_once_in_all_calls(weight_init):
    model, params = make(depth=2, weight_init=weight_init)
    counts = []
    for _ in range(3):
        model.apply({"params": params}, pictures())
        counts.append(layers._apply_jitted._cache_size())
    assert len(set(counts)) == 1
