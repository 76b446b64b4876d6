"""What an encoder's config answers, of a ViT."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import reference
from tests.models.test_vit import TINY, pictures, shapes
from tinymim_jax.experiment import recipes
from tinymim_jax.experiment.config import ViT
from tinymim_jax.models import MODELS
from tinymim_jax.models.contract import PARTS
from tinymim_jax.runtime.errors import InputError

# Wide enough for the matmuls to be nearly all of XLA's count, which has the element-wise operations too.
WIDE = ViT(256, 3, 4, image_size=64, patch_size=8, pool="mean", num_classes=10)
BATCH = 2


def test_every_encoder_is_listed_by_its_kind():
    assert {kind: model.kind for kind, model in MODELS.items()} == {kind: kind for kind in MODELS}


# Parameters


def test_each_parameter_has_a_layer():
    model = dataclasses.replace(TINY, num_classes=5, dist_token=True, layer_scale=1.0)
    names = {f"encoder/{name}" for name in shapes(model)}
    layers = {name: model.layer_id(name) for name in names}
    assert {n for n, i in layers.items() if i == 0} == {
        f"encoder/{name}" for name in ("cls_token", "pos_embed", "patch_embed/kernel", "patch_embed/bias")
    }
    for i in (1, 2, 3):
        assert {n for n, layer in layers.items() if layer == i} == {n for n in names if f"block{i}/" in n}
    assert {n for n in names if layers[n] == 4} == {
        n for n in names if n.split("/")[1] in ("dist_token", "norm", "head", "head_dist")
    }
    assert {model.block_of(name) for name in names} == {None, 1, 2, 3}
    for unknown in ("encoder/nonsense", "pretext/norm/scale", "encoder/block1"):
        with pytest.raises(InputError, match=f"a ViT has no parameter {unknown}"):
            model.layer_id(unknown)


def test_block_1_is_not_block_12():
    model = ViT(12, 12, 3)
    name = "encoder/block{}/attn/qkv/kernel"
    assert [model.reads(name.format(i), 1, "qkv") for i in (1, 11, 12)] == [True, False, False]


@pytest.mark.parametrize("part", PARTS)
def test_what_a_block_reads_is_what_its_output_depends_on(part):
    cfg = dataclasses.replace(TINY, relative_position=True, layer_scale=0.5)
    model, params = cfg.build(), reference.random_params(cfg.build().init, pictures())

    def output(p):
        trace = model.apply({"params": p}, pictures(), capture=(2,)).trace[2]
        qkv = (trace.q**2).mean() + (trace.k**2).mean() + (trace.v**3).mean()
        of = {"norm1": (trace.norm1**3).mean(), "qkv": qkv}
        return (of | {"attention": (trace.mid**3).mean(), "all": (trace.out**3).mean()})[part]

    gradients = jax.tree_util.tree_leaves_with_path({"encoder": jax.jit(jax.grad(output))(params)})
    assert len(gradients) > 49
    for path, gradient in gradients:
        name = "/".join(part.key for part in path)
        assert cfg.reads(name, 2, part) == bool(np.any(gradient)), name


def test_half_trained_is_the_first_block_of_which_a_part_was_trained():
    parts = [f"encoder/block{i}/{part}" for i in (1, 2, 3) for part in ("attn/qkv/kernel", "mlp/fc1/kernel")]
    names = [*parts, "encoder/norm/scale", "encoder/pos_embed", "pretext/block1/bias"]
    assert TINY.half_trained(names, []) is None
    assert TINY.half_trained(names, ["encoder/pos_embed", "encoder/norm/scale"]) is None
    assert TINY.half_trained(names, parts[-1:]) == 3
    assert TINY.half_trained(names, parts[3:]) == 2  # and nothing behind it
    assert TINY.half_trained(names, parts) is None  # a linear probe's


# Other encoders made of it


@pytest.mark.parametrize(("block", "heads"), [(2, 3), (3, 6)])
def test_a_trunk_computes_what_the_whole_does(block, heads):
    whole = dataclasses.replace(TINY, num_classes=5, dist_token=True, relative_position=True, layer_scale=0.5)
    trunk = whole.trunk(block)
    assert (trunk.depth, trunk.heads_of(block), whole.heads_of(block)) == (block, heads, heads)
    assert whole.depth == 3 and whole.num_classes == 5  # left as it was
    params = reference.random_params(whole.build().init, pictures())
    needed = set(shapes(trunk))
    assert needed == {n for n in shapes(whole) if whole.layer_id(f"encoder/{n}") <= block} | {"dist_token"}
    kept = {name: value for name, value in params.items() if any(n.split("/")[0] == name for n in needed)}
    found = trunk.build().apply({"params": kept}, pictures(), capture=(block,)).trace[block]
    expected = whole.build().apply({"params": params}, pictures(), capture=(block,)).trace[block]
    normed, expected = expected.normed, expected.replace(normed=None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    kept["norm"] = params["norm"]
    found = whole.trunk(block, norm=True).build().apply({"params": kept}, pictures(), capture=(block,))
    np.testing.assert_allclose(found.trace[block].normed, normed, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.tokens, found.trace[block].normed)
    with pytest.raises(InputError, match="x: model.pool 'mean' has no norm behind the blocks; set it to 'cls'"):
        dataclasses.replace(whole, pool="mean").check_norm("x")
    whole.check_norm("x")


def test_computing_like_another():
    other = ViT(16, 1, 2, image_size=32, patch_size=8, dtype="bfloat16", attention="cudnn", remat=True)
    teacher = dataclasses.replace(TINY, remat=True, last_block_heads=None)
    expected = dataclasses.replace(teacher, image_size=32, dtype="bfloat16", attention="cudnn", remat=False)
    assert teacher.computing_like(other) == expected
    assert teacher.image_size == 16  # left as it was
    with pytest.raises(InputError, match="the teacher: attention 'cudnn' takes .* 4 heads are 6 wide"):
        dataclasses.replace(teacher, num_heads=4).computing_like(other)
    with pytest.raises(InputError, match="image_size 18 is not a multiple of patch_size 4"):
        teacher.computing_like(dataclasses.replace(other, image_size=18))


# Features


@pytest.mark.parametrize(
    ("fields", "read"),
    [
        ({}, lambda tokens: tokens[:, 1:].mean(axis=1)),
        ({"num_classes": 5}, lambda tokens: tokens[:, 0]),
        ({"num_classes": 5, "pool": "mean"}, lambda tokens: tokens[:, 1:].mean(axis=1)),
        ({"num_classes": 5, "pool": "mean", "dist_token": True}, lambda tokens: tokens[:, 2:].mean(axis=1)),
    ],
)
def test_features_are_the_token_that_the_head_reads_or_the_mean_patch(fields, read):
    cfg = dataclasses.replace(TINY, **fields)
    params = reference.random_params(cfg.build().init, pictures())
    out = cfg.build().apply({"params": params}, pictures(), capture=(2,))
    variables = {"params": {"encoder": params, "pretext": {}}}
    found = cfg.outputs(variables, pictures())
    reference.close(found.features, read(reference.f64(out.tokens)))
    assert (found.logits is None) == (not cfg.num_classes)
    inner = cfg.outputs(variables, pictures(), block=2)
    reference.close(inner.features, read(reference.f64(out.trace[2].out)))
    assert inner.logits is None
    assert found.features.dtype == inner.features.dtype == jnp.float32


# Cost


def matmul(m, k, n):
    return 2 * m * k * n


def block(n, d, hidden):
    """(q, k, v; the rest)."""
    attention = matmul(n, d, n) + matmul(n, n, d) + matmul(n, d, d)
    return matmul(n, d, 3 * d), attention + matmul(n, d, hidden) + matmul(n, hidden, d)


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("tokens", [1, 2])
def test_forward_against_a_list_of_matmuls(tokens):
    cfg = ViT(12, 5, 3, mlp_ratio=2.5, image_size=20, patch_size=5, num_classes=7, dist_token=tokens == 2)
    embed, head = matmul(16, 75, 12), matmul(tokens, 12, 7)
    assert cfg.forward_flops() == embed + 5 * sum(block(16 + tokens, 12, 30)) + head
    assert cfg.forward_flops(patches=4) == matmul(4, 75, 12) + 5 * sum(block(4 + tokens, 12, 30)) + head
    assert cfg.forward_flops(block=2) == embed + 2 * sum(block(16 + tokens, 12, 30))  # it does not reach the head


def test_a_neck_is_counted():
    cfg = ViT(12, 1, 3, image_size=20, patch_size=5, pool="mean", num_classes=7)
    neck = dataclasses.replace(cfg, neck=40)
    assert neck.forward_flops() - cfg.forward_flops() == matmul(17, 12, 40) + matmul(1, 40 - 12, 7)


def test_q_k_and_v_are_all_that_is_counted_of_a_block():
    cfg = ViT(12, 5, 3, image_size=20, patch_size=5)
    qkv, rest = block(17, 12, 48)
    assert cfg.forward_flops(block=3, part="qkv") == matmul(16, 75, 12) + 2 * (qkv + rest) + qkv
    # The backward pass: two matmuls for each, but none for the pixels.
    assert cfg.train_flops(block=3, part="qkv") == 2 * matmul(16, 75, 12) + 3 * (2 * (qkv + rest) + qkv)


def test_frozen_blocks_are_only_passed_forward():
    cfg = ViT(12, 5, 3, image_size=20, patch_size=5, num_classes=7)
    whole, embed, head = sum(block(17, 12, 48)), matmul(16, 75, 12), matmul(1, 12, 7)
    assert cfg.train_flops(frozen_blocks=2) == embed + 2 * whole + 3 * (3 * whole + head)
    assert cfg.train_flops(frozen_blocks=5) == cfg.forward_flops() + 2 * head


def test_vit_b_16_has_its_known_cost():
    np.testing.assert_allclose(recipes.vit("base", num_classes=1000).forward_flops(), 2 * 17.56e9, rtol=2e-3)


def test_cost_against_xla():
    """Blocks behind the one that is read are not computed."""
    model = WIDE.build()
    images = jax.ShapeDtypeStruct((BATCH, 64, 64, 3), "float32")
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def qkv(v, x):
        trace = model.apply(v, x, capture=(2,)).trace[2]
        return trace.q, trace.k, trace.v

    logits = compiled(lambda v, x: model.apply(v, x).logits, variables, images) / BATCH
    assert 1 < logits / WIDE.forward_flops() < 1.05
    counted = WIDE.forward_flops(block=2, part="qkv")
    np.testing.assert_allclose(compiled(qkv, variables, images) / BATCH, counted, rtol=0.05)
