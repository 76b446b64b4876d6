"""What the shapes do not show, and who says it: heads, kinds, licences."""

import re

import pytest

from tests.bridge.arrays import HF, SMALL, rejected, star, understand, weights
from tinymim_jax.bridge import convert, known_checkpoints
from tinymim_jax.bridge.formats import to_hf
from tinymim_jax.bridge.layout import Told
from tinymim_jax.experiment import config
from tinymim_jax.runtime import codec

# Heads


def heads(arrays, settings=None, told=None, form="pth"):
    """(heads, those of the last block, the note that says who said so)."""
    found = understand(arrays, settings, told or Told(), form)
    return found.model.num_heads, found.model.last_block_heads, found.notes[0]


@pytest.mark.parametrize(("width", "expected"), [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16)])
def test_heads_by_width(width, expected):
    others = "; MAE-Lite's have 12, TinyMIM's 6 to 16" if width < 1024 else ""
    says = f"as MAE's, DeiT's and timm's models of width {width} have{others} (--num_heads)"
    assert heads(weights(width, 1)) == (expected, None, f"{expected} heads, {says}")


@pytest.mark.parametrize(("width", "decoder"), [(192, (96, 1, 3)), (384, (192, 1, 6))])
def test_heads_of_mae_lite(width, decoder):
    found = understand(weights(width, 1, decoder), told=Told())
    assert found.notes[:2] == [
        "12 heads, as MAE-Lite's models have",
        f"decoder: {decoder[2]} heads, as MAE's decoders of width {decoder[0]} have",
    ]
    assert (found.model.num_heads, found.decoder) == (12, config.Decoder(*decoder))
    assert found.kind == "MAE-Lite, with decoder"


def test_heads_of_maes_decoder():
    found = understand(weights(768, 1, (512, 1, 16)), told=Told())
    assert (found.model.num_heads, found.decoder.num_heads, found.kind) == (12, 16, "MAE, with decoder")


@pytest.mark.parametrize(
    ("size", "expected"), [("tiny", (6, 12)), ("small", (6, 12)), ("base", (12, 16))], ids=lambda v: str(v)
)
def test_heads_of_tinymim(size, expected):
    name = f"tinymim_vit_{size}_patch16"
    note = f"{expected[0]} heads, as its arguments name {name}; {expected[1]} in the last block"
    assert heads(weights(48), {"model": name}) == (*expected, note)


def test_heads_of_tinymim_star():
    assert heads(star()) == (12, None, "12 heads, as TinyMIM*-T has")


def test_heads_that_config_json_says():
    note = "3 heads, as config.json says"
    assert heads(to_hf(weights(), ""), HF, form="huggingface") == (3, None, note)
    timm = {"architecture": "vit", "model_args": {"num_heads": 3}}
    assert heads(weights(), timm, form="timm") == (3, None, note)


def test_heads_that_our_own_file_says():
    ours = {"made_by": "tinymim_jax", "model": {"width": 24, "depth": 2, "num_heads": 3, "last_block_heads": 4}}
    assert heads(weights(), ours) == (3, 4, "3 heads, as the file says; 4 in the last block")


@pytest.mark.parametrize(
    ("arrays", "settings", "form"),
    [
        (weights(192, 1), {}, "pth"),
        (to_hf(weights(), ""), {"num_attention_heads": 3}, "huggingface"),
        (weights(), {"architecture": "vit", "model_args": {"num_heads": 3}}, "timm"),
        (weights(192, 1, (96, 1, 3)), {}, "pth"),
        (star(), {}, "pth"),
        (weights(), {"made_by": "tinymim_jax", "model": {"width": 24, "depth": 2, "num_heads": 3}}, "pth"),
    ],
)
def test_the_user_knows_better(arrays, settings, form):
    assert heads(arrays, settings, Told(num_heads=8), form) == (8, None, "8 heads, as you say")
    note = "8 heads, as you say; 4 in the last block"
    assert heads(arrays, settings, Told(num_heads=8, last_block_heads=4), form) == (8, 4, note)
    assert heads(arrays, settings, Told(num_heads=8, last_block_heads=8), form)[1] is None


def test_the_last_block_of_tinymim_keeps_its_heads():
    settings = {"model": "tinymim_vit_tiny_patch16"}
    assert heads(weights(48), settings, Told(num_heads=8))[:2] == (8, 12)
    assert heads(weights(48), settings, Told(num_heads=8, last_block_heads=4))[:2] == (8, 4)


def test_the_user_knows_the_last_block_alone():
    told = Told(last_block_heads=8)
    assert heads(weights(48), {"model": "tinymim_vit_tiny_patch16"}, told)[:2] == (6, 8)


def test_the_user_knows_the_decoder():
    told = Told(decoder_heads=4)
    assert understand(weights(192, 1, (96, 1, 3)), told=told).decoder.num_heads == 4


def test_heads_that_nobody_knows():
    rejected(
        "how many heads a model of width 24 has cannot be seen in its weights; give them: .* convert x DST --num_heads=N",
        weights(),
        {},
        Told(),
    )
    rejected(
        "how many heads a decoder of width 16 has cannot be seen .* --decoder_heads=N", weights(decoder=(16, 1, 2))
    )


@pytest.mark.parametrize("told", [Told(num_heads=5), Told(num_heads=3, last_block_heads=5), Told(num_heads=48)])
def test_heads_that_do_not_divide(told):
    rejected("heads do not divide width 24; give --num_heads and --last_block_heads that do", weights(), told=told)


