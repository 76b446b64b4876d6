"""The table of names of spec B.3, written out, against every key of the models."""

import math

import numpy as np
import pytest

from tinymim_jax.bridge import convert, formats
from tinymim_jax.experiment import config
from tinymim_jax.weights.parameters import shapes_of

VIT_B = config.ViT(768, 12, 12)
BLOCK = {  # ours, MAE's, Hugging Face's; of the first block
    "norm1/scale": ("norm1.weight", ["layernorm_before.weight"]),
    "norm1/bias": ("norm1.bias", ["layernorm_before.bias"]),
    "attn/qkv/kernel": ("attn.qkv.weight", [f"attention.attention.{p}.weight" for p in ("query", "key", "value")]),
    "attn/qkv/bias": ("attn.qkv.bias", [f"attention.attention.{p}.bias" for p in ("query", "key", "value")]),
    "attn/proj/kernel": ("attn.proj.weight", ["attention.output.dense.weight"]),
    "attn/proj/bias": ("attn.proj.bias", ["attention.output.dense.bias"]),
    "norm2/scale": ("norm2.weight", ["layernorm_after.weight"]),
    "norm2/bias": ("norm2.bias", ["layernorm_after.bias"]),
    "mlp/fc1/kernel": ("mlp.fc1.weight", ["intermediate.dense.weight"]),
    "mlp/fc1/bias": ("mlp.fc1.bias", ["intermediate.dense.bias"]),
    "mlp/fc2/kernel": ("mlp.fc2.weight", ["output.dense.weight"]),
    "mlp/fc2/bias": ("mlp.fc2.bias", ["output.dense.bias"]),
}
ENCODER = {
    "encoder/cls_token": ("cls_token", "vit.embeddings.cls_token"),
    "encoder/pos_embed": ("pos_embed", "vit.embeddings.position_embeddings"),
    "encoder/patch_embed/kernel": ("patch_embed.proj.weight", "vit.embeddings.patch_embeddings.projection.weight"),
    "encoder/patch_embed/bias": ("patch_embed.proj.bias", "vit.embeddings.patch_embeddings.projection.bias"),
    "encoder/norm/scale": ("norm.weight", "vit.layernorm.weight"),
    "encoder/norm/bias": ("norm.bias", "vit.layernorm.bias"),
}
DECODER = {
    "pretext/decoder/mask_token": ("mask_token", "decoder.mask_token"),
    "pretext/decoder/pos_embed": ("decoder_pos_embed", "decoder.decoder_pos_embed"),
    "pretext/decoder/embed/kernel": ("decoder_embed.weight", "decoder.decoder_embed.weight"),
    "pretext/decoder/embed/bias": ("decoder_embed.bias", "decoder.decoder_embed.bias"),
    "pretext/decoder/norm/scale": ("decoder_norm.weight", "decoder.decoder_norm.weight"),
    "pretext/decoder/norm/bias": ("decoder_norm.bias", "decoder.decoder_norm.bias"),
    "pretext/decoder/pred/kernel": ("decoder_pred.weight", "decoder.decoder_pred.weight"),
    "pretext/decoder/pred/bias": ("decoder_pred.bias", "decoder.decoder_pred.bias"),
}
HEADS = {
    "encoder/head/kernel": ("head.weight", "classifier.weight"),
    "encoder/head/bias": ("head.bias", "classifier.bias"),
}
STAR = {  # spec A.7; Hugging Face has no such model
    "encoder/dist_token": "dist_token",
    "encoder/fc_norm/scale": "fc_norm.weight",
    "encoder/fc_norm/bias": "fc_norm.bias",
    "encoder/neck_norm/scale": "conv1x1.0.weight",
    "encoder/neck_norm/bias": "conv1x1.0.bias",
    "encoder/neck/kernel": "conv1x1.1.weight",
    "encoder/neck/bias": "conv1x1.1.bias",
    "encoder/head_dist/kernel": "head_dist.weight",
    "encoder/head_dist/bias": "head_dist.bias",
}


def stack(ours, mae, hf, depth):
    return {
        f"{ours}/block{i + 1}/{key}": (f"{mae}.{i}.{name}", [f"{hf}.{i}.{part}" for part in parts])
        for i in range(depth)
        for key, (name, parts) in BLOCK.items()
    }


def single(table):
    return {ours: (mae, [hf]) for ours, (mae, hf) in table.items()}


MAE_B = {
    **single(ENCODER | DECODER),
    **stack("encoder", "blocks", "vit.encoder.layer", 12),
    **stack("pretext/decoder", "decoder_blocks", "decoder.decoder_layers", 8),
}


def keys(model, decoder=None):
    return set(shapes_of(convert.shapes(model, decoder)))


def test_the_table_has_every_key_of_mae_b():
    """254 keys, 111,907,840 numbers (spec B.3)."""
    assert keys(VIT_B, config.Decoder()) == set(MAE_B) and len(MAE_B) == 254
    shapes = shapes_of(convert.shapes(VIT_B, config.Decoder()))
    assert sum(math.prod(shape) for shape in shapes.values()) == 111_907_840


@pytest.mark.parametrize("ours", [key for key in MAE_B if "block" not in key or "block1/" in key or "block8/" in key])
def test_mae_and_hugging_face(ours):
    mae, parts = MAE_B[ours]
    assert formats.mae_name(ours) == mae
    assert list(formats.hf_names(mae)) == parts


def test_every_key_of_every_block():
    assert {ours: formats.mae_name(ours) for ours in MAE_B} == {ours: mae for ours, (mae, _) in MAE_B.items()}
    assert [list(formats.hf_names(mae)) for mae, _ in MAE_B.values()] == [parts for _, parts in MAE_B.values()]


