"""Which model a set of shapes is."""

import numpy as np
import pytest

from tests.bridge.arrays import HF, SMALL, rejected, star, understand, weights
from tinymim_jax.bridge import convert
from tinymim_jax.bridge.formats import to_hf
from tinymim_jax.bridge.layout import Told
from tinymim_jax.bridge.stated import IMAGENET
from tinymim_jax.experiment import config
from tinymim_jax.runtime.errors import InputError

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


# What else the settings say


@pytest.mark.parametrize(
    ("settings", "told", "value", "note"),
    [
        ({}, None, False, "the decoder gives plain pixels, which the file does not say (--norm_pix if it does)"),
        ({"norm_pix_loss": True}, None, True, "the decoder gives normalised pixels, as its settings say"),
        ({"norm_pix_loss": False}, None, False, "the decoder gives plain pixels, as its settings say"),
        ({"norm_pix_loss": 3}, None, False, "the decoder gives plain pixels, which the file does not say"),
        ({"norm_pix_loss": False}, True, True, "the decoder gives normalised pixels, as you say"),
        ({}, False, False, "the decoder gives plain pixels, as you say"),
    ],
)  # fmt: skip
def test_norm_pix(settings, told, value, note):
    found = understand(weights(decoder=(16, 1, 2)), settings, Told(num_heads=3, decoder_heads=2, norm_pix=told))
    assert found.norm_pix_loss is value
    assert [line for line in found.notes if line.startswith(note)]


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


@pytest.mark.parametrize("eps", [0, -1e-6, 1, "x", True])
def test_an_eps_that_is_none(eps):
    rejected(
        "layer_norm_eps is .*; it must be above 0", to_hf(weights(), ""), {"layer_norm_eps": eps}, form="huggingface"
    )


@pytest.mark.parametrize(
    ("settings", "eps"), [({"layer_norm_eps": 1e-5}, 1e-5), ({}, 1e-12), ({"layer_norm_eps": 1e-6}, 1e-6)]
)
def test_eps_is_what_the_file_says_and_transformers_takes(settings, eps):
    found = understand(to_hf(weights(), ""), settings, form="huggingface")
    assert found.model.layer_norm_eps == eps
    assert any(f"LayerNorm eps is {eps:g}, as the file says" in note for note in found.notes) == (eps != 1e-6)
    told = understand(to_hf(weights(), ""), settings, Told(num_heads=3, layer_norm_eps=1e-7), form="huggingface")
    assert told.model.layer_norm_eps == 1e-7


@pytest.mark.parametrize(
    ("form", "settings"),
    [
        ("huggingface", {"image_size": [16, 16], "patch_size": [8, 8]}),
        ("timm", {"architecture": "vit", "model_args": {"img_size": [16, 16], "patch_size": 8}}),
    ],
)
def test_squares_written_as_pairs(form, settings):
    arrays = weights() if form == "timm" else to_hf(weights(), "")
    assert understand(arrays, settings, form=form).model.image_size == 16


@pytest.mark.parametrize(
    ("form", "settings"),
    [
        ("huggingface", {"image_size": [8, 32]}),  # as many patches as the square has
        ("timm", {"architecture": "vit", "model_args": {"img_size": [32, 8]}}),
        ("timm", {"architecture": "vit", "pretrained_cfg": {"input_size": [3, 32, 8]}}),
        ("timm", {"architecture": "vit", "input_size": [3, 32, 8]}),
        ("huggingface", {"image_size": [16, 16], "preprocessor": {"size": {"height": 32, "width": 8}}}),
    ],
)
def test_rectangles_are_refused(form, settings):
    rejected("rectangular model", weights() if form == "timm" else to_hf(weights(), ""), settings, form=form)


@pytest.mark.parametrize(
    "settings",
    [{"hidden_act": "relu"}, {"hidden_act": "gelu_new"}, {"hidden_act": []}],
)
def test_models_that_are_not_plain(settings):
    rejected("only hidden_act gelu is a plain ViT", to_hf(weights(), ""), settings, form="huggingface")


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


# What is of no known model


def changed(shape_of=(), without=(), **extra):
    arrays = {key: value for key, value in weights().items() if not key.startswith(tuple(without) or ("none",))}
    return arrays | {
        name.replace("__", "."): np.ones(shape, np.float32) for name, shape in dict(shape_of, **extra).items()
    }


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, r"no tensor is named cls_token \(it holds nothing, ...\): this is not a vision transformer"),
        ({"conv.weight": np.ones(3), "fc.weight": np.ones(3)}, r"no tensor is named cls_token \(it holds conv.weight"),
        (changed(without=["patch_embed"]), "there is no patch_embed.proj.weight: this is not a whole vision"),
        (changed(without=["pos_embed"]), "there is no pos_embed: this is not a whole vision transformer"),
        (changed(without=["blocks"]), "the blocks are not numbered from 0 without gaps"),
        (changed(without=["blocks.0"]), "the blocks are not numbered from 0 without gaps"),
        (changed(without=["blocks.0.mlp.fc1"]), "there is no blocks.0.mlp.fc1.weight"),
        (changed(pos_embed=(1, 7, 24)), "pos_embed is for 6 patches, which is no square: rectangular images"),
        (changed(pos_embed=(1, 9, 24)), "pos_embed is for 8 patches, which is no square"),
        (changed(pos_embed=(1, 1, 24)), "pos_embed is for 0 patches, which is no square"),
        (changed(pos_embed=(5, 24)), r"pos_embed has shape \[5, 24\], which no vision transformer has"),
        (changed(pos_embed=(1, 0, 24)), r"pos_embed has shape \[1, 0, 24\], which no vision transformer has"),
        (changed(patch_embed__proj__weight=(24, 3, 8, 4)), "for 3 channels, patches of 8 x 4 and width 24; only 3 channels, square"),
        (changed(patch_embed__proj__weight=(24, 1, 8, 8)), "is for 1 channels, patches of 8 x 8 and width 24; only 3 channels"),
        (changed(patch_embed__proj__weight=(24, 192)), r"patch_embed.proj.weight has shape \[24, 192\]"),
        (changed(without=["norm."]), "exactly one of norm and fc_norm is expected"),
        (changed(fc_norm__weight=(24,)), "exactly one of norm and fc_norm is expected"),
        (changed(patch_embed__proj__weight=(18, 3, 8, 8)), "and width 18; only 3 channels, square patches and multiples of 4"),
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


