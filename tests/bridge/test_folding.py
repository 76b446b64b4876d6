"""Models with parts that ours has not, run as they are by code of this file, against ours with those parts folded in."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="the models are PyTorch's")

import jax
import torch
from safetensors.torch import save_file

from tests import torch_files
from tests.bridge.arrays import SMALL, rejected, understand, weights
from tinymim_jax.bridge import convert
from tinymim_jax.bridge.layout import Told
from tinymim_jax.bridge.torch_reference import vit
from tinymim_jax.experiment import config

CFG = config.ViT(24, 2, 3, num_classes=5, **SMALL)
TOLD = Told(num_heads=3)
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Scaled(torch.nn.Module):
    """A layer whose output is scaled by channel."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.gamma = torch.nn.Parameter(torch.linspace(-1, 2, 24))

    def forward(self, x):
        return self.layer(x) * self.gamma


def ours(path, told=TOLD):
    """(the report's notes, logits) of what `path` is converted to."""
    converted = convert.read(path, told)
    model = converted.layout.model.build()
    with jax.default_matmul_precision("highest"):
        out = model.apply({"params": converted.params["encoder"]}, IMAGES.numpy().transpose(0, 2, 3, 1))
    return " ".join(converted.layout.notes), np.asarray(out.logits)


def assert_same(found, expected):
    expected = expected.detach().numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def model():
    return torch_files.build(lambda: vit.ViT(CFG), seed=3)


@pytest.mark.parametrize("names", [("ls1.gamma", "ls2.gamma"), ("gamma_1", "gamma_2")])
def test_layer_scale(names, tmp_path):
    net = model()
    state = net.state_dict()
    for i, block in enumerate(net.blocks):
        block.attn.proj, block.mlp.fc2 = Scaled(block.attn.proj), Scaled(block.mlp.fc2)
        for name, layer in zip(names, (block.attn.proj, block.mlp.fc2), strict=True):
            state[f"blocks.{i}.{name}"] = layer.gamma.data
    torch.save({"model": state}, tmp_path / "x.pth")
    notes, logits = ours(tmp_path / "x.pth")
    assert "LayerScale is multiplied into attn.proj and mlp.fc2" in notes
    assert_same(logits, net(IMAGES).logits)


def gammas(*keys):
    return {key: np.ones(24, np.float32) for key in keys}


@pytest.mark.parametrize(
    ("extra", "settings", "message"),
    [
        (gammas("blocks.0.ls1.gamma"), {}, "there are 1 of 4 gammas"),
        (gammas("blocks.0.ls1.gamma", "blocks.0.gamma_1", "blocks.1.ls1.gamma"), {}, "there are 3 of 4 gammas"),
        ({}, {"architecture": "vit", "model_args": {"init_values": 1e-5}}, "there are 0 of 4 gammas"),
        (
            {f"blocks.{i}.ls{j}.gamma": np.ones(12, np.float32) for i in (0, 1) for j in (1, 2)},
            {},
            "blocks.0.ls1.gamma scales blocks.0.attn.proj.weight, which is not there or of another size",
        ),
    ],
)
def test_layer_scale_that_does_not_fit(extra, settings, message):
    rejected(message, weights() | extra, settings, form="timm" if settings else "pth")


def test_timm_says_that_there_is_layer_scale():
    extra = gammas(*(f"blocks.{i}.ls{j}.gamma" for i in (0, 1) for j in (1, 2)))
    settings = {"architecture": "vit", "model_args": {"init_values": 1e-5}}
    assert understand(weights() | extra, settings, form="timm").model.depth == 2
    assert understand(weights(), {"architecture": "vit", "model_args": {"init_values": None}}, form="timm")


def without_bias():
    net = model()
    for block in net.blocks:
        block.attn.qkv.bias = None
    return net


def test_no_bias_of_q_k_v(tmp_path):
    net = without_bias()
    save_file(net.state_dict(), tmp_path / "x.safetensors")
    notes, logits = ours(tmp_path / "x.safetensors")
    assert "q, k and v have no bias" in notes
    assert_same(logits, net(IMAGES).logits)


