"""Names of tensors: prefixes, what is ignored, Hugging Face."""

import numpy as np
import pytest

from tests.bridge.arrays import HF, SMALL, rejected, understand, weights
from tinymim_jax.bridge import layout
from tinymim_jax.bridge.files import Source
from tinymim_jax.bridge.formats import to_hf
from tinymim_jax.bridge.layout import Told
from tinymim_jax.experiment import config

# Names


PREFIXES = [
    "", "module.model.", "module.", "model.", "backbone.", "encoder.", "_orig_mod.", "module._orig_mod.", "net.",
    "_orig_mod.module.", "model.backbone.", "a.b.c.d.", "_fsdp_wrapped_module._orig_mod.model.",
]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(prefix):
    found = understand({prefix + key: value for key, value in weights().items()})
    assert set(found.arrays) == set(weights()) and found.ignored == {}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_hugging_face(prefix):
    arrays = weights(num_classes=5)
    found = understand({prefix + key: value for key, value in to_hf(arrays).items()}, HF, form="huggingface")
    assert set(found.arrays) == set(arrays) and found.ignored == {}


def test_wrappers_of_single_blocks():
    """torch.compile and activation checkpointing put their names in the middle."""
    arrays = {
        key.replace("blocks.0.", "blocks.0._orig_mod.").replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): v
        for key, v in weights().items()
    }
    assert set(understand(arrays).arrays) == set(weights())


@pytest.mark.parametrize(
    ("one", "other"), [("student.", "model."), ("", "net."), ("_orig_mod.", ""), ("module.a.", "module.b.")]
)
def test_two_models_in_one_file(one, other):
    arrays = {prefix + key: value for prefix in (one, other) for key, value in weights().items()}
    rejected("these are several models, .*; save the weights of one", arrays)


def test_a_prefix_that_does_not_stand_before_all():
    arrays = {("net." if "blocks" in key else "model.") + key: value for key, value in weights().items()}
    rejected("net.blocks.* more\\) belongs to no known model", arrays)


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("module.tch_model.blocks.0.attn.qkv.weight", "the teacher of the training"),
        ("tch_model.x", "the teacher of the training"),
        ("teacher.cls_token", "the teacher of the training"),
        ("module.model_t.cls_token", "the teacher of the training"),
        ("module.attn_adapter.0.weight", "an adapter of the training's loss"),
        ("module.hidden_adapter.weight", "an adapter of the training's loss"),
        ("module.model.pooler.dense.weight", "a pooler that no plain ViT has"),
    ],
)
def test_what_is_ignored(key, why):
    arrays = {f"module.model.{name}": value for name, value in weights().items()} | {key: np.ones(3, np.float32)}
    assert understand(arrays).ignored == {key.removeprefix("module.model."): why}


def test_entries_beside_the_weights_are_ignored_too():
    source = Source("x", "pth", weights(), {}, {"epoch": "progress of the training"})
    assert layout.understand(source, weights(), Told(3)).ignored == {"epoch": "progress of the training"}


def test_the_training_block_of_d2_mae():
    """Spec C.3: block 13 has norm1 and qkv only, and the decoder reads block 8."""
    arrays = weights(24, 3, (16, 1, 2))
    for key in list(arrays):
        if key.startswith(("blocks.2.attn.proj", "blocks.2.norm2", "blocks.2.mlp")):
            del arrays[key]
    found = understand(arrays)
    assert found.model == config.ViT(24, 2, 3, **SMALL) and found.decoder is None
    assert found.kind == "MAE-Lite, encoder only" and found.model.num_heads == 3
    reasons = {"a block of D2-MAE's training, not of its model", "D2-MAE's decoder, which reads block 8"}
    assert set(found.ignored.values()) == reasons
    assert set(found.ignored) == set(arrays) - set(weights())
    assert set(found.arrays) == set(weights())


@pytest.mark.parametrize("prefix", ["vit.", ""])
@pytest.mark.parametrize("decoder_blocks", ["decoder.decoder_layers.", "decoder.decoder_encoder.layer."])
def test_both_spellings_of_hugging_face(prefix, decoder_blocks):
    arrays = weights(decoder=(16, 2, 2))
    hf = {key.replace("decoder.decoder_layers.", decoder_blocks): value for key, value in to_hf(arrays, prefix).items()}
    found = understand(hf, {"decoder_num_attention_heads": 2}, form="huggingface")
    assert found.arrays.keys() == arrays.keys() and found.decoder == config.Decoder(16, 2, 2)


def test_split_q_k_v_are_joined_in_order():
    rng = np.random.default_rng(0)
    parts = {p: rng.normal(size=(24, 24)).astype(np.float32) for p in ("query", "key", "value")}
    hf = to_hf(weights()) | {f"vit.encoder.layer.1.attention.attention.{p}.weight": a for p, a in parts.items()}
    found = understand(hf, form="huggingface").arrays["blocks.1.attn.qkv.weight"]
    np.testing.assert_array_equal(found, np.concatenate([parts["query"], parts["key"], parts["value"]]))
