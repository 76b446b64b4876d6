import functools

import jax
import numpy as np
import pytest

from tests.models import reference
from tests.tasks import stages


def noise(monkeypatch, size=4):
    draws = np.random.default_rng(3).uniform(size=(size, 16)).astype(np.float32)
    calls = []
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, *a: calls.append((key, shape)) or draws)
    return draws, calls


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_against_float64(norm_pix, monkeypatch):
    task = stages.mae({"norm_pix_loss": norm_pix})
    params, _ = stages.weights(task)
    batch = stages.batch()
    draws, calls = noise(monkeypatch)
    rngs = stages.rngs()
    # A new function, so that it is traced with the given noise.
    with jax.default_matmul_precision("highest"):
        loss, aux = jax.jit(lambda p: task.loss(p, {}, {}, batch, rngs, train=True))(params)
    assert [shape for _, shape in calls] == [(4, 16)]
    assert calls[0][0] is rngs["mask"]
    images = stages.normalised(batch["image"])
    pred, mask, _, _ = reference.mae(params, images, draws, patch_size=4, ratio=0.75, heads=(2, 2), decoder_heads=(3,))
    expected = reference.mae_loss(pred, images, mask, 4, norm_pix)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert set(aux.metrics) == {"loss"}


def test_the_mask_is_anew_for_each_image_and_key():
    run = stages.standard("mae")
    apply = jax.jit(functools.partial(run.task.reconstruct, train=False))
    masks = [apply(run.params, stages.batch(), stages.rngs(seed))[0].is_masked for seed in (0, 1)]
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


def test_untrained():
    zero, names = stages.zero_gradients(stages.standard("mae"))
    assert not zero  # every parameter is read
    # Positions are read too, and must be named to stay as they are.
    assert stages.declared(stages.mae(), names) == {"encoder/pos_embed", "decoder/pos_embed"}
    assert stages.declared(stages.mae(posembed="trainable"), names) == {"decoder/pos_embed"}


def test_flops_of_the_published_model():
    # ViT-L and the 512 x 8 decoder, layer by layer, from the shapes in models_mae.py: 50 and 197 tokens.
    def blocks(n, d, depth):
        return depth * (2 * n * d * 12 * d + 4 * n * n * d)

    encoder = blocks(50, 1024, 24)
    decoder = 2 * 50 * 1024 * 512 + blocks(197, 512, 8) + 2 * 196 * 512 * 768
    embed = 2 * 49 * 768 * 1024
    task = stages.make_task(
        stages.stage(stages.config.Mae(), stages.config.ViT(1024, 24, 16, image_size=224, patch_size=16))
    )
    np.testing.assert_allclose(task.flops_per_image(), 3 * (encoder + decoder) + 2 * embed, rtol=2e-3)