def test_a_model_without_a_head_has_no_prefix():
    for mae, parts in MAE_B.values():
        assert list(formats.hf_names(mae, "")) == [part.removeprefix("vit.") for part in parts]


@pytest.mark.parametrize("prefix", ["vit.", ""])
def test_the_classifier_stands_outside_the_prefix(prefix):
    for ours, (mae, hf) in HEADS.items():
        assert formats.mae_name(ours) == mae
        assert formats.hf_names(mae, prefix) == (hf,)


def test_a_second_prefix():
    assert formats.hf_names("blocks.3.attn.qkv.bias", "beit.")[1] == "beit.encoder.layer.3.attention.attention.key.bias"


def test_tinymim_star():
    model = config.ViT(24, 2, 12, pool="mean", num_classes=5, dist_token=True, neck=40, image_size=16, patch_size=8)
    blocks = {f"encoder/block{i}/{key}" for i in (1, 2) for key in BLOCK}
    known = (set(ENCODER) - {"encoder/norm/scale", "encoder/norm/bias"}) | set(HEADS) | blocks
    assert keys(model) == known | set(STAR)
    assert {ours: formats.mae_name(ours) for ours in STAR} == STAR


def test_no_two_keys_share_a_name():
    for prefix in ("vit.", ""):
        parts = [part for mae, _ in MAE_B.values() for part in formats.hf_names(mae, prefix)]
        assert len(set(parts)) == len(parts)


@pytest.mark.parametrize("prefix", ["vit.", ""])
def test_to_hugging_face_and_back(prefix):
    rng = np.random.default_rng(0)
    arrays = {mae: rng.normal(size=(6, 2)) for mae, _ in MAE_B.values()} | {"head.weight": rng.normal(size=(5, 2))}
    split = formats.to_hf(arrays, prefix)
    assert set(split) == {part for mae in arrays for part in formats.hf_names(mae, prefix)}
    back = formats.from_hf(split)
    assert back.keys() == arrays.keys()
    for mae, array in arrays.items():
        np.testing.assert_array_equal(back[mae], array)


# Arrays

SHAPES = shapes_of(
    convert.shapes(config.ViT(24, 2, 3, image_size=16, patch_size=4, last_block_heads=2), config.Decoder(16, 1, 2))
) | {"encoder/head/kernel": (24, 5), "encoder/neck/kernel": (24, 40)}
TORCH = {  # spec B.3: [out, in], and the fused rows of q, k, v
    "encoder/patch_embed/kernel": (24, 3, 4, 4),
    "encoder/block1/attn/qkv/kernel": (72, 24),
    "encoder/block2/attn/qkv/kernel": (72, 24),
    "encoder/block1/attn/qkv/bias": (72,),
    "encoder/block1/attn/proj/kernel": (24, 24),
    "encoder/block1/mlp/fc1/kernel": (96, 24),
    "encoder/block1/mlp/fc2/kernel": (24, 96),
    "encoder/block1/norm1/scale": (24,),
    "encoder/pos_embed": (1, 17, 24),
    "encoder/cls_token": (1, 1, 24),
    "encoder/head/kernel": (5, 24),
    "encoder/neck/kernel": (40, 24),
    "pretext/decoder/embed/kernel": (16, 24),
    "pretext/decoder/pred/kernel": (48, 16),
    "pretext/decoder/block1/attn/qkv/kernel": (48, 16),
    "pretext/decoder/pos_embed": (1, 17, 16),
}


@pytest.mark.parametrize("ours", TORCH)
def test_shapes_in_torch(ours):
    assert formats.to_mae(ours, np.zeros(SHAPES[ours])).shape == TORCH[ours]


def test_to_mae_and_back():
    rng = np.random.default_rng(0)
    for ours, shape in SHAPES.items():
        array = rng.normal(size=shape).astype(np.float32)
        np.testing.assert_array_equal(formats.from_mae(ours, formats.to_mae(ours, array), shape), array)


def test_from_mae_and_back():
    rng = np.random.default_rng(0)
    for ours, shape in TORCH.items():
        array = rng.normal(size=shape).astype(np.float32)
        np.testing.assert_array_equal(formats.to_mae(ours, formats.from_mae(ours, array, SHAPES[ours])), array)


def test_qkv_rows_are_q_then_k_then_v_each_head_by_head():
    weight = np.arange(72 * 24.0).reshape(72, 24)
    kernel = formats.from_mae("encoder/block1/attn/qkv/kernel", weight, (24, 3, 3, 8))
    bias = formats.from_mae("encoder/block1/attn/qkv/bias", weight[:, 0], (3, 3, 8))
    for part in range(3):
        for head in range(3):
            rows = weight[24 * part + 8 * head :][:8]
            np.testing.assert_array_equal(kernel[:, part, head], rows.T)
            np.testing.assert_array_equal(bias[part, head], rows[:, 0])


def test_a_patch_is_read_row_by_row_then_column_then_channel():
    torch = pytest.importorskip("torch", reason="the patch embedding is compared with torch's convolution")
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(24, 3, 4, 4)).astype(np.float32)
    image = rng.normal(size=(8, 8, 3)).astype(np.float32)
    pixels = torch.from_numpy(image.transpose(2, 0, 1)[None].copy())
    theirs = torch.nn.functional.conv2d(pixels, torch.from_numpy(weight), stride=4)[0].numpy()
    kernel = formats.from_mae("encoder/patch_embed/kernel", weight, (48, 24))
    for i in range(2):
        for j in range(2):
            patch = [image[4 * i + r, 4 * j + c, ch] for r in range(4) for c in range(4) for ch in range(3)]
            np.testing.assert_allclose(np.array(patch) @ kernel, theirs[:, i, j], rtol=1e-4, atol=1e-5)