def test_unknown_tensors_of_hugging_face():
    key = "encoder.layer.0.attention.attention.other.weight"
    found = understand(to_hf(weights(), "") | {key: np.ones(3)}, HF, form="huggingface")
    with pytest.raises(InputError, match=r"^\S*other\S+ has no place in a Hugging Face ViTModel checkpoint"):
        convert._to_ours(found)


def test_what_stands_for_hidden_patches_is_left_out():
    key = "embeddings.mask_token"
    found = understand(to_hf(weights(), "") | {key: np.ones(3)}, HF, form="huggingface")
    assert found.ignored[key] == "what pre-training puts in place of hidden patches" and key not in found.arrays


def test_names_of_both_spellings():
    arrays = to_hf(weights(), "")
    rejected("hold .*, blocks.0.norm1.bias where", arrays | {"blocks.0.norm1.bias": np.ones(24)}, form="huggingface")
    with_prefix = to_hf(weights()) | {"layernorm.bias": np.ones(24)}
    rejected("the weights hold layernorm.bias where a ViT has vit.layernorm.bias", with_prefix, form="huggingface")


def test_half_a_qkv_of_hugging_face():
    arrays = to_hf(weights(), "")
    del arrays["encoder.layer.0.attention.attention.key.bias"]
    rejected(
        r"hold \S+query.bias, \S+value.bias where a ViT has \S+query.bias, \S+key.bias, ", arrays, form="huggingface"
    )


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
    rejected(
        r"no tensor is named embeddings.cls_token \(it holds bert.x", {"bert.x": np.ones(3)}, {}, form="huggingface"
    )


# What must not be taken for something else


def test_a_missing_tensor_is_no_training_block():
    arrays = weights(24, 3)
    del arrays["blocks.2.attn.proj.weight"]
    assert understand(arrays).ignored == {}  # `convert` then says what is missing


def test_d2_mae_has_the_heads_of_mae_lite():
    arrays = weights(192, 3, (96, 1, 3))
    for key in list(arrays):
        if key.startswith(("blocks.2.attn.proj", "blocks.2.norm2", "blocks.2.mlp")):
            del arrays[key]
    found = understand(arrays, told=Told())
    assert (found.model.num_heads, found.kind) == (12, "MAE-Lite, encoder only")
    assert "Apache-2.0" in found.licence and any("output of block 8" in note for note in found.notes)


def test_mae_lite_is_known_by_its_prefix():
    found = understand({f"module.model.{k}": v for k, v in weights(192, 1).items()}, told=Told())
    assert (found.model.num_heads, found.kind) == (12, "MAE-Lite, encoder only")


def test_mae_lite_s_decoder_gives_normalised_pixels():
    assert understand(weights(192, 1, (96, 1, 3)), told=Told()).norm_pix_loss is True


@pytest.mark.parametrize("arg", ["act_layer", "norm_layer", "qk_norm", "reg_tokens"])
def test_timm_models_that_are_not_plain(arg):
    settings = {"architecture": "vit", "model_args": {arg: 1}}
    rejected(f"model_args has {arg}, which a plain ViT has not", weights(), settings, form="timm")


@pytest.mark.parametrize(("key", "value"), [("image_size", 224), ("num_hidden_layers", 12), ("hidden_size", 768)])
def test_a_config_of_another_size(key, value):
    rejected(f"{key} is {value}, but the weights have", to_hf(weights(), ""), {key: value}, form="huggingface")


def test_names_of_hugging_face_without_the_folder():
    rejected("give the folder, whose config.json tells the heads", to_hf(weights()))


def test_settings_that_take_long_to_print():
    deep = []
    for _ in range(40):
        deep = [deep, deep]
    assert understand(weights(), {"model": deep}).kind == "MAE or TinyMIM, encoder only"


def test_text_of_a_file_is_printable():
    """It is written to a terminal and into a model card."""
    ours = {"made_by": "tinymim_jax", "model": {"width": 24, "depth": 2, "num_heads": 3}}
    found = understand(weights(), ours | {"made_from": ["a\nb", "\udcff", "\x1b[31m", 3], "untrained": "x"})
    assert (found.made_from, found.untrained) == (["a?b", "?", "?[31m", "3"], ())
    hf = understand(to_hf(weights(), ""), {"architectures": ["a\n\udcff"]}, form="huggingface")
    assert hf.kind == "Hugging Face a??"
