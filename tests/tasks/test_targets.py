"""Each target against its formula, alone and beside others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import reference
from tests.tasks import stages
from tinymim_jax.experiment.config import AttentionLogits, ClassToken, Feature, Relation
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.targets.contract import Captures


def compiled(targets, **fields):
    """A task without colour jitter, so that both see the same images."""
    return stages.Compiled(stages.distill(targets, color_jitter=0.0, **fields))


def blocks_of(run, images, teacher_heads=(3, 3, 3, 3), student_heads=(2, 2, 3)):
    """Every block of teacher and student, in float64, for images uint8."""
    images, teacher = stages.normalised(images), run.frozen["teacher"]["encoder"]
    depth = sum(name.startswith("block") for name in teacher)
    return (
        reference.vit(teacher, images, 4, teacher_heads[:depth]),
        reference.vit(run.params["encoder"], images, 4, student_heads),
    )


def relation_terms(names, teacher, student):
    """{kl_<name>: value} between two blocks."""
    return {f"kl_{a}{b}": reference.relation_kl((teacher[a], teacher[b]), (student[a], student[b])) for a, b in names}


def feature_loss(params, teacher, student, beta):
    """Table 6: a projection of the student, the teacher's LayerNorm without affine, smooth L1."""
    norm = {"scale": np.ones(teacher.shape[-1]), "bias": np.zeros(teacher.shape[-1])}
    error = np.abs(reference.linear(params, student) - reference.layer_norm(norm, teacher))
    return np.where(error <= beta, 0.5 * error**2 / beta, error - beta / 2).mean()


# Relations


@pytest.mark.parametrize("names", [("qk", "vv"), ("qq", "kk", "vv"), ("vv",)], ids="+".join)
def test_relations_against_float64(names):
    run = compiled({"relation": Relation(3, 3, names)})
    batch = stages.batch(is_valid=[1, 1, 0, 1])
    loss, aux = run.loss(batch, train=False)
    teacher, student = (blocks[2] for blocks in blocks_of(run, batch["image"][[0, 1, 3]]))
    terms = relation_terms(names, teacher, student)
    np.testing.assert_allclose(loss, sum(terms.values()), rtol=1e-5)
    assert aux.metrics.keys() == {"loss", *terms}
    for name, value in terms.items():
        np.testing.assert_allclose(aux.metrics[name].value(), value, rtol=1e-5)


def test_default_relations():
    assert Relation(18).relations == ("qk", "vv")


