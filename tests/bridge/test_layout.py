"""Which model a set of names and shapes is, and who said what the shapes do not show."""

import functools
import re

import numpy as np
import pytest

from tinymim_jax import config, handoff
from tinymim_jax.bridge import convert, layout, names
from tinymim_jax.bridge.files import Source
from tinymim_jax.bridge.layout import IMAGENET, Told
from tinymim_jax.config import InputError
from tinymim_jax.models import posembed

SMALL = {"image_size": 16, "patch_size": 8}
HF = {"architectures": ["ViTModel"], "num_attention_heads": 3}


def weights(width=24, depth=2, decoder=None, **model):
    """The arrays of a model of our own by MAE's names: ones, but for the positions, which are MAE's table."""
    return dict(_weights(decoder, width=width, depth=depth, num_heads=1, **{**SMALL, **model}))


@functools.cache
def _weights(decoder, **model):
    cfg = config.ViT(**model)
    shapes = handoff.shapes(convert.shapes(cfg, decoder and config.Decoder(*decoder)))
    arrays = {names.mae_name(key): names.to_mae(key, np.ones(shape, np.float32)) for key, shape in shapes.items()}
    grid = cfg.image_size // cfg.patch_size
    return arrays | {"pos_embed": posembed.sincos(grid, cfg.width, 1 + cfg.dist_token)}


def star(**model):
    return weights(pool="mean", num_classes=5, dist_token=True, neck=40, **model)


def to_hf(arrays, prefix="vit."):
    split = {}
    for name, array in arrays.items():
        parts = names.hf_names(name, prefix)
        split |= dict(zip(parts, np.split(array, len(parts)), strict=True))
    return split


def understand(arrays, settings=None, told=None, form="pth"):
    return layout.understand(Source("x", form, arrays, settings or {}, {}), dict(arrays), told or Told(num_heads=3))


def rejected(message, arrays, settings=None, told=None, form="pth"):
    with pytest.raises(InputError, match=message):
        understand(arrays, settings, told, form)


# Sizes


def test_sizes_come_from_shapes():
    found = understand(weights(24, 3, image_size=32, mlp_ratio=2.5, num_classes=7))
    assert found.model == config.ViT(24, 3, 3, mlp_ratio=2.5, image_size=32, patch_size=8, num_classes=7)
    assert found.decoder is None and found.norm_pix_loss is None and found.ignored == {} and found.untrained == ()
    found = understand(weights(36, 1, (16, 2, 2), patch_size=4), told=Told(num_heads=3, decoder_heads=2))
    assert (found.model, found.decoder) == (config.ViT(36, 1, 3, image_size=16, patch_size=4), config.Decoder(16, 2, 2))


def test_sizes_of_tinymim_star():
    found = understand(star())
    extra = {"pool": "mean", "num_classes": 5, "dist_token": True, "neck": 40}
    assert found.model == config.ViT(24, 2, 3, **SMALL, **extra)


@pytest.mark.parametrize(("shift", "kind"), [(0, "fixed"), (1e-8, "fixed"), (1e-3, "trainable")])
@pytest.mark.parametrize("dist_token", [False, True])
def test_positions_are_fixed_if_they_are_the_table(dist_token, shift, kind):
    arrays = weights(num_classes=5, dist_token=dist_token)
    arrays["pos_embed"] = arrays["pos_embed"] + shift
    assert understand(arrays).model.posembed == kind


# Heads


def heads(arrays, settings=None, told=None, form="pth"):
    """(heads, those of the last block, the note that says who said so)."""
    found = understand(arrays, settings, told or Told(), form)
    return found.model.num_heads, found.model.last_block_heads, found.notes[0]


@pytest.mark.parametrize(("width", "expected"), [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16)])
def test_heads_by_width(width, expected):
    says = f"as MAE's, DeiT's and timm's models of width {width} have; MAE-Lite's small ones have 12 (--num_heads)"
    assert heads(weights(width, 1)) == (expected, None, f"{expected} heads, {says}")


