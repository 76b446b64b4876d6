"""The two passes of distillation; what is made of them: `test_targets`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.fork.two_widths import TwoWidths
from tests.models import reference
from tests.tasks import stages
from tests.tasks.test_contract import flops_ratio
from tinymim_jax.data import device_augment
from tinymim_jax.experiment import config
from tinymim_jax.models.mae import mask_by_noise
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks import distill
from tinymim_jax.tasks.contract import Context


def test_zero_if_student_and_teacher_are_one():
    model = dataclasses.replace(stages.TEACHER, depth=3)
    task = stages.distill(**{f.name: getattr(model, f.name) for f in dataclasses.fields(model)})
    params, frozen = stages.weights(task)
    params = {"encoder": {**params["encoder"], **frozen["teacher"]["encoder"]}}
    loss, _ = jax.jit(functools.partial(task.loss, train=False))(params, {}, frozen, stages.batch(), stages.rngs())
    np.testing.assert_allclose(loss, 0, atol=1e-5)


def test_bfloat16_loss_is_float32():
    task = stages.distill(dtype="bfloat16")
    assert task.teacher_cfg.dtype == "bfloat16"
    loss, _ = stages.Compiled(task).loss(stages.batch(), train=False)
    assert loss.dtype == jnp.float32
    exact = stages.standard("distill").loss(stages.batch(), train=False)[0]
    np.testing.assert_allclose(loss, exact, rtol=0.1)


# The views


def test_only_the_student_sees_the_jitter():
    task = stages.distill()
    params, frozen = stages.weights(task)
    batch, rngs = stages.batch(), stages.rngs(3)
    jittered = device_augment.color_jitter(rngs["augment"], batch["image"].astype(np.float32) / 255, 0.4)
    assert np.abs(jittered - batch["image"] / 255).max() > 0.05
    jittered = (reference.f64(jittered) - stages.MEAN) / stages.STD
    clean = stages.normalised(batch["image"])
    with jax.default_matmul_precision("highest"):
        traces = jax.jit(functools.partial(task.passes, train=True, masked=True))(params, frozen, batch, rngs)
    expected = (
        reference.vit(frozen["teacher"]["encoder"], clean, 4, (3, 3, 3)),
        reference.vit(params["encoder"], jittered, 4, (2, 2, 3)),
    )
    for actual, wanted in zip(traces, expected, strict=True):
        for name in ("q", "k", "v", "out"):
            reference.close(getattr(actual[3], name), wanted[2][name], 3e-5)


def test_strength_of_the_jitter(monkeypatch):
    calls = []
    monkeypatch.setattr(distill, "color_jitter", lambda key, x, strength: calls.append((x, strength)) or x * 0)
    task, rngs = stages.distill(color_jitter=0.7), stages.rngs()
    clean, jittered = task._views(stages.batch(), rngs["augment"])
    assert calls[0][1] == 0.7
    assert calls[0][0].min() >= 0 and calls[0][0].max() <= 1  # before normalisation
    np.testing.assert_allclose(jittered[0, 0, 0], -np.array(stages.MEAN) / stages.STD, rtol=1e-5)
    np.testing.assert_allclose(clean, stages.normalised(stages.batch()["image"]), atol=1e-5)
    for view in (
        *stages.distill(color_jitter=0.0)._views(stages.batch(), rngs["augment"]),
        *task._views(stages.batch(), None),
    ):
        np.testing.assert_array_equal(view, clean)
    assert len(calls) == 1


def test_drop_path_in_training_only_and_never_in_the_teacher():
    teacher = dataclasses.replace(stages.TEACHER, drop_path=0.9)
    plain = stages.distill(teacher=teacher, color_jitter=0.0, drop_path=0.4)
    params, frozen = stages.weights(plain)
    apply = {train: jax.jit(functools.partial(plain.passes, train=train, masked=True)) for train in (False, True)}
    seen = {
        (train, seed): [trace[3].v for trace in apply[train](params, frozen, stages.batch(), stages.rngs(seed))]
        for train in (False, True)
        for seed in (0, 1)
    }
    for values, _ in seen.values():
        np.testing.assert_allclose(values, seen[False, 0][0], rtol=1e-5, atol=1e-5)
    students = {key: np.asarray(student) for key, (_, student) in seen.items()}
    np.testing.assert_array_equal(students[False, 0], students[False, 1])
    assert not np.allclose(students[True, 0], students[True, 1])
    assert not np.allclose(students[True, 0], students[False, 0])


# The teacher


def test_the_teacher_computes_as_the_stage_does():
    teacher = dataclasses.replace(
        stages.TEACHER, num_classes=7, remat=True, dtype="bfloat16", image_size=32, posembed="trainable", mlp_ratio=2.0
    )
    task = stages.distill(teacher=teacher)
    assert task.teacher_cfg == dataclasses.replace(
        stages.TEACHER, depth=3, last_block_heads=3, pool="mean", posembed="trainable", mlp_ratio=2.0
    )
    assert teacher.depth == 4  # left as it was
    assert stages.distill(attention="cudnn", dtype="bfloat16", width=24).teacher_cfg.attention == "cudnn"


def test_the_teacher_is_cut_behind_the_last_block_that_is_read():
    targets = {"relation": config.Relation(2, 3), "feature": config.Feature(3, 2)}
    task = stages.distill(targets)
    assert task.teacher_cfg.depth == 3 and task.of_student.blocks == (2, 3)
    frozen = stages.weights(task)[1]["teacher"]["encoder"]
    assert {name for name in frozen if name.startswith("block")} == {"block1", "block2", "block3"}
    assert "norm" not in frozen


def test_heads_of_a_teacher_cut_at_its_last_block():
    teacher = dataclasses.replace(stages.TEACHER, last_block_heads=6)
    task = stages.distill({"relation": config.Relation(4, 3)}, teacher, last_block_heads=6)
    assert (task.teacher_cfg.depth, task.teacher_cfg.num_heads, task.teacher_cfg.last_block_heads) == (4, 3, 6)
    # Before its last block a teacher has its other number of heads.
    assert stages.distill(teacher=teacher).teacher_cfg.last_block_heads == 3


def test_configs_that_cannot_be_distilled():
    cfg = config.Distill(config.Init("t"), {"a": config.Relation(3, 3), "b": config.Feature(3, 4)})
    with pytest.raises(InputError, match=r"^task\.targets\.b: student_block 4 is beyond the student's 3 blocks$"):
        cfg.check("task", stages.vit(depth=3))
    with pytest.raises(InputError, match=r"^task\.targets: none reads the teacher; name what of it"):
        config.Distill(config.Init("t"), {}).check("task", stages.vit())
    cfg.check("task", stages.vit(depth=4))


def test_what_is_said_of_it():
    task = stages.distill({"relation": config.Relation(3, 3, heads=3), "feature": config.Feature(4, 2)})
    assert task.task.summary() == "relation, feature distillation, student block 3, 2"
    assert task.describe_source("teacher") == "qk+vv relations of block 3 of 4, 3 heads; output of block 4 of 4"


# Features


@pytest.mark.parametrize(
    ("target", "block"),
    [(config.Relation(3, 3), 2), (config.Relation(3, 2), 1), (config.Relation(3, 1), 1), (config.Feature(3, 2), 2)],
    ids=str,
)
def test_features_are_those_of_the_last_block_that_is_trained_whole(target, block):
    """Of block 1, if none is: as they leave it."""
    task = stages.distill({"x": target}, num_heads=3)
    params, batch = stages.weights(task)[0], stages.batch()
    out = jax.jit(task.predict)({"params": params}, {}, batch)
    trace = reference.vit(params["encoder"], stages.normalised(batch["image"]), 4, (3, 3, 3))
    reference.close(out.features, trace[block - 1]["out"][:, 1:].mean(axis=1))
    assert out.logits is None


# Pictures


def test_panels_show_the_relations_of_one_patch():
    names = ("qk", "vv")
    task = stages.distill({"feature": config.Feature(3, 3), "relation": config.Relation(3, 3, names)})
    params, frozen = stages.weights(task)
    batch = stages.batch(2)
    found = task.panels({"params": params}, frozen, batch, stages.rngs())
    titles = [f"relation {name} {who}" for name in ("QK", "VV") for who in ("teacher", "student")]
    assert [label.split("\n")[0] for label in found.column_labels] == [
        "", "feature cosine teacher", "feature cosine student", *titles
    ]  # fmt: skip
    assert [label.split("\n")[1] for label in found.column_labels[1:]] == ["block 3 of 4", "block 3 of 3"] * 3
    assert found.box == (8, 8, 4) and not found.row_labels  # patch (2, 2) of the 4 x 4
    assert [[np.shape(image) for image in row] for row in found.rows] == [[(16, 16, 3)] + [(4, 4)] * 6] * 2
    clean = stages.normalised(batch["image"])
    traces = [
        reference.vit(frozen["teacher"]["encoder"], clean, 4, (3, 3, 3))[2],
        reference.vit(params["encoder"], clean, 4, (2, 2, 3))[2],
    ]
    for i, row in enumerate(found.rows):
        np.testing.assert_allclose(row[0], batch["image"][i] / 255, atol=1e-6)
        wanted = [relation_of(trace, name, i) for name in names for trace in traces]
        np.testing.assert_allclose(np.array(row[3:]), wanted, rtol=1e-3, atol=1e-5)


def relation_of(trace, name, image, token=1 + 2 * 4 + 2):
    """[4, 4]: what `token` relates to, mean over heads."""
    a, b = (trace[part][image].swapaxes(0, 1) for part in name)
    rows = reference.softmax(a[:, token : token + 1] @ b.swapaxes(1, 2) / a.shape[-1] ** 0.5)
    return rows.mean(axis=0)[0, 1:].reshape(4, 4)


def test_panels_of_features_show_cosine_similarities():
    task = stages.distill({"feature": config.Feature(3, 3)})
    params, frozen = stages.weights(task)
    batch = stages.batch(2)
    found = task.panels({"params": params}, frozen, batch, stages.rngs())
    assert found.column_labels == ["", "cosine teacher\nblock 3 of 4", "cosine student\nblock 3 of 3"]
    own = reference.vit(params["encoder"], stages.normalised(batch["image"]), 4, (2, 2, 3))[2]["out"]
    dense = jax.tree.map(np.asarray, params["pretext"]["feature"]["out"])
    projected = own @ dense["kernel"] + dense["bias"]
    projected /= np.linalg.norm(projected, axis=-1, keepdims=True)
    for i, row in enumerate(found.rows):
        wanted = projected[i, 1:] @ projected[i, 1 + 2 * 4 + 2]
        np.testing.assert_allclose(row[2], wanted.reshape(4, 4), rtol=1e-3, atol=1e-5)
        assert row[1].max() == pytest.approx(1, abs=1e-5)  # the boxed patch itself


def test_a_picture_of_a_student_with_another_token_in_front():
    task = stages.distill({"cls": config.ClassToken(3, 3)}, dist_token=True, last_block_heads=None)
    params, frozen = stages.weights(task)
    found = task.panels({"params": params}, frozen, stages.batch(), stages.rngs())
    assert [image.shape for image in found.rows[0]] == [(16, 16, 3), (4, 4), (4, 4)]
    assert found.box is None and found.title == "how CLS relates to each patch"


def test_a_picture_of_what_is_restored_of_hidden_patches():
    """As of MAE with the same weights and mask."""
    targets = {"relation": config.Relation(3, 3), "rec": config.Reconstruction(3, config.Decoder(16, 1, 2))}
    task = stages.distill(targets, mask_ratio=0.75)
    params, frozen = stages.weights(task)
    found = task.panels({"params": params}, frozen, stages.batch(2), stages.rngs())
    assert found.column_labels[-2:] == ["masked", "reconstructed"] and "not predicted" in found.title
    mae = stages.mae({"decoder": config.Decoder(16, 1, 2)}, width=12, depth=3, last_block_heads=3)
    own = {"encoder": params["encoder"], "pretext": {"decoder": params["pretext"]["rec"]}}
    expected = mae.panels({"params": own}, {}, stages.batch(2), stages.rngs())
    for row, other in zip(found.rows, zip(*expected.rows, strict=True), strict=True):
        np.testing.assert_allclose([row[0], *row[-2:]], other, atol=1e-5)


# Drop path


def test_the_teacher_drops_paths_in_training_alone_and_not_the_students():
    """Table 13. Of both models whole blocks are dropped for an image, by draws of their own."""
    task, plain = (stages.distill(color_jitter=0.0, teacher_drop_path=rate) for rate in (0.5, 0.0))
    params, frozen = stages.weights(task)
    batch = stages.batch(8)
    dropped, kept, evaluated = (
        one.passes(params, frozen, batch, stages.rngs(), train=train, masked=True)[0][3].q
        for one, train in ((task, True), (plain, True), (task, False))
    )
    np.testing.assert_array_equal(kept, evaluated)
    other = task.passes(params, frozen, batch, stages.rngs(1), train=True, masked=True)[0][3].q
    assert not np.allclose(dropped, kept) and not np.allclose(dropped, other)
    variables = {"params": frozen["teacher"]["encoder"]}
    keys = {"drop_path": stages.rngs()["drop_path"]}  # the student's
    like_student = task.teacher.apply(variables, task.images(batch), capture=(3,), train=True, rngs=keys).trace[3].q
    assert not np.allclose(dropped, like_student)
    with pytest.raises(InputError, match="an encoder of kind 'two_widths' drops no paths"):
        TwoWidths(8).dropping(0.1, "task.teacher_drop_path")


# Masked images


def test_teacher_and_student_see_the_same_patches():
    """Table 12: what a mask leaves over, another for each image; a picture and features are of the whole image."""
    task = stages.distill(color_jitter=0.0, mask_ratio=0.75)
    params, frozen = stages.weights(task)
    batch, rngs = stages.batch(), stages.rngs()
    teacher, student = task.passes(params, frozen, batch, rngs, train=True, masked=True)
    keep, _, _ = mask_by_noise(jax.random.uniform(rngs["mask"], (4, 16)), 0.75)
    assert keep.shape == (4, 4) and len(np.unique(keep, axis=0)) > 1
    images = task.images(batch)
    alone = task.teacher.apply({"params": frozen["teacher"]["encoder"]}, images, capture=(3,), keep=keep).trace[3]
    np.testing.assert_array_equal(teacher[3].q, alone.q)
    own = task.model.apply({"params": params["encoder"]}, images, capture=(3,), keep=keep).trace[3]
    assert teacher[3].q.shape == (4, 5, 3, 8) and student[3].q.shape == own.q.shape
    np.testing.assert_allclose(student[3].q, own.q, rtol=1e-5, atol=1e-6)
    whole, _ = task.passes(params, frozen, batch, rngs, train=True, masked=False)
    assert whole[3].q.shape == (4, 17, 3, 8)


def test_a_masked_step_costs_its_share_of_tokens():
    def embed(d):
        return 2 * 4 * 48 * d

    def block(d):
        return 2 * 5 * d * 12 * d + 4 * 5 * 5 * d

    seen = 2 * 2 * 5 * 5 * (24 + 3 * 12)
    passes = [
        embed(d) * (2 if d == 12 else 1) + (3 if d == 12 else 1) * (2 * block(d) + 2 * 5 * d * 3 * d) for d in (24, 12)
    ]
    assert stages.distill(mask_ratio=0.75).flops_per_image() == sum(passes) + seen


def test_a_mask_that_hides_all_patches():
    with pytest.raises(InputError, match=r"s\.task\.mask_ratio 0\.99 hides all 16 patches; lower it"):
        config.Distill(config.Init("t"), {"relation": config.Relation(3, 3)}, mask_ratio=0.99).check(
            "s.task", stages.vit()
        )


def test_a_classifier_is_masked_and_teaches_masked_like_others():
    """Of both the blocks alone are used."""
    task = stages.distill(
        mask_ratio=0.5, teacher=dataclasses.replace(stages.TEACHER, pool="mean", num_classes=5), pool="mean"
    )
    params, frozen = stages.weights(task)
    assert task.passes(params, frozen, stages.batch(), stages.rngs(), train=True, masked=True)[1][3].q.shape == (
        4,
        9,
        3,
        4,
    )


def test_masks_that_hide_other_patches():
    with pytest.raises(InputError, match="a mask must hide the same patches from .* have 4 and 2 patches a side"):
        stages.distill({"class_token": config.ClassToken(4, 3)}, mask_ratio=0.5, patch_size=8)


# Cost


def blocks(d, count):
    """Whole blocks of 17 tokens, then the q, k and v of one more."""
    return count * (2 * 17 * d * 12 * d + 4 * 17 * 17 * d) + 2 * 17 * d * 3 * d


def test_flops():
    def embed(d):
        return 2 * 16 * 48 * d  # pixel values

    relations = 2 * 2 * 17 * 17 * (24 + 3 * 12)
    expected = embed(24) + blocks(24, 2) + 2 * embed(12) + 3 * blocks(12, 2) + relations
    assert stages.distill().flops_per_image() == expected
    projection = 3 * 2 * 17 * 12 * 24
    both = stages.distill({"relation": config.Relation(3, 3), "feature": config.Feature(2, 2)})
    assert both.flops_per_image() == expected + projection


@pytest.mark.parametrize("target", [config.Relation(6, 4), config.Feature(6, 4)], ids=lambda target: target.kind)
def test_flops_against_xla(target):
    """Teacher to block 6 of 8 forward, student forward and backward, and nothing else."""
    sizes = {"image_size": 64, "patch_size": 8}
    teacher = config.ViT(256, 8, 4, **sizes)
    student = config.ViT(192, 4, 3, last_block_heads=4, drop_path=0.1, **sizes)
    context = Context(student, config.Data("digits", image_size=64), sources={"teacher": teacher})
    ratio = flops_ratio(config.Distill(config.Init(stage="t"), {"x": target}).build(context), 4)
    print(f"XLA over counted: {ratio:.4f}")
    assert 0.95 < ratio < 1.05


@pytest.mark.parametrize(
    ("heads", "said"), [(None, "mean of 2 heads"), (2, "mean of 2 heads"), (4, "mean of 4 heads\nsplit from 2")]
)
def test_a_picture_says_how_the_teacher_s_heads_are_split(heads, said):
    teacher = config.ViT(8, 3, 2, image_size=16, patch_size=4)
    student = config.ViT(8, 2, heads or 2, image_size=16, patch_size=4)
    target = config.Relation(2, 1, heads=heads).build("x", teacher, student)
    assert target.sides(teacher) == (f"block 2 of 3\n{said}", f"block 1 of 2\nmean of {heads or 2} heads")