def test_a_bias_that_is_lost(tmp_path):
    state = {key: v for key, v in model().state_dict().items() if key != "blocks.1.attn.qkv.bias"}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(convert.InputError, match="there is no blocks.1.attn.qkv.bias"):
        convert.read(tmp_path / "x.pth", TOLD)


@pytest.mark.parametrize("has_bias", [False, True])
def test_transformers_without_a_bias(has_bias, tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=60, image_size=16, patch_size=8,
        num_labels=5, layer_norm_eps=1e-6, initializer_range=0.2, qkv_bias=False,
    )  # fmt: skip
    net = transformers.ViTForImageClassification(settings).eval()
    net.save_pretrained(tmp_path / "x")
    if has_bias:  # config.json of a model that has one, of which the file has none
        config_file = tmp_path / "x" / "config.json"
        config_file.write_text(config_file.read_text().replace('"qkv_bias": false', '"qkv_bias": true'))
        with pytest.raises(convert.InputError, match="there is no blocks.0.attn.qkv.bias"):
            convert.read(tmp_path / "x")
        return
    _, logits = ours(tmp_path / "x", Told())
    assert_same(logits, net(IMAGES).logits)


def test_transformers_says_that_there_is_no_bias():
    from tinymim_jax.bridge.formats import to_hf

    rejected("qkv_bias is false, but there is blocks.0", to_hf(weights(), ""), {"qkv_bias": False}, form="huggingface")


def probe():
    """MAE's linear probe: a state dict, and its logits."""
    net, rng = model(), torch.Generator().manual_seed(7)
    norm = torch.nn.BatchNorm1d(24, affine=False, eps=1e-6)
    norm.running_mean.copy_(torch.randn(24, generator=rng))
    norm.running_var.copy_(torch.rand(24, generator=rng) * 0.01)
    net.head = torch.nn.Sequential(norm, net.head)
    return net.eval(), net.state_dict()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_batch_norm_of_a_linear_probe(prefix, tmp_path):
    net, state = probe()
    assert "head.0.num_batches_tracked" in state
    torch.save({"model": {prefix + key: v for key, v in state.items()}, "epoch": 89}, tmp_path / "x.pth")
    notes, logits = ours(tmp_path / "x.pth")
    assert "eps 1e-06, as in MAE's linear probe) is folded" in notes
    assert convert.read(tmp_path / "x.pth", TOLD).layout.kind == "MAE, linear probe"
    assert_same(logits, net(IMAGES).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.0.running_var": -torch.ones(24)}, "do not fit together, or a variance is negative"),
        ({"head.0.running_var": torch.ones(23)}, "do not fit together, or a variance is negative"),
        ({"head.1.bias": torch.ones(4)}, "do not fit together, or a variance is negative"),
        ({"head.1.weight": torch.ones(24)}, "do not fit together, or a variance is negative"),
        ({"head.1.weight": None}, "head.0.running_mean .* has no place"),
        ({"head.0.weight": torch.ones(24)}, "head.0.weight has no place"),  # of an eps that is not known
    ],
)
def test_a_linear_probe_that_does_not_fit(change, message, tmp_path):
    state = {key: v for key, v in {**probe()[1], **change}.items() if v is not None}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(convert.InputError, match=message):
        convert.read(tmp_path / "x.pth", TOLD)


@pytest.mark.parametrize(("width", "hidden"), [(28, 61), (44, 15), (24, 1), (24, 97)])
def test_a_hidden_width_whose_ratio_is_rounded(width, hidden, tmp_path):
    """28 * (61 / 28) is below 61 in floats."""
    cfg = config.ViT(width, 1, 2, mlp_ratio=(hidden + 0.5) / width, num_classes=5, **SMALL)
    net = torch_files.build(lambda: vit.ViT(cfg), seed=3)
    assert net.blocks[0].mlp.fc1.out_features == hidden
    torch.save(net.state_dict(), tmp_path / "x.pth")
    assert_same(ours(tmp_path / "x.pth", Told(num_heads=2))[1], net(IMAGES).logits)