@pytest.mark.parametrize(("width", "decoder"), [(192, (96, 1, 3)), (384, (192, 1, 6))])
def test_heads_of_mae_lite(width, decoder):
    found = understand(weights(width, 1, decoder), told=Told())
    assert found.notes[:2] == [
        "12 heads, as MAE-Lite's models with such a decoder have",
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
        (weights(48), {"model": "tinymim_vit_tiny_patch16"}, "pth"),
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


def test_the_user_knows_the_last_block_alone():
    told = Told(last_block_heads=8)
    assert heads(weights(48), {"model": "tinymim_vit_tiny_patch16"}, told)[:2] == (6, 8)


def test_the_user_knows_the_decoder():
    told = Told(decoder_heads=4)
    assert understand(weights(192, 1, (96, 1, 3)), told=told).decoder.num_heads == 4


def test_heads_that_nobody_knows():
    rejected(
        "how many heads a model of width 24 has cannot be seen in its weights; convert it with --num_heads=N",
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
    for decoder in ({}, {"num_heads": "x"}):
        ours = {"made_by": "tinymim_jax", "model": {"width": 24, "depth": 2, "num_heads": 3}, "decoder": decoder}
        rejected("num_heads is .*; it must be a whole number", arrays, ours)


def test_our_own_file_tells_what_shapes_do_not():
    model = config.ViT(
        24, 2, 3, posembed="trainable", drop_path=0.1, drop_path_shape="linear", dtype="bfloat16", remat=True
    )
    ours = {"made_by": "tinymim_jax", "model": config.to_dict(model)}
    found = understand(weights(), ours, Told()).model
    assert found == config.ViT(**config.to_dict(model) | SMALL)


def test_our_own_file_is_not_believed_about_sizes():
    """Wrong ones would end in an error of JAX, or reserve any amount of memory."""
    wrong = {"width": 10**9, "depth": 9, "image_size": 10**9, "patch_size": 5, "mlp_ratio": float("nan"), "neck": 4}
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
    rejected("heads do not divide width 24", weights(), {"made_by": "tinymim_jax", "model": model}, Told())


# Kinds


@pytest.mark.parametrize(
    ("arrays", "settings", "kind", "licence"),
    [
        (weights(), {}, "MAE, encoder only", "CC-BY-NC 4.0 if these are the weights of facebookresearch/mae"),
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
    assert (found.kind, found.licence) == ("timm vit_base_patch16_224", layout.ASK_THE_SOURCE)


def test_what_tinymim_did_not_train():
    """Spec A.3: of the last block only norm1 and q, k, v; positions are a table."""
    found = understand(weights(48, 3), {"model": "tinymim_vit_tiny_patch16"}, Told())
    converted = convert.Converted(None, found, {"encoder": convert.shapes(found.model, None)["encoder"]})
    block = ["attn/proj/kernel", "attn/proj/bias", "norm2/scale", "norm2/bias"]
    mlp = [f"mlp/{layer}/{leaf}" for layer in ("fc1", "fc2") for leaf in ("kernel", "bias")]
    expected = {f"encoder/block3/{key}" for key in [*block, *mlp]}
    assert set(converted.untrained) == expected | {"encoder/norm/scale", "encoder/norm/bias", "encoder/pos_embed"}


# What else the settings say


@pytest.mark.parametrize(
    ("settings", "told", "value", "note"),
    [
        ({}, None, False, "whether the decoder gives normalised pixels is not in the file: taken as no (--norm_pix if it does)"),
        ({"norm_pix_loss": True}, None, True, "norm_pix_loss is True, as its settings say"),
        ({"norm_pix_loss": False}, None, False, "norm_pix_loss is False, as its settings say"),
        ({"norm_pix_loss": 3}, None, False, "whether the decoder gives normalised pixels is not in the file"),
        ({"norm_pix_loss": False}, True, True, None),
        ({}, False, False, None),
    ],
)  # fmt: skip
def test_norm_pix(settings, told, value, note):
    found = understand(weights(decoder=(16, 1, 2)), settings, Told(num_heads=3, decoder_heads=2, norm_pix=told))
    assert found.norm_pix_loss is value
    notes = [line for line in found.notes if "pix_loss" in line or "normalised pixels" in line]
    assert len(notes) == (note is not None) and (note is None or notes[0].startswith(note))


HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 1]}


@pytest.mark.parametrize(
    ("form", "settings", "expected"),
    [
        ("huggingface", {"preprocessor": HALF}, ([0.5] * 3, [0.25, 0.5, 1.0])),
        ("timm", {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}, ([0.5] * 3, [0.25] * 3)),
        ("huggingface", {}, None),
        ("timm", {"pretrained_cfg": {"mean": [0.5] * 3}}, None),
        ("timm", {"pretrained_cfg": []}, None),
        *(
            ("huggingface", {"preprocessor": HALF | {"image_std": std}}, None)
            for std in (0.5, [1, 1], ["a"] * 3, [1, 0, 1], [1, -1, 1], [float("nan")] * 3, [True] * 3, [10**400] * 3)
        ),
    ],
)
def test_preprocessing(form, settings, expected):
    arrays = weights() if form == "timm" else to_hf(weights(), "")
    found = understand(arrays, {"architecture": "vit", **settings} if form == "timm" else settings, form=form)
    mean, std = expected or IMAGENET.values()
    assert found.preprocessing == {"mean": mean, "std": std}
    assert any("ImageNet's mean and std, which the file does not say" in note for note in found.notes) == (not expected)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, "x"])
