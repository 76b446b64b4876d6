"""Hiera against transformers' classes with random weights, and what its config answers."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import HieraConfig, HieraForImageClassification, HieraForPreTraining

from tests.models import reference
from tests.models.test_vit import flat, pictures, shapes
from tests.tasks.test_contract import flops_ratio
from tinymim_jax.experiment.config import (
    AttentionLogits,
    Classify,
    Data,
    Decoder,
    Distill,
    Hiera,
    Init,
    Mae,
    Reconstruction,
    Relation,
    ViT,
)
from tinymim_jax.models.contract import PARTS
from tinymim_jax.models.mae import mask_by_noise
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import STREAMS, Context
from tinymim_jax.weights.parameters import flatten, unflatten

T, B, S = (1, 2, 7, 2), (2, 3, 16, 3), (1, 2, 11, 2)
SIZES = {
    "T, 46": (46, T, 1, 6_694_966),
    "T": (96, T, 1, 27_910_216),
    "S": (96, S, 1, 35_008_072),
    "B": (96, B, 1, 51_524_968),
    "B+": (112, B, 2, 69_896_616),
    "L": (144, (2, 6, 36, 4), 2, 213_739_912),
    "H": (256, (2, 6, 36, 4), 4, 672_779_752),
}
SMALL = Hiera(8, (1, 2, 3, 1), 1, image_size=64)  # 2 x 2 units
MASKED = dataclasses.replace(SMALL, q_pool=2, fusion=True)


def count(params):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("size", SIZES)
def test_number_of_parameters(size):
    width, stages, heads, parameters = SIZES[size]
    assert count(shapes(Hiera(width, stages, heads, num_classes=1000))) == parameters


@pytest.mark.parametrize(
    ("width", "stages", "decoder", "bare", "whole"),
    [
        (46, T, Decoder(96, 1, 3, posembed="trainable"), 6_325_230, 6_973_838),
        (96, T, Decoder(posembed="trainable"), 27_139_680, 55_020_896),
        (96, B, Decoder(posembed="trainable"), 50_754_432, 78_635_648),
    ],
)
def test_number_of_parameters_of_an_auto_encoder(width, stages, decoder, bare, whole):
    assert count(shapes(Hiera(width, stages))) == bare
    model = Hiera(width, stages, q_pool=2, fusion=True)
    task = Mae(decoder, 0.6).build(Context(model, Data("digits", image_size=224)))
    batch = {"image": jax.ShapeDtypeStruct((1, 224, 224, 3), "uint8")}
    assert count(jax.eval_shape(task.init, jax.random.key(0), batch)[0]) == whole


# Against transformers

PLACES = (  # of a name there -> here
    (r"^hiera\.", ""),
    (r"embeddings\.patch_embeddings\.projection\.", "encoder/patch_embed/"),
    (r"embeddings\.position_embeddings", "encoder/pos_embed"),
    (r"pooler\.layernorm\.", "encoder/norm/"),
    (r"encoder_norm\.", "encoder/norm/"),
    (r"classifier\.", "encoder/head/"),
    (r"multiscale_fusion\.multi_scale_fusion_heads\.(\d)\.", lambda m: f"encoder/fuse{int(m[1]) + 1}/"),
    (r"decoder\.mask_token", "pretext/decoder/mask_token"),
    (r"decoder\.decoder_position_embeddings", "pretext/decoder/pos_embed"),
    (r"decoder\.decoder_embeddings\.", "pretext/decoder/embed/"),
    (r"decoder\.decoder_block\.layers\.(\d+)\.", lambda m: f"pretext/decoder/block{int(m[1]) + 1}/"),
    (r"decoder\.decoder_(norm|pred)\.", r"pretext/decoder/\1/"),
    (r"layernorm_before\.", "norm1/"),
    (r"layernorm_after\.", "norm2/"),
    (r"attn\.(qkv|proj)\.", r"attn/\1/"),
    (r"mlp\.(fc\d)\.", r"mlp/\1/"),
    (r"(?<=\d/)proj\.", "shortcut/"),
    (r"(norm\d?/)weight$", r"\1scale"),
    (r"weight$", "kernel"),
)


def ours(state, cfg, like):
    """transformers' state_dict as our tree, in the shapes of `like`."""
    found = {}
    for name, tensor in state.items():
        stage = re.sub(
            r"encoder\.stages\.(\d)\.layers\.(\d+)\.",
            lambda m: f"encoder/block{sum(cfg.stages[: int(m[1])]) + int(m[2]) + 1}/",
            name,
        )
        key = functools.reduce(lambda text, place: re.sub(*place, text), PLACES, stage)
        array = tensor.detach().numpy()
        if key.startswith("pretext/decoder/pred/"):  # pixels there are (channel, row, column)
            array = array.reshape(3, 16, 16, *array.shape[1:])
            array = np.moveaxis(array, 0, 2).reshape(768, *array.shape[3:])
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        elif key.endswith("/kernel"):
            array = array.T
        found[key] = array.reshape(like[key].shape)
    assert found.keys() == like.keys()
    return unflatten(found)


