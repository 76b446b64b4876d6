import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import reference
from tests.models.test_vit import flat, is_normal, is_uniform, pictures
from tinymim_jax.experiment import config, recipes
from tinymim_jax.models import mae, posembed
from tinymim_jax.runtime import codec

TINY = config.ViT(24, 2, 3, image_size=16, patch_size=4)
DECODER = config.Decoder(16, 2, 4)
COUNTS = {"base": 111_907_840, "large": 329_541_888}


@functools.cache
def make(ratio=0.75, **changes):
    cfg = config.ViT(**{**codec.to_dict(TINY), **changes})
    model = cfg, config.Mae(decoder=DECODER, mask_ratio=ratio).build()
    return model, reference.random_params(model.init, pictures(), noise())


@functools.cache
def compiled(model, train=False):
    return jax.jit(lambda p, x, z, key: model.apply({"params": p}, x, z, train=train, rngs={"drop_path": key}))


def run(model, params, images, draws, train=False):
    with jax.default_matmul_precision("highest"):
        return compiled(model, train)(params, images, draws, jax.random.key(0))


def noise(batch=2, patches=16, seed=0):
    return np.random.default_rng(seed).uniform(size=(batch, patches)).astype(np.float32)


@pytest.mark.parametrize("size", COUNTS)
def test_number_of_parameters(size):
    model = recipes.vit(size), config.Mae().build()
    args = jax.ShapeDtypeStruct((1, 224, 224, 3), "float32"), jax.ShapeDtypeStruct((1, 196), "float32")
    params = jax.eval_shape(model.init, jax.random.key(0), *args)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == COUNTS[size]
    shapes = {name: leaf.shape for name, leaf in flat(params["decoder"]).items()}
    width = recipes.vit(size).width
    assert shapes["mask_token"] == (1, 1, 512)
    assert shapes["pos_embed"] == (1, 197, 512)
    assert shapes["embed/kernel"] == (width, 512)
    assert shapes["block8/mlp/fc1/kernel"] == (512, 2048)
    assert shapes["block8/attn/qkv/kernel"] == (512, 3, 16, 32)
    assert shapes["pred/kernel"] == (512, 768)


def test_cudnn_attends_in_the_decoder_too(cudnn):
    model = mae.build(
        config.ViT(32, 1, 4, image_size=16, patch_size=4, dtype="bfloat16", attention="cudnn"),
        config.Mae(decoder=config.Decoder(16, 2, 2)),
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), pictures(), noise())
    text = jax.jit(model.apply).trace(shapes, pictures(), noise()).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") == 1 + 2


def test_initial_values_of_the_decoder():
    model = config.ViT(32, 1, 4, image_size=32, patch_size=8), config.Mae(decoder=config.Decoder(64, 1, 4)).build()
    params = jax.jit(model.init)(jax.random.key(0), pictures(size=32), noise())["params"]["decoder"]
    params = {name: np.asarray(value) for name, value in flat(params).items()}
    fans = {"embed": 32 + 64, "pred": 64 + 192, "block1/attn/qkv": 4 * 64, "block1/attn/proj": 2 * 64}
    for name, fan in {**fans, "block1/mlp/fc1": 5 * 64, "block1/mlp/fc2": 5 * 64}.items():
        is_uniform(params.pop(f"{name}/kernel"), (6 / fan) ** 0.5)
    is_normal(params.pop("mask_token"), 0.02, tolerance=0.35)
    np.testing.assert_array_equal(params.pop("pos_embed"), posembed.sincos(4, 64))
    for name, value in params.items():
        assert name.endswith(("/scale", "/bias")), name
        assert (value == name.endswith("/scale")).all(), name


@pytest.mark.parametrize(("patches", "ratio", "kept"), [(196, 0.75, 49), (16, 0.75, 4), (16, 0.6, 6), (49, 0.5, 24)])
def test_mask_by_noise(patches, ratio, kept):
    values = noise(3, patches)
    keep, restore, is_masked = mae.mask_by_noise(values, ratio)
    expected, mask = reference.random_mask(values, ratio)
    assert keep.shape == (3, kept)
    np.testing.assert_array_equal(keep, expected)
    np.testing.assert_array_equal(is_masked, mask.astype(bool))
    assert is_masked.dtype == bool
    # restore: where patch l is in the shuffled order.
    order = np.argsort(values, axis=1)
    np.testing.assert_array_equal(
        np.take_along_axis(order, np.asarray(restore), axis=1), np.tile(np.arange(patches), (3, 1))
    )


@pytest.mark.parametrize("ratio", [0.75, 0.5])
def test_against_float64(ratio):
    model, params = make(ratio)
    images, draws = pictures(), noise()
    out = run(model, params, images, draws)
    sizes = {"patch_size": 4, "heads": (3, 3), "decoder_heads": (4, 4)}
    pred, mask, tokens, _ = reference.mae(params, images, draws, ratio=ratio, **sizes)
    reference.close(out.pred, pred)
    reference.close(out.encoded.tokens, tokens)
    np.testing.assert_array_equal(out.is_masked, mask.astype(bool))
    assert out.pred.shape == (2, 16, 48)


def test_masked_pixels_are_not_seen():
    model, params = make()
    images, draws = pictures(), noise()
    _, mask = reference.random_mask(draws, 0.75)
    other = images + 5 * mask.reshape(2, 4, 1, 4, 1, 1).repeat(4, 2).repeat(4, 4).reshape(2, 16, 16, 1).astype(
        np.float32
    )
    np.testing.assert_array_equal(run(model, params, images, draws).pred, run(model, params, other, draws).pred)
    assert (other != images).mean() == 0.75


def test_bfloat16():
    model, params = make(dtype="bfloat16")
    out = run(model, params, pictures(), noise())
    assert out.pred.dtype == jnp.float32
    assert out.encoded.tokens.dtype == jnp.bfloat16
    reference.close(out.pred, run(*make(), pictures(), noise()).pred, 0.05)


def test_drop_path_is_only_in_training_and_not_in_the_decoder():
    model, params = make(drop_path=0.9)
    plain = run(*make(), pictures(), noise())
    np.testing.assert_array_equal(run(model, params, pictures(), noise()).pred, plain.pred)
    dropped = run(model, params, pictures(), noise(), train=True)
    assert not np.allclose(plain.pred, dropped.pred)
    restore = mae.mask_by_noise(noise(), 0.75)[1]
    again = jax.jit(model.decoder.apply)({"params": params["decoder"]}, dropped.encoded.tokens, restore)
    np.testing.assert_allclose(dropped.pred, again, rtol=1e-4, atol=1e-5)