def test_layer_norm_eps_is_1e_6_and_said(eps):
    arrays = to_hf(weights(), "")
    notes = understand(arrays, {"layer_norm_eps": eps}, form="huggingface").notes
    assert any(
        f"LayerNorm eps is 1e-6, which ViT weights were trained with; config.json says {eps}" in n for n in notes
    )
    for settings in ({}, {"layer_norm_eps": 1e-6}):
        assert not any("eps" in note for note in understand(arrays, settings, form="huggingface").notes)


@pytest.mark.parametrize(
    "settings",
    [{"hidden_act": "relu"}, {"hidden_act": "gelu_new"}, {"hidden_act": []}, {"qkv_bias": False}, {"qkv_bias": None}],
)
def test_models_that_are_not_plain(settings):
    rejected(
        "only hidden_act gelu and qkv_bias true are a plain ViT", to_hf(weights(), ""), settings, form="huggingface"
    )


@pytest.mark.parametrize("where", ["model_args", "top"])
@pytest.mark.parametrize(("model_pool", "pool", "good"), [
    ("cls", "token", True), ("cls", "avg", False), ("cls", "map", False), ("mean", "avg", True), ("mean", "token", False),
])  # fmt: skip
def test_pooling_of_timm(where, model_pool, pool, good):
    """timm's avg with norm in place of fc_norm is another model: each token is normed, then the mean is taken."""
    settings = {
        "architecture": "vit",
        **({"global_pool": pool} if where == "top" else {"model_args": {"global_pool": pool}}),
    }
    arrays = weights(num_classes=5, pool=model_pool)
    if good:
        assert understand(arrays, settings, form="timm").model.pool == model_pool
    else:
        rejected(f"global_pool '{pool}' with .* is not supported", arrays, settings, form="timm")


# Names


@pytest.mark.parametrize("prefix", layout.PREFIXES)
def test_prefixes(prefix):
    found = understand({prefix + key: value for key, value in weights().items()})
    assert set(found.arrays) == set(weights()) and found.ignored == {}


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
    assert found.kind == "MAE, encoder only"
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


# What is of no known model