@pytest.mark.parametrize("value", [0, -3, 3.0, "x", None, True, [3], 5])
def test_bad_heads_in_config_json(value):
    message = "num_attention_heads is .*; it must be a whole number" if value != 5 else "5 heads do not divide width 24"
    rejected(message, to_hf(weights(), ""), {"num_attention_heads": value}, Told(), "huggingface")
    message = message.replace("num_attention_heads", "num_heads")
    rejected(message, weights(), {"architecture": "x", "model_args": {"num_heads": value}}, Told(), "timm")


def test_bad_heads_of_the_decoder():
    arrays = weights(decoder=(16, 1, 2))
    rejected("decoder's width 16 is no multiple .* its 3 heads", arrays, told=Told(num_heads=3, decoder_heads=3))
    for decoder in ({"num_heads": 0}, {"num_heads": "x"}):
        ours = {"made_by": "tinymim_jax", "model": {"width": 24, "depth": 2, "num_heads": 3}, "decoder": decoder}
        rejected("num_heads is .*; it must be a whole number", arrays, ours)


def test_our_own_file_tells_what_shapes_do_not():
    model = config.ViT(
        24, 2, 3, posembed="trainable", drop_path=0.1, drop_path_shape="linear", dtype="bfloat16", remat=True
    )
    ours = {"made_by": "tinymim_jax", "model": codec.to_dict(model)}
    found = understand(weights(), ours, Told()).model
    assert found == config.ViT(**codec.to_dict(model) | SMALL)


def test_our_own_file_is_not_believed_about_sizes():
    """Wrong ones would end in an error of JAX, or reserve any amount of memory."""
    wrong = {"width": 10**9, "depth": 9, "image_size": 10**9, "patch_size": 5, "mlp_ratio": 9.0, "neck": 4}
    wrong |= {"num_heads": 3, "pool": "mean", "num_classes": 9, "dist_token": True}
    found = understand(weights(), {"made_by": "tinymim_jax", "model": wrong}, Told())
    assert found.model == config.ViT(24, 2, 3, **SMALL)


@pytest.mark.parametrize(
    "model", [None, [], {}, {"width": 24, "depth": 2}, {"width": 24, "depth": 2, "num_heads": "x"}]
)
def test_our_own_file_with_damaged_settings(model):
    rejected("tinymim_jax.model", weights(), {"made_by": "tinymim_jax", "model": model})
    rejected("tinymim_jax.model", weights(), {"made_by": "tinymim_jax"})


@pytest.mark.parametrize("number", [0, 5, -1])
def test_our_own_file_with_other_heads(number):
    model = {"width": 24, "depth": 2, "num_heads": number}
    rejected(
        "heads do not divide width 24|num_heads is .*; it must be at least 1",
        weights(),
        {"made_by": "tinymim_jax", "model": model},
        Told(),
    )


# Kinds


@pytest.mark.parametrize(
    ("arrays", "settings", "kind", "licence"),
    [
        (weights(), {}, "MAE or TinyMIM, encoder only", known_checkpoints.LICENCES["MAE or TinyMIM"]),
        (weights(decoder=(16, 1, 2)), {}, "MAE, with decoder", "CC-BY-NC 4.0 if these are the weights of"),
        (weights(192, 1, (96, 1, 3)), {}, "MAE-Lite, with decoder", "Apache-2.0 if these .* wangsr126/MAE-Lite"),
        (weights(pool="mean", num_classes=5), {}, "MAE or TinyMIM, fine-tuned", "CC-BY-NC 4.0 if .*TinyMIM states none"),
        (weights(48), {"model": "tinymim_vit_base_patch16"}, "TinyMIM, pre-trained", "OliverRensu/TinyMIM states none"),
        (star(), {}, r"TinyMIM*-T, fine-tuned", "the repository OliverRensu/TinyMIM states none"),
        (weights(num_classes=5, dist_token=True), {}, "DeiT, distilled", "Apache-2.0 if .* facebookresearch/deit"),
        (weights(num_classes=5), {}, "DeiT or timm classifier", "Apache-2.0 if these .* facebookresearch/deit"),
    ],
)  # fmt: skip
def test_kinds_and_licences(arrays, settings, kind, licence):
    found = understand(arrays, settings, Told(num_heads=3, decoder_heads=2))
    assert found.kind == kind
    assert re.search(licence, found.licence)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"architectures": ["ViTModel"]}, "Hugging Face ViTModel"),
        ({"architectures": []}, "Hugging Face ViT"),
        ({"architectures": None, "model_type": "vit"}, "Hugging Face vit"),
    ],
)
def test_kinds_of_hugging_face(settings, kind):
    found = understand(to_hf(weights(), ""), settings, form="huggingface")
    assert (found.kind, found.licence) == (kind, "not stated in the file; see where it came from")


def test_kind_of_timm():
    found = understand(weights(), {"architecture": "vit_base_patch16_224"}, form="timm")
    assert (found.kind, found.licence) == ("timm vit_base_patch16_224", known_checkpoints.LICENCES[""])


def test_what_tinymim_did_not_train():
    """Spec A.3: of the last block only norm1 and q, k, v; positions are a table."""
    found = understand(weights(48, 3), {"model": "tinymim_vit_tiny_patch16"}, Told())
    converted = convert.Converted(None, found, {"encoder": convert.shapes(found.model, None)["encoder"]})
    block = ["attn/proj/kernel", "attn/proj/bias", "norm2/scale", "norm2/bias"]
    mlp = [f"mlp/{layer}/{leaf}" for layer in ("fc1", "fc2") for leaf in ("kernel", "bias")]
    expected = {f"encoder/block3/{key}" for key in [*block, *mlp]}
    assert set(converted.untrained) == expected | {"encoder/norm/scale", "encoder/norm/bias", "encoder/pos_embed"}