def rolled(x, side):
    """Tokens in transformers' order, [B, N, C], as [B, U, side, side, C]."""
    b, n, c = x.shape
    bits = side.bit_length() - 1
    x = x.reshape(b, *(2, 2) * bits, n // side**2, c)  # finest row and column first
    axes = [0, 2 * bits + 1, *range(2 * bits - 1, 0, -2), *range(2 * bits, 0, -2), 2 * bits + 2]
    return x.transpose(axes).reshape(b, n // side**2, side, side, c)


def drawn(cls, cfg, **settings):
    """A model there with biases and scales that are not those of the beginning."""
    torch.manual_seed(0)
    sides = {"image_size": (cfg.image_size,) * 2, "num_query_pool": cfg.q_pool, "embed_dim": cfg.width}
    heads = [cfg.num_heads * 2**i for i in range(4)]
    model = cls(HieraConfig(**sides, depths=cfg.stages, num_heads=heads, **settings)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def close(own, theirs, limit=1e-5):
    own, theirs = np.asarray(own), theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert own.shape == theirs.shape
    assert np.abs(own - theirs).max() <= limit * np.abs(theirs).max()


@pytest.mark.parametrize(
    "cfg",
    [
        Hiera(8, (1, 2, 3, 1), 1, image_size=64, num_classes=5),
        Hiera(8, (2, 3, 2, 2), 2, image_size=96, num_classes=5),
        pytest.param(Hiera(46, T, num_classes=1000), marks=pytest.mark.slow),
        pytest.param(Hiera(96, B, num_classes=1000), marks=pytest.mark.slow),
    ],
    ids=["tiny", "several heads", "T, 46", "B"],
)
def test_tokens_q_k_v_logits_and_gradients(cfg):
    theirs, seen = drawn(HieraForImageClassification, cfg, num_labels=cfg.num_classes).double(), {}
    layers = [layer for stage in theirs.hiera.encoder.stages for layer in stage.layers]
    for i, layer in enumerate(layers, 1):
        layer.attn.qkv.register_forward_hook(lambda _, __, out, i=i: seen.update({(i, "qkv"): out.detach().numpy()}))
        layer.register_forward_hook(lambda _, __, out, i=i: seen.update({(i, "out"): out[0].detach().numpy()}))
    images = pictures(2, size=cfg.image_size)
    logits = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2)).double()).logits
    weights = np.random.default_rng(1).normal(size=logits.shape).astype(np.float32)
    (logits * torch.from_numpy(weights)).sum().backward()

    like = {f"encoder/{key}": leaf for key, leaf in shapes(cfg).items()}
    params, blocks = ours(theirs.state_dict(), cfg, like)["encoder"], tuple(range(1, cfg.depth + 1))

    def run(params):
        out = cfg.build().apply({"params": params}, images, capture=blocks)
        return (out.logits * weights).sum(), out

    with jax.default_matmul_precision("highest"):
        (_, out), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    close(out.logits, logits)
    close(out.tokens, seen[cfg.depth, "out"])  # of 1 x 1 units, which are in order
    units = cfg.image_size // 32
    for i in blocks:
        trace, before = out.trace[i], cfg.side_of(max(i - 1, 1))
        tokens = rolled(seen[i, "out"], cfg.side_of(i)).reshape(2, units, units, cfg.side_of(i), cfg.side_of(i), -1)
        close(trace.out, tokens.swapaxes(2, 3).reshape(trace.out.shape))
        qkv = rolled(seen[i, "qkv"], before)
        each = np.split(qkv.reshape(*qkv.shape[:4], 3, cfg.heads_of(i), -1), 3, axis=4)
        for name, part in zip("qkv", (part.squeeze(4) for part in each), strict=True):
            if name == "q" and cfg.is_pooling(i):
                part = part.reshape(2, units**2, before // 2, 2, before // 2, 2, *part.shape[4:]).max((3, 5))
            if cfg.is_global(i):
                side = part.shape[2]
                part = part.reshape(2, units, units, side, side, *part.shape[4:]).swapaxes(2, 3)
                part = part.reshape(2, -1, *part.shape[5:])
            else:
                part = part.reshape(2, units**2, -1, *part.shape[4:])
            close(getattr(trace, name), part)
    wanted = ours({name: p.grad for name, p in theirs.named_parameters()}, cfg, like)["encoder"]
    for name, own in flatten(gradient).items():
        close(own, flatten(wanted)[name], 1e-4)


@pytest.mark.parametrize(
    ("cfg", "decoder", "ratio"),
    [
        (MASKED, Decoder(12, 2, 3, posembed="trainable"), 0.5),
        (dataclasses.replace(MASKED, stages=(2, 1, 1, 2), image_size=96), Decoder(8, 1, 2, posembed="trainable"), 0.6),
        pytest.param(Hiera(46, T, q_pool=2, fusion=True), Decoder(96, 1, 3, posembed="trainable"), 0.4,
                     marks=pytest.mark.slow),
    ],
    ids=["half", "upstream's", "MAE-Lite's"],
)  # fmt: skip
def test_loss_and_gradients_of_masked_auto_encoding(cfg, decoder, ratio):
    sizes = {"decoder_hidden_size": decoder.width, "decoder_depth": decoder.depth}
    theirs = drawn(
        HieraForPreTraining, cfg, **sizes, decoder_num_heads=decoder.num_heads, mask_ratio=ratio, layer_norm_eps=1e-6
    )
    raw = np.random.default_rng(0).integers(0, 256, (2, cfg.image_size, cfg.image_size, 3), np.uint8)
    noise = np.random.default_rng(1).uniform(size=(2, (cfg.image_size // 32) ** 2)).astype(np.float32)
    task = Mae(decoder, ratio).build(Context(cfg, Data("digits", image_size=cfg.image_size)))
    task._noise = lambda rng, batch: jnp.asarray(noise)
    batch = {"image": raw, "is_valid": np.ones(2, bool)}
    images = np.asarray(task.images(batch))
    out = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), noise=torch.from_numpy(noise))
    out.loss.backward()
    like = flatten(jax.eval_shape(task.init, jax.random.key(0), batch)[0]["params"])
    params = ours(theirs.state_dict(), cfg, like)
    rngs = {name: jax.random.key(0) for name in STREAMS}
    with jax.default_matmul_precision("highest"):
        pred, is_masked = jax.jit(task.reconstruct)(params, images, noise)
        loss, gradient = jax.jit(jax.value_and_grad(lambda p: task.loss(p, {}, {}, batch, rngs, train=True)[0]))(params)
    channels_last = out.logits.detach().numpy().reshape(*out.logits.shape[:2], 3, 16, 16).transpose(0, 1, 3, 4, 2)
    close(pred, channels_last.reshape(pred.shape))
    np.testing.assert_array_equal(is_masked, ~out.bool_masked_pos.numpy())
    assert float(loss) == pytest.approx(out.loss.item(), rel=1e-5)
    wanted = flatten(ours({name: p.grad for name, p in theirs.named_parameters()}, cfg, like))
    for name, own in flatten(gradient).items():
        close(own, wanted[name], 1e-4)


# Masks by unit


def test_a_masked_unit_is_hidden_with_all_its_patches():
    noise = np.array([[0.3, 0.1, 0.9, 0.5]], np.float32)
    keep, restore, is_masked = mask_by_noise(noise, 0.5, unit=2)
    assert keep.tolist() == [[1, 0]]
    assert np.asarray(restore).reshape(4, 4).tolist() == [[4, 5, 0, 1], [6, 7, 2, 3], [12, 13, 8, 9], [14, 15, 10, 11]]
    assert np.asarray(is_masked).reshape(4, 4).tolist() == [[False] * 4] * 2 + [[True] * 4] * 2


def test_what_a_mask_hides_reaches_no_token():
    params = reference.random_params(MASKED.build().init, pictures(size=64))
    keep = jnp.array([[3, 0], [1, 2]])
    run = jax.jit(lambda x: MASKED.build().apply({"params": params}, x, keep=keep).tokens)
    images = pictures(size=64)
    changed = images.copy()
    changed[0, :32, 32:] += 1.0  # unit 1, beside unit 0 and above unit 3
    changed[1, :32, :32] += 1.0
    assert run(images).shape == (2, 8, 64)
    np.testing.assert_array_equal(run(images), run(changed))
    whole = MASKED.build().apply({"params": params}, images)
    assert whole.tokens.shape == (2, 16, 64) and whole.logits is None


# What the config answers


def test_each_parameter_has_a_layer():
    names = {f"encoder/{name}" for name in shapes(dataclasses.replace(SMALL, num_classes=5)) | shapes(MASKED)}
    layers = {name: SMALL.layer_id(name) for name in names}
    assert {name.split("/")[1] for name, layer in layers.items() if layer == 0} == {"patch_embed", "pos_embed"}
    behind = {name.split("/")[1] for name, layer in layers.items() if layer == SMALL.depth + 1}
    assert behind == {"norm", "head", "fuse1", "fuse2"}
    assert all(f"/block{layer}/" in name for name, layer in layers.items() if 1 <= layer <= SMALL.depth)
    with pytest.raises(InputError, match="a Hiera has no parameter encoder/cls_token"):
        SMALL.layer_id("encoder/cls_token")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("block", [1, 4, 7])
def test_what_a_block_reads_is_what_its_output_depends_on(part, block):
    params = reference.random_params(SMALL.build().init, pictures(size=64))

    def output(p):
        trace = SMALL.build().apply({"params": p}, pictures(size=64), capture=(block,)).trace[block]
        qkv = (trace.q**2).mean() + (trace.k**2).mean() + (trace.v**3).mean()
        of = {"norm1": (trace.norm1**3).mean(), "qkv": qkv}
        return (of | {"attention": (trace.mid**3).mean(), "all": (trace.out**3).mean()})[part]

    for name, gradient in flatten({"encoder": jax.jit(jax.grad(output))(params)}).items():
        assert SMALL.reads(name, block, part) == bool(np.any(gradient)), name


def test_shapes_of_each_block():
    out = jax.eval_shape(SMALL.build().init_with_output, jax.random.key(0), pictures(size=64))[0]
    assert out.tokens.shape == (2, 4, 64) and SMALL.grid == 2 and SMALL.patch_size == 32
    blocks = tuple(range(1, 8))
    run = functools.partial(SMALL.build().init_with_output, capture=blocks)
    trace = jax.eval_shape(run, jax.random.key(0), pictures(size=64))[0].trace
    assert [trace[i].out.shape[1:] for i in blocks] == [
        (256, 8), (64, 16), (64, 16), (16, 32), (16, 32), (16, 32), (4, 64),
    ]  # fmt: skip
    assert [trace[i].q.shape[1:] for i in (1, 2, 4, 5, 7)] == [
        (4, 64, 1, 8), (4, 16, 2, 8), (4, 4, 4, 8), (16, 4, 8), (4, 8, 8),
    ]  # fmt: skip
    assert trace[2].k.shape[1:] == (4, 64, 2, 8) and trace[7].k.shape[1:] == (16, 8, 8)
    assert [SMALL.grid_of(i) for i in blocks] == [None, None, None, None, 4, 4, None]
    assert [SMALL.width_of(i) for i in blocks] == [8, 16, 16, 32, 32, 32, 64]


def test_a_trunk_computes_what_the_whole_does():
    params = reference.random_params(SMALL.build().init, pictures(size=64))
    trunk, images = SMALL.trunk(5), pictures(size=64)
    whole = jax.jit(lambda p: SMALL.build().apply({"params": p}, images, capture=(5,)).trace[5].out)(params)
    assert (trunk.stages, trunk.grid, trunk.depth) == ((1, 2, 2), 4, 5)
    own = {name: params[name] for name in {key.split("/")[0] for key in shapes(trunk)}}
    tokens = jax.jit(lambda p: trunk.build().apply({"params": p}, images).tokens)(own)
    np.testing.assert_allclose(tokens, whole, atol=1e-5)
    assert MASKED.trunk(7, norm=True).fusion and not MASKED.trunk(7).fusion


def test_drop_path_and_recomputation():
    cfg = dataclasses.replace(SMALL, drop_path=0.5)
    params, rngs = reference.random_params(cfg.build().init, pictures(size=64)), {"drop_path": jax.random.key(3)}

    def tokens(cfg, **how):
        return cfg.build().apply({"params": params}, pictures(size=64), **how).tokens

    dropped = tokens(cfg, train=True, rngs=rngs)
    assert not np.allclose(dropped, tokens(cfg))
    np.testing.assert_array_equal(tokens(cfg), tokens(SMALL, train=True))
    again = tokens(dataclasses.replace(cfg, remat=True), train=True, rngs=rngs)
    np.testing.assert_allclose(dropped, again, rtol=1e-5, atol=1e-5)


def test_initial_values_of_a_classifier():
    cfg = dataclasses.replace(SMALL, width=32, num_classes=50, weight_init="supervised")
    params = flat(jax.jit(cfg.build().init)(jax.random.key(0), pictures(size=64))["params"])
    for name, value in params.items():
        if name.startswith("head/"):
            assert np.std(value) == pytest.approx(2e-5, rel=0.2) if "kernel" in name else (value == 2e-5).all()
        elif name.endswith("/bias") and name != "patch_embed/bias":
            np.testing.assert_array_equal(value, np.float32(0.02))
        elif name.endswith("/kernel"):
            assert np.std(value) == pytest.approx(0.02, rel=0.1), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 48}, "image_size 48 is not a multiple of its units' 32"),
        ({"num_heads": 3}, "width 8 is not a multiple of num_heads 3"),
        ({"fusion": True, "num_classes": 5}, "set one of them only"),
    ],
)
def test_what_cannot_be_built(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SMALL, **changes).check("model")


