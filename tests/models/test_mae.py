"""The decoder and the masks; the whole auto-encoder is tested as a task."""

import jax
import numpy as np
import pytest

from tests.models import reference
from tests.models.test_vit import flat, is_normal, is_uniform
from tinymim_jax.experiment import recipes
from tinymim_jax.experiment.config import Decoder, ViT
from tinymim_jax.models import mae, posembed
from tinymim_jax.runtime.errors import InputError

COUNTS = {"base": 111_907_840 - 85_798_656, "large": 329_541_888 - 303_301_632}  # of the MAE less its encoder


def noise(batch=2, patches=16, seed=0):
    return np.random.default_rng(seed).uniform(size=(batch, patches)).astype(np.float32)


def arguments(encoder, kept=4, batch=2):
    tokens = np.random.default_rng(1).normal(size=(batch, encoder.num_prefix + kept, encoder.width))
    return tokens.astype(np.float32), mae.mask_by_noise(noise(batch), 0.75)[1]


@pytest.mark.parametrize("size", COUNTS)
def test_number_of_parameters(size):
    encoder = recipes.vit(size)
    args = jax.ShapeDtypeStruct((1, 50, encoder.width), "float32"), jax.ShapeDtypeStruct((1, 196), "int32")
    params = jax.eval_shape(Decoder().build(encoder).init, jax.random.key(0), *args)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == COUNTS[size]
    shapes = {name: leaf.shape for name, leaf in flat(params).items()}
    assert shapes["mask_token"] == (1, 1, 512)
    assert shapes["pos_embed"] == (1, 197, 512)
    assert shapes["embed/kernel"] == (encoder.width, 512)
    assert shapes["block8/mlp/fc1/kernel"] == (512, 2048)
    assert shapes["block8/attn/qkv/kernel"] == (512, 3, 16, 32)
    assert shapes["pred/kernel"] == (512, 768)


def test_cudnn_attends_in_the_decoder_too(cudnn):
    encoder = ViT(32, 1, 4, image_size=16, patch_size=4, dtype="bfloat16", attention="cudnn")
    decoder, args = Decoder(16, 2, 2).build(encoder), arguments(encoder)
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), *args)
    text = jax.jit(decoder.apply).trace(shapes, *args).lower(lowering_platforms=("cuda",)).as_text()
    assert reference.times_called(text, "__cudnn$fmhaSoftmax") == 2


def test_initial_values():
    encoder = ViT(32, 1, 4, image_size=32, patch_size=8)
    decoder = Decoder(64, 1, 4).build(encoder)
    params = jax.jit(decoder.init)(jax.random.key(0), *arguments(encoder))["params"]
    params = {name: np.asarray(value) for name, value in flat(params).items()}
    fans = {"embed": 32 + 64, "pred": 64 + 192, "block1/attn/qkv": 4 * 64, "block1/attn/proj": 2 * 64}
    for name, fan in {**fans, "block1/mlp/fc1": 5 * 64, "block1/mlp/fc2": 5 * 64}.items():
        is_uniform(params.pop(f"{name}/kernel"), (6 / fan) ** 0.5)
    is_normal(params.pop("mask_token"), 0.02, tolerance=0.35)
    np.testing.assert_array_equal(params.pop("pos_embed"), posembed.sincos(4, 64))
    for name, value in params.items():
        assert name.endswith(("/scale", "/bias")), name
        assert (value == name.endswith("/scale")).all(), name


def test_decoders_that_cannot_be_built():
    encoder = ViT(32, 1, 4, dtype="bfloat16", attention="cudnn")
    for decoder in (Decoder(18, 1, 2), Decoder(16, 1, 3)):
        with pytest.raises(InputError, match=r"task\.decoder: width 1\d must be a multiple of 4 and of its num_heads"):
            decoder.check("task.decoder", encoder)
    with pytest.raises(InputError, match=r"task\.decoder: attention 'cudnn' takes .* 4 heads are 4 wide"):
        Decoder(16, 1, 4).check("task.decoder", encoder)
    Decoder(16, 1, 2).check("task.decoder", encoder)


def test_a_permutation_and_its_gradient():
    x, order = np.random.default_rng(0).normal(size=(2, 16, 3)).astype(np.float32), arguments(ViT(8, 1, 1))[1]
    weights = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    def plain(x):
        return (weights * np.take_along_axis(x, np.asarray(order)[..., None], axis=1)).sum()

    value, gradient = jax.value_and_grad(lambda x: (weights * mae.permute(x, order)).sum())(x)
    np.testing.assert_allclose(value, plain(x), rtol=1e-5)
    expected = np.zeros_like(x)
    for b, i in np.ndindex(2, 16):
        expected[b, order[b, i]] += weights[b, i]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


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
