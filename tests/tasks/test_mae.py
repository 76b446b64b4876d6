import functools

import jax
import numpy as np
import pytest

from tests.models import reference
from tests.tasks import stages
from tinymim_jax.experiment import config, recipes
from tinymim_jax.models.mae import mask_by_noise
from tinymim_jax.tasks.contract import Context

SIZES = {"patch_size": 4, "heads": (2, 2), "decoder_heads": (3,)}


@pytest.mark.parametrize(("norm_pix", "ratio"), [(True, 0.75), (False, 0.5)])
def test_loss_against_float64(norm_pix, ratio):
    task = stages.mae({"norm_pix_loss": norm_pix, "mask_ratio": ratio})
    params, _ = stages.weights(task)
    batch = stages.batch()
    rngs = stages.rngs()
    draws = task._noise(rngs["mask"], batch)
    with jax.default_matmul_precision("highest"):
        loss, aux = jax.jit(lambda p: task.loss(p, {}, {}, batch, rngs, train=True))(params)
    images = stages.normalised(batch["image"])
    pred, mask, _, _ = reference.mae(params, images, np.asarray(draws), ratio=ratio, **SIZES)
    expected = reference.mae_loss(pred, images, mask, 4, norm_pix)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert set(aux.metrics) == {"loss"}


def test_the_mask_is_anew_for_each_image_and_key():
    task = stages.mae()
    masks = [mask_by_noise(task._noise(stages.rngs(seed)["mask"], stages.batch()), 0.75)[2] for seed in (0, 1)]
    assert (np.sum(masks[0], axis=1) == 12).all()
    assert len(np.unique(masks[0], axis=0)) == 4
    assert not np.array_equal(*masks)


def test_predict_is_the_mean_of_all_normed_patch_tokens():
    batch = stages.batch()
    run = stages.standard("mae")
    out, encoder = run.predict(batch), run.params["encoder"]
    trace = reference.vit(encoder, stages.normalised(batch["image"]), 4, (2, 2))
    tokens = reference.layer_norm(encoder["norm"], trace[-1]["out"])
    reference.close(out.features, tokens[:, 1:].mean(axis=1))
    assert out.logits is None


def noise_of(seed=3):
    return np.random.default_rng(seed).uniform(size=(4, 16)).astype(np.float32)


def images_of(batch):
    return stages.normalised(batch["image"]).astype(np.float32)


def test_hidden_pixels_are_not_seen():
    run, images, draws = stages.standard("mae"), images_of(stages.batch()), noise_of()
    _, hidden = reference.random_mask(draws, 0.75)
    pixels = hidden.reshape(4, 4, 1, 4, 1, 1).repeat(4, 2).repeat(4, 4).reshape(4, 16, 16, 1).astype(np.float32)
    reconstruct = jax.jit(run.task.reconstruct)
    seen, changed = (reconstruct(run.params, x, draws) for x in (images, images + 5 * pixels))
    jax.tree.map(np.testing.assert_array_equal, seen, changed)
    assert pixels.mean() == 0.75
    np.testing.assert_array_equal(seen[1], hidden.astype(bool))


def test_bfloat16():
    exact, task = stages.standard("mae"), stages.mae(dtype="bfloat16")
    args = exact.params, images_of(stages.batch()), noise_of()
    found = jax.jit(task.reconstruct)(*args)[0]
    assert found.dtype == np.float32
    wanted = jax.jit(exact.task.reconstruct)(*args)[0]
    reference.close(found, wanted, 0.05)
    with pytest.raises(AssertionError):
        reference.close(found, wanted, 1e-4)  # it is computed in bfloat16


def test_drop_path_in_training_only():
    task = stages.mae({"decoder": config.Decoder(12, 2, 3)}, drop_path=0.9)
    params, _ = stages.weights(task)
    args = params, images_of(stages.batch()), noise_of()
    plain = jax.jit(task.reconstruct)(*args)[0]  # needs no rng
    dropping = functools.partial(task.reconstruct, train=True, rngs={"drop_path": jax.random.key(0)})
    assert not np.allclose(plain, jax.jit(dropping)(*args)[0])


@pytest.mark.parametrize("norm_pix", [True, False])
def test_panels_show_what_is_reconstructed(norm_pix):
    task, batch = stages.mae({"norm_pix_loss": norm_pix}), stages.batch(2)
    params, rngs = stages.weights(task)[0], stages.rngs()
    found = task.panels({"params": params}, {}, batch, rngs)
    first, *more = found.title.splitlines()
    assert first == "75% of the patches masked" and found.box is None
    assert ["true mean and contrast" in line for line in more] == [True] * norm_pix  # what the model did not predict
    assert found.row_labels == ["original", "masked", "reconstructed"]
    assert [[image.shape for image in row] for row in found.rows] == [[(16, 16, 3)] * 2] * 3
    original, masked, whole = (reference.patchify(np.array(row), 4) for row in found.rows)
    np.testing.assert_allclose(np.array(found.rows[0]), batch["image"] / 255, atol=1e-6)
    pred, hidden, _, _ = reference.mae(
        params, stages.normalised(batch["image"]), np.asarray(task._noise(rngs["mask"], batch)), ratio=0.75, **SIZES
    )
    hidden = hidden.astype(bool)
    assert hidden.sum() == 24
    assert (masked[hidden] == 0.5).all()
    for shown in (masked, whole):
        np.testing.assert_array_equal(shown[~hidden], original[~hidden])
    if norm_pix:  # the model tells each patch's own contrast from its mean
        pixels = reference.patchify(batch["image"] / 255, 4)
        pred = pred * pixels.std(-1, ddof=1, keepdims=True) + pixels.mean(-1, keepdims=True)
    else:
        pred = pred * np.tile(stages.STD, 16) + np.tile(stages.MEAN, 16)
    np.testing.assert_allclose(whole[hidden], pred[hidden].clip(0, 1), atol=1e-4)


def test_flops_of_the_published_model():
    # ViT-L and the 512 x 8 decoder, layer by layer, from the shapes in models_mae.py: 50 and 197 tokens.
    def blocks(n, d, depth):
        return depth * (2 * n * d * 12 * d + 4 * n * n * d)

    encoder = blocks(50, 1024, 24)
    decoder = 2 * 50 * 1024 * 512 + blocks(197, 512, 8) + 2 * 196 * 512 * 768
    embed = 2 * 49 * 768 * 1024
    task = config.Mae().build(Context(recipes.vit("large"), stages.DATA))
    np.testing.assert_allclose(task.flops_per_image(), 3 * (encoder + decoder) + 2 * embed, rtol=2e-3)
