"""Encoder, pyramid and heads against `transformers`' BEiT with UPerNet, with the same weights.

What transformers 5.24 has otherwise than mmseg: its out_indices count from 1 the tokens in front of the first block, so
that i names the output of block i - 1; there is no dropout before the classifier. Norms, GELU, ReLU, the place of each
BatchNorm, align_corners=False and the order of concatenation are the same.
"""

import copy
import functools

import jax
import numpy as np
import pytest

from tests.models import reference
from tests.models.segment import draw, maps, taps, variables
from tests.models.test_vit import flat
from tinymim_jax.experiment.config import ViT
from tinymim_jax.models.pyramid import Pyramid
from tinymim_jax.models.segment_heads import Fcn, UPer

torch = pytest.importorskip("torch")
CLASSES = 7
ENCODER = ViT(
    32, 4, 4, image_size=64, patch_size=16, posembed="trainable", relative_position=True, layer_scale=0.5, pool="mean"
)
UPER, AUXILIARY = UPer(32, dropout=0.0), Fcn(16, dropout=0.0)


class Whole:
    """Encoder, pyramid and two heads; variables are nested by the names of these."""

    def __init__(self):
        self.pyramid, self.head = Pyramid().build("float32"), UPER.build(CLASSES, "float32")
        self.encoder, self.auxiliary = ENCODER.build(), AUXILIARY.build(CLASSES, "float32")

    def init(self, images):
        encoder = {"params": reference.random_params(self.encoder.init, images)}
        for i in range(1, 5):
            encoder["params"][f"block{i}"]["attn"]["qkv"]["bias"][1] = 0  # BEiT's k has none
        made = {"encoder": encoder, "pyramid": variables(self.pyramid, taps(4, 32))}
        heads = {name: variables(getattr(self, name), maps(4, 32)) for name in ("head", "auxiliary")}
        return {**made, **heads}

    def apply(self, params, state, images, train):
        trace = self.encoder.apply({"params": params["encoder"]}, images, capture=(1, 2, 3, 4)).trace
        x, found = [trace[i].out[:, 1:].reshape(len(images), 4, 4, 32) for i in (1, 2, 3, 4)], {}

        def run(name, x):
            held = {"params": params[name], "batch_stats": state[name]}
            out, changed = getattr(self, name).apply(held, x, train, mutable=["batch_stats"])
            found[name] = changed["batch_stats"]
            return out

        x = run("pyramid", x)
        return (run("head", x), run("auxiliary", x)), found


def theirs_of(tree, leaf_names):
    """{name in transformers: array in torch's layout} of parameters or gradients of a `Whole`; or of its statistics."""
    found = {}
    for name, value in flat(tree).items():
        *path, leaf = name.split("/")
        if leaf not in leaf_names:
            continue
        if path[0] == "encoder":
            found |= encoder_of(path[1:], leaf, np.asarray(value))
        elif leaf == "kernel":
            up = "_up" in path[-1]
            found[f"{place(path)}.weight"] = np.asarray(value).transpose((0, 3, 1, 2) if up else (3, 2, 0, 1))
        else:
            found[f"{place(path)}.{leaf_names[leaf]}"] = np.asarray(value)
    return found


LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"} | dict.fromkeys(
    ("cls_token", "pos_embed", "dist_token"), ""
)
STATISTICS = {"mean": "running_mean", "var": "running_var"}


def place(path):
    """Of a layer of the pyramid or a head."""
    part, layer, *rest = path
    if part == "pyramid":
        return "fpn." + {
            "level1_up1": "fpn1.conv_transpose1", "level1_norm": "fpn1.normalization",
            "level1_up2": "fpn1.conv_transpose2", "level2_up": "fpn2",
        }[layer]  # fmt: skip
    part = {"head": "decode_head", "auxiliary": "auxiliary_head"}[part]
    if layer == "classifier":
        return f"{part}.classifier"
    pools = {f"pool{n}": f"psp_modules.blocks.{i}.conv" for i, n in enumerate((1, 2, 3, 6))}
    several = {f"{ours}{i + 1}": f"{theirs}.{i}" for ours, theirs in (("lateral", "lateral_convs"), ("fpn", "fpn_convs"),
                                                                     ("conv", "convs")) for i in range(3)}  # fmt: skip
    layer = (pools | several | {"bottleneck": "psp_bottleneck", "fuse": "fpn_bottleneck"})[layer]
    return f"{part}.{layer}.{ {'conv': 'convolution', 'norm': 'normalization'}[rest[0]] }"