@pytest.mark.parametrize(
    ("task", "cfg"),
    [
        (Mae(Decoder(192, 2, 4, posembed="trainable"), 0.5), dataclasses.replace(MASKED, width=128)),
        (Classify(mixup=0.0, cutmix=0.0), dataclasses.replace(SMALL, width=128, num_classes=100)),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_flops_against_xla(task, cfg):
    assert 0.93 < flops_ratio(task.build(Context(cfg, Data("digits", image_size=64))), 4) < 1.07


# Distillation

TEACHER = dataclasses.replace(MASKED, width=12, stages=(1, 2, 2, 2))


def distill(targets, teacher=TEACHER, student=MASKED, mask_ratio=0.5):
    task = Distill(Init("t"), targets, 0.0, mask_ratio)
    return task.build(Context(student, Data("digits", image_size=64), sources={"teacher": teacher}))


def test_d_mae_between_two_of_them_trains_all_that_is_read():
    targets = {"logits": AttentionLogits(7, 7), "pixels": Reconstruction(7, Decoder(12, 1, 2, posembed="trainable"))}
    task = distill(targets)
    batch = {"image": np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8), "is_valid": np.ones(2, bool)}
    variables, frozen = jax.jit(task.init)(jax.random.key(0), batch)
    rngs = {name: jax.random.key(i) for i, name in enumerate(STREAMS)}
    gradient = jax.jit(jax.grad(lambda p: task.loss(p, {}, frozen, batch, rngs, train=True)[0]))(variables["params"])
    without = {name for name, value in flatten(gradient).items() if not np.any(value)}
    assert without == {name for name in flatten(gradient) if task.is_untrained(name)} == set()
    teacher, student = jax.jit(functools.partial(task.passes, train=True, masked=True))(
        variables["params"], frozen, batch, rngs
    )
    assert teacher[7].q.shape == (2, 8, 8, 12) and student[7].q.shape == (2, 8, 8, 8)
    np.testing.assert_array_equal(teacher.restore, student.restore)


def test_relations_of_a_plain_vit_where_the_grids_agree():
    teacher, relation = ViT(24, 2, 8, image_size=64, patch_size=16), Relation(2, 7, cls=False)
    with pytest.raises(InputError, match="the teacher has 1 in front of a grid of side 4, the student 0 and 4"):
        distill({"relation": Relation(2, 7)}, teacher, dataclasses.replace(MASKED, fusion=False), 0.0)
    task = distill({"relation": relation}, teacher, dataclasses.replace(MASKED, fusion=False), 0.0)
    batch = {"image": np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8), "is_valid": np.ones(2, bool)}
    variables, frozen = jax.jit(task.init)(jax.random.key(0), batch)
    rngs = {name: jax.random.key(i) for i, name in enumerate(STREAMS)}
    loss, aux = jax.jit(functools.partial(task.loss, train=True))(variables["params"], {}, frozen, batch, rngs)
    assert np.isfinite(loss) and set(aux.metrics) == {"loss", "kl_qk", "kl_vv"}


@pytest.mark.parametrize("block", [1, 4])
def test_blocks_that_attend_within_windows_are_refused(block):
    with pytest.raises(InputError, match=f"block {block} of the student attends within windows"):
        distill({"logits": AttentionLogits(7, block)}, mask_ratio=0.0)