def changed(shape_of=(), without=(), **extra):
    arrays = {key: value for key, value in weights().items() if not key.startswith(tuple(without) or ("none",))}
    return arrays | {
        name.replace("__", "."): np.ones(shape, np.float32) for name, shape in dict(shape_of, **extra).items()
    }


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, r"no tensor is named cls_token \(the file holds nothing, ...\): this is not a vision transformer"),
        ({"conv.weight": np.ones(3), "fc.weight": np.ones(3)}, r"no tensor is named cls_token \(the file holds conv.weight"),
        (changed(without=["patch_embed"]), "there is no patch_embed.proj.weight: this is not a whole vision"),
        (changed(without=["pos_embed"]), "there is no pos_embed: this is not a whole vision transformer"),
        (changed(without=["blocks"]), "the blocks are not numbered from 0 without gaps"),
        (changed(without=["blocks.0"]), "the blocks are not numbered from 0 without gaps"),
        (changed(without=["blocks.0.mlp.fc1"]), "there is no blocks.0.mlp.fc1.weight"),
        (changed(pos_embed=(1, 7, 24)), "pos_embed is for 6 patches, which is no square; register tokens are not"),
        (changed(pos_embed=(1, 9, 24)), "pos_embed is for 8 patches, which is no square"),
        (changed(pos_embed=(1, 1, 24)), "pos_embed is for 0 patches, which is no square"),
        (changed(pos_embed=(5, 24)), r"pos_embed has shape \[5, 24\], which no vision transformer has"),
        (changed(pos_embed=(1, 0, 24)), r"pos_embed has shape \[1, 0, 24\], which no vision transformer has"),
        (changed(patch_embed__proj__weight=(24, 3, 8, 4)), "for 3 channels and patches of 8 x 4; only 3 channels and"),
        (changed(patch_embed__proj__weight=(24, 1, 8, 8)), "is for 1 channels and patches of 8 x 8; only 3 channels"),
        (changed(patch_embed__proj__weight=(24, 192)), r"patch_embed.proj.weight has shape \[24, 192\]"),
        (changed(without=["norm."]), "exactly one of norm and fc_norm is expected"),
        (changed(fc_norm__weight=(24,)), "exactly one of norm and fc_norm is expected"),
        (changed(patch_embed__proj__weight=(18, 3, 8, 8)), "width 18 is not a multiple of 4, which positions here need"),
        (changed(decoder_embed__weight=(16, 24)), "decoder's width 16 is no multiple .* or it has no blocks"),
        (weights(decoder=(16, 1, 2)) | changed(head__weight=(5, 24)), "there is a decoder beside a head, fc_norm or dist"),
        (weights(decoder=(16, 1, 2), image_size=24) | {"pos_embed": np.ones((1, 11, 24)), "dist_token": np.ones(1)},
         "there is a decoder beside a head, fc_norm or dist_token"),
    ],
)  # fmt: skip
def test_shapes_of_no_known_model(arrays, message):
    rejected(message, arrays, told=Told(num_heads=3, decoder_heads=2))


def test_a_decoder_of_a_strange_width():
    arrays = weights(decoder=(16, 1, 2)) | changed(decoder_embed__weight=(18, 24))
    rejected("the decoder's width 18 is no multiple of 4", arrays, told=Told(num_heads=3, decoder_heads=2))


def test_tensors_outside_the_prefix():
    arrays = {f"module.model.{name}": value for name, value in weights().items()}
    rejected(r"module.other.x \(and 1 more\) belongs to no known model", arrays | {"module.other.x": 0, "y": 0})


@pytest.mark.parametrize("key", ["embeddings.mask_token", "encoder.layer.0.attention.attention.other.weight"])
def test_unknown_tensors_of_hugging_face(key):
    rejected(f"{key} .* belongs to no known model", to_hf(weights(), "") | {key: np.ones(3)}, form="huggingface")


def test_half_a_qkv_of_hugging_face():
    arrays = to_hf(weights(), "")
    del arrays["encoder.layer.0.attention.attention.key.bias"]
    rejected("attention.query.bias .* belongs to no known model", arrays, form="huggingface")


@pytest.mark.parametrize("key", ["cls_token", "pos_embed", "decoder_embed.weight", "decoder_pos_embed", "head.weight"])
def test_numbers_in_place_of_tensors(key):
    arrays = weights(decoder=(16, 1, 2)) | {key: np.float32(1).reshape(())}
    with pytest.raises(InputError, match=f"{key} has shape"):
        convert._to_ours(understand(arrays, told=Told(num_heads=3, decoder_heads=2)))


@pytest.mark.parametrize("shape", [(), (24, 24, 1), (12, 24), (24,)])
def test_query_key_and_value_of_different_shapes(shape):
    arrays = to_hf(weights(), "") | {"encoder.layer.0.attention.attention.value.weight": np.ones(shape)}
    rejected("query.weight has shape .24, 24., key and value have others", arrays, form="huggingface")


def test_a_hugging_face_folder_of_another_model():
    rejected("config.json and model.safetensors are of no ViT", {"bert.x": np.ones(3)}, {}, form="huggingface")