def encoder_of(path, leaf, value):
    if not path:
        names = {"cls_token": "cls_token", "pos_embed": "position_embeddings"}
        return {f"beit.embeddings.{names[leaf]}": value}
    if path == ["patch_embed"]:
        value = value.reshape(16, 16, 3, 32).transpose(3, 2, 0, 1) if leaf == "kernel" else value
        return {f"beit.embeddings.patch_embeddings.projection.{LEAVES[leaf]}": value}
    block, layer = f"beit.layers.{int(path[0][5:]) - 1}", "/".join(path[1:])
    if layer == "attn/qkv":
        parts = {f"{block}.attention.{n}_proj.{LEAVES[leaf]}": value[..., i, :, :] for i, n in enumerate("qkv")}
        parts = {name: part.reshape(*part.shape[:-2], 32).T for name, part in parts.items()}
        return {name: part for name, part in parts.items() if not name.endswith("k_proj.bias")}
    if layer == "attn/relative_position":
        return {f"{block}.relative_position_bias.relative_position_bias_table": value}
    if layer.startswith("gamma"):
        return {f"{block}.lambda_{layer[-1]}": value}
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn/proj": "attention.o_proj",
             "mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}  # fmt: skip
    return {f"{block}.{names[layer]}.{LEAVES[leaf]}": value.T if leaf == "kernel" else value}


@functools.cache
def beit():
    """(theirs in float64, ours, our parameters and state, images); their fifth block is not read."""
    transformers = pytest.importorskip("transformers", minversion="5.20")
    config = transformers.BeitConfig(
        hidden_size=32, num_hidden_layers=5, num_attention_heads=4, intermediate_size=128, image_size=64, patch_size=16,
        use_relative_position_bias=True, use_absolute_position_embeddings=True, layer_scale_init_value=0.5,
        out_indices=[2, 3, 4, 5], num_labels=CLASSES, auxiliary_channels=16, drop_path_rate=0.0, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs, whole, images = transformers.BeitForSemanticSegmentation(config), Whole(), draw(3, 64, 64, 3)
    made = whole.init(images)
    params, state = ({k: v.get(kind, {}) for k, v in made.items()} for kind in ("params", "batch_stats"))
    arrays = {**theirs_of(params, LEAVES), **theirs_of(state, STATISTICS)}
    missing = theirs.load_state_dict({k: torch.tensor(v) for k, v in arrays.items()}, strict=False)
    assert not missing.unexpected_keys
    assert all("layers.4." in k or k.endswith("num_batches_tracked") for k in missing.missing_keys)
    return theirs.double(), whole, params, state, images


def their_logits(theirs, images):
    """Of both heads, [B, h, w, C]."""
    seen = []
    hook = theirs.auxiliary_head.register_forward_hook(lambda module, args, out: seen.append(out))
    logits = theirs(torch.tensor(images).double().permute(0, 3, 1, 2)).logits
    hook.remove()
    return [x.permute(0, 2, 3, 1) for x in (logits, *seen)]


def test_logits_are_those_of_beit():
    theirs, whole, params, state, images = beit()
    with jax.default_matmul_precision("highest"):
        out, _ = jax.jit(lambda p, x: whole.apply(p, state, x, False))(params, images)
    with torch.no_grad():
        for ours, wanted in zip(out, their_logits(theirs.eval(), images), strict=True):
            reference.close(ours, wanted, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_logits_statistics_and_gradients_are_those_of_beit(train):
    theirs, whole, params, state, images = beit()
    theirs = copy.deepcopy(theirs).train(train)
    cotangents = [draw(3, 16, 16, CLASSES, seed=8), draw(3, 4, 4, CLASSES, seed=9)]

    @jax.jit
    def compute(params, images):
        out, pull, found = jax.vjp(lambda p: whole.apply(p, state, images, train), params, has_aux=True)
        return out, pull(tuple(cotangents))[0], found

    with jax.default_matmul_precision("highest"):
        out, gradients, found = compute(params, images)
    expected = their_logits(theirs, images)
    for ours, wanted, cotangent in zip(out, expected, cotangents, strict=True):
        reference.close(ours, wanted.detach(), 1e-4 if train else 1e-5)
        (wanted * torch.tensor(cotangent)).sum().backward(retain_graph=True)
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    ours = theirs_of(gradients, LEAVES)
    assert set(ours) == set(grads)
    for name, value in ours.items():
        if not train or np.abs(grads[name]).max() > 1e-9:  # a norm of the batch takes a bias in front of it away
            reference.close(value, grads[name], 1e-4)
    held = dict(theirs.named_buffers())
    for name, value in theirs_of(found, STATISTICS).items():
        reference.close(value, held[name], 1e-5)