@pytest.mark.parametrize("block", [2, 4])
def test_a_teacher_is_read_as_if_its_block_had_that_many_heads(block):
    """Bit for bit: a block of 3 heads, read with 4, is that of a teacher built so from the same weights."""
    task = stages.distill({"relation": Relation(block, 3, heads=4)}, last_block_heads=4)
    params, frozen = stages.weights(task)
    teacher, student = task.passes(params, frozen, stages.batch(), stages.rngs(), train=False, masked=False)
    found, other = task.targets["relation"].read(teacher, student)
    assert other is student[3] and teacher[block].q.shape == (4, 17, 3, 8)
    built = dataclasses.replace(stages.TEACHER, depth=block, last_block_heads=4, pool="mean")
    weights = jax.tree.map(np.copy, frozen["teacher"]["encoder"])
    qkv = weights[f"block{block}"]["attn"]["qkv"]
    qkv["kernel"], qkv["bias"] = qkv["kernel"].reshape(24, 3, 4, 6), qkv["bias"].reshape(3, 4, 6)
    images = task.images(stages.batch())
    expected = built.build().apply({"params": weights}, images, capture=(block,)).trace[block]
    for name in ("q", "k", "v"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.q.shape == (4, 17, 4, 6)


def test_the_loss_with_regrouped_heads():
    run = compiled({"relation": Relation(4, 3, heads=4)}, last_block_heads=4)
    batch = stages.batch()
    # The reference takes the channels in torch's layout, in which the same weights serve any number of heads.
    teacher, student = (blocks[-1] for blocks in blocks_of(run, batch["image"], (3, 3, 3, 4), (2, 2, 4)))
    expected = sum(relation_terms(("qk", "vv"), teacher, student).values())
    np.testing.assert_allclose(run.loss(batch, train=False)[0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("target", "model", "message"),
    [
        (
            Relation(3, 3, heads=5),
            {},
            r"task\.targets\.relation\.heads 5 does not divide 24, .* block 3, which was trained with 3 heads",
        ),
        (
            Relation(3, 3),
            {"last_block_heads": 4},
            r"the student's block 3 has 4 heads, the teacher's block 3 has 3; give that block of the student 3"
            r" \(model\.last_block_heads\), or set task\.targets\.relation\.heads=4",
        ),
        (Relation(3, 3, heads=6), {}, "student's block 3 has 3 heads, the teacher's block 3 has 6; .*heads=3"),
        (Relation(3, 3), {"patch_size": 8}, "in front of a grid of side 4, the student 1 and 2"),
        (
            Relation(3, 3),
            {"num_classes": 5, "dist_token": True},
            "a model with a distillation token has no part in them",
        ),
        (Relation(3, 3, ()), {}, r"task\.targets\.relation\.relations \(\) must name at least one relation"),
        (Relation(3, 3, ("qk", "qk")), {}, r"relations \('qk', 'qk'\) must name .* each once"),
        (Relation(5, 3), {}, "teacher_block 5 is beyond the teacher's 4 blocks"),
        (Feature(5, 3), {}, "teacher_block 5 is beyond the teacher's 4 blocks"),
        (
            Feature(4, 3, ()),
            {},
            r"task\.targets\.feature\.tensors \(\) must name at least one of out, mlp_out, .*, normed, each",
        ),
        (Feature(4, 3, ("q", "q")), {}, r"tensors \('q', 'q'\) must name .* each once"),
        (
            Relation(3, 3, relation_heads=5),
            {},
            r"task\.targets\.relation\.relation_heads 5 does not divide 24, the teacher",
        ),
        (Relation(3, 3, heads=4, relation_heads=6), {}, "heads splits the teacher, relation_heads both; set one"),
        (Relation(3, 3, relation_heads=8), {}, "relation_heads 8 does not divide 12, the student's width"),
        (ClassToken(5, 3), {}, "teacher_block 5 is beyond the teacher's 4 blocks"),
        (
            AttentionLogits(3, 2, adapter=False),
            {},
            r"the student's block 2 has 2 heads, the teacher's block 3 has 3; set task\.targets\.attention_logits\.adapter",
        ),
        (AttentionLogits(3, 3), {"patch_size": 8}, "teacher and student differ in their tokens"),
        (Feature(3, 3), {"patch_size": 8}, r"task\.targets\.feature: teacher and student differ in their tokens"),
        (Feature(3, 3), {"dist_token": True, "num_classes": 5}, r"task\.targets\.feature: .* no token has a counter"),
    ],
)
def test_targets_that_do_not_fit(target, model, message):
    with pytest.raises(InputError, match=message) as error:
        stages.distill({target.kind: target}, **model)
    assert "\n" not in str(error.value)


# Features


@pytest.mark.parametrize(("target", "beta"), [(Feature(4, 3), 2.0), (Feature(2, 2, beta=0.5), 0.5)])
def test_features_against_float64(target, beta):
    run = compiled({"feature": target})
    batch = stages.batch(is_valid=[1, 1, 0, 1])
    loss, aux = run.loss(batch, train=False)
    teacher, student = blocks_of(run, batch["image"][[0, 1, 3]])
    own = run.params["pretext"]["feature"]["out"]
    assert {name: value.shape for name, value in own.items()} == {"kernel": (12, 24), "bias": (24,)}
    outs = teacher[target.teacher_block - 1]["out"], student[target.student_block - 1]["out"]
    expected = feature_loss(own, *outs, beta)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert aux.metrics.keys() == {"loss", "smooth_l1"}


def test_the_loss_of_features_in_bfloat16_is_float32():
    run, exact = (compiled({"feature": Feature(3, 3)}, dtype=dtype) for dtype in ("bfloat16", "float32"))
    (loss, _), (wanted, _) = (one.loss(stages.batch(), train=False) for one in (run, exact))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, wanted, rtol=0.05)
    assert loss != wanted


# Several at once


TWO = {"queries": Relation(3, 2, ("qk",), weight=0.5), "last": Feature(4, 3, weight=2.0)}


def test_two_weighted_targets():
    run = compiled(TWO, num_heads=3)
    batch = stages.batch()
    loss, aux = run.loss(batch, train=False)
    teacher, student = blocks_of(run, batch["image"], student_heads=(3, 3, 3))
    kl = relation_terms(("qk",), teacher[2], student[1])["kl_qk"]
    smooth = feature_loss(run.params["pretext"]["last"]["out"], teacher[3]["out"], student[2]["out"], 2.0)
    assert run.params["pretext"].keys() == {"last"}  # relations have no parameters
    np.testing.assert_allclose(loss, 0.5 * kl + 2 * smooth, rtol=1e-5)
    found = {name: metric.value() for name, metric in aux.metrics.items()}
    assert found.keys() == {"loss", "queries_kl_qk", "last_smooth_l1"}
    np.testing.assert_allclose(found["queries_kl_qk"], kl, rtol=1e-5)
    np.testing.assert_allclose(found["last_smooth_l1"], smooth, rtol=1e-5)


def test_two_features_do_not_share_their_projection():
    task = stages.distill({"a": Feature(3, 3), "b": Feature(3, 3)})
    own = stages.fresh(task)[0]["params"]["pretext"]
    assert not np.array_equal(own["a"]["out"]["kernel"], own["b"]["out"]["kernel"])


@pytest.mark.parametrize(
    ("captures", "expected"),
    [
        ([Captures((3,), "qkv")], Captures((3,), "qkv")),
        ([Captures((3,), "qkv"), Captures((2,))], Captures((2, 3), "qkv")),
        ([Captures((2,), "qkv"), Captures((3,))], Captures((2, 3), "all")),
        ([Captures((3,), "attention"), Captures((3,), "qkv")], Captures((3,), "attention")),
        ([Captures((3,)), Captures((3,), "qkv")], Captures((3,), "all")),
        ([Captures((1, 3), "qkv"), Captures((3,), "qkv")], Captures((1, 3), "qkv")),
        ([Captures(), Captures((3,), "qkv")], Captures((3,), "qkv")),
        ([Captures((2,), normed=(2,)), Captures((3,), "qkv")], Captures((2, 3), "qkv", normed=(2,))),
    ],
)
def test_merged_captures(captures, expected):
    assert Captures.merged(captures) == expected


# What trains


QKV = {"norm1/scale", "norm1/bias", "attn/qkv/kernel", "attn/qkv/bias"}
LOOSE = {"num_heads": 3, "last_block_heads": None}


@pytest.mark.parametrize(
    ("targets", "model", "block", "is_whole"),
    [
        ({"relation": Relation(3, 3)}, {"posembed": "trainable"}, 3, False),
        ({"relation": Relation(3, 2)}, {**LOOSE, "num_classes": 5}, 2, False),
        ({"relation": Relation(3, 1, ("vv",))}, {"num_heads": 3, "pool": "mean"}, 1, False),
        ({"feature": Feature(4, 3)}, {}, 3, True),
        ({"feature": Feature(2, 2)}, {"pool": "mean", "num_classes": 5}, 2, True),
        ({"feature": Feature(4, 3, ("q", "k", "v"))}, {}, 3, False),
        ({"feature": Feature(4, 3, ("mid", "q"))}, {}, 3, "attention"),
        ({"feature": Feature(4, 3, ("attn_out",))}, {}, 3, "attention"),
        ({"feature": Feature(4, 3, ("mlp_out",))}, {}, 3, True),
        ({"class_token": ClassToken(4, 3)}, {}, 3, True),
        ({"attention_logits": AttentionLogits(4, 3)}, {"last_block_heads": 2}, 3, False),
        ({"attention_logits": AttentionLogits(4, 2), "feature": Feature(4, 3)}, {}, 3, True),
        ({"relation": Relation(3, 3), "feature": Feature(3, 2)}, {}, 3, False),
        ({"relation": Relation(3, 2), "feature": Feature(3, 2)}, LOOSE, 2, True),
        (TWO, {"num_heads": 3}, 3, True),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else str(value),
)
def test_untrained_is_what_has_no_gradient(targets, model, block, is_whole):
    untrained, names = stages.check_untrained(stages.distill(targets, color_jitter=0.0, **model))
    trained = names - untrained
    of_block = {n.split("/", 2)[2] for n in names if n.startswith(f"encoder/block{block}/")}
    wanted = {True: of_block, False: QKV, "attention": QKV | {"attn/proj/kernel", "attn/proj/bias"}}[is_whole]
    assert {n.split("/", 2)[2] for n in trained if n.startswith(f"encoder/block{block}/")} == wanted
    assert {"encoder/cls_token", "encoder/patch_embed/kernel"} <= trained
    assert {n for n in names if n.startswith("pretext/")} <= trained
    assert not any(n.startswith(f"encoder/block{block + 1}/") for n in trained)
