import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import reference
from tests.tasks import stages
from tests.tasks.test_base import flops_ratio
from tinymim_jax.data import device_augment
from tinymim_jax.experiment import config
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks import distill


@functools.cache
def compiled(*names):
    return stages.Compiled(stages.distill({"relations": names, "color_jitter": 0.0}))


def references(task, params, frozen, clean, jittered, heads=((3, 3, 3), (2, 2, 3))):
    teacher = reference.vit(frozen["encoder"], clean, 4, heads[0])
    student = reference.vit(params["encoder"], jittered, 4, heads[1])
    return teacher[task.task.teacher.block - 1], student[task.task.student_block - 1]


# The loss


@pytest.mark.parametrize("names", [("qk", "vv"), ("qq", "kk", "vv"), ("vv",)], ids="+".join)
def test_loss_against_float64(names):
    run = compiled(*names)
    batch = stages.batch(is_valid=[1, 1, 0, 1])
    loss, aux = run.loss(batch, train=False)
    images = stages.normalised(batch["image"])[[0, 1, 3]]
    teacher, student = references(run.task, run.params, run.frozen, images, images)
    terms = {f"kl_{a}{b}": reference.relation_kl((teacher[a], teacher[b]), (student[a], student[b])) for a, b in names}
    np.testing.assert_allclose(loss, sum(terms.values()), rtol=1e-5)
    assert aux.metrics.keys() == {"loss", *terms}
    for name, value in terms.items():
        np.testing.assert_allclose(aux.metrics[name].value(), value, rtol=1e-5)


def test_default_relations():
    assert config.Distill(config.Teacher(config.Init(), 1)).relations == ("qk", "vv")


def test_zero_if_student_and_teacher_are_one():
    model = dataclasses.replace(stages.TEACHER, depth=3)
    stage = stages.distill_stage(**{f.name: getattr(model, f.name) for f in dataclasses.fields(model)})
    task = stages.make_task(stage, stages.TEACHER)
    params, frozen = stages.weights(task)
    params = {"encoder": {**params["encoder"], **frozen["encoder"]}}
    loss, _ = jax.jit(functools.partial(task.loss, train=False))(params, {}, frozen, stages.batch(), stages.rngs())
    np.testing.assert_allclose(loss, 0, atol=1e-5)


def test_bfloat16_loss_is_float32():
    task = stages.distill(dtype="bfloat16")
    assert task.teacher_cfg.dtype == "bfloat16"
    run = stages.Compiled(task)
    loss, _ = run.loss(stages.batch(), train=False)
    assert loss.dtype == jnp.float32
    exact = compiled("qk", "vv").loss(stages.batch(), train=False)[0]
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
        traces = jax.jit(functools.partial(task.traces, train=True))(params, frozen, batch, rngs)
    for actual, expected in zip(traces, references(task, params, frozen, clean, jittered), strict=True):
        for name in ("q", "k", "v"):
            reference.close(getattr(actual, name), expected[name], 3e-5)


def test_strength_of_the_jitter(monkeypatch):
    calls = []
    monkeypatch.setattr(distill, "color_jitter", lambda key, x, strength: calls.append((x, strength)) or x * 0)
    task, rngs = stages.distill({"color_jitter": 0.7}), stages.rngs()
    clean, jittered = task._views(stages.batch(), rngs["augment"])
    assert calls[0][1] == 0.7
    assert calls[0][0].min() >= 0 and calls[0][0].max() <= 1  # before normalisation
    np.testing.assert_allclose(jittered[0, 0, 0], -np.array(stages.MEAN) / stages.STD, rtol=1e-5)
    np.testing.assert_allclose(clean, stages.normalised(stages.batch()["image"]), atol=1e-5)
    for view in (
        *stages.distill({"color_jitter": 0.0})._views(stages.batch(), rngs["augment"]),
        *task._views(stages.batch(), None),
    ):
        np.testing.assert_array_equal(view, clean)
    assert len(calls) == 1


def test_drop_path_in_training_only_and_never_in_the_teacher():
    teacher = dataclasses.replace(stages.TEACHER, drop_path=0.9)
    plain = stages.make_task(stages.distill_stage({"color_jitter": 0.0}, drop_path=0.4), teacher)
    params, frozen = stages.weights(plain)
    apply = {train: jax.jit(functools.partial(plain.traces, train=train)) for train in (False, True)}
    seen = {
        (train, seed): apply[train](params, frozen, stages.batch(), stages.rngs(seed))
        for train in (False, True)
        for seed in (0, 1)
    }
    for trace, _ in seen.values():
        np.testing.assert_allclose(trace.v, seen[False, 0][0].v, rtol=1e-5, atol=1e-5)
    students = {key: np.asarray(student.v) for key, (_, student) in seen.items()}
    np.testing.assert_array_equal(students[False, 0], students[False, 1])
    assert not np.allclose(students[True, 0], students[True, 1])
    assert not np.allclose(students[True, 0], students[False, 0])


# What trains


@pytest.mark.parametrize(
    ("task", "model"),
    [
        ({}, {"posembed": "trainable"}),
        ({"student_block": 2}, {"num_heads": 3, "last_block_heads": None}),
        ({"student_block": 1}, {"num_heads": 3, "last_block_heads": 6}),
        ({"student_block": 2}, {"num_heads": 3, "num_classes": 5}),
        ({}, {"pool": "mean", "num_classes": 5}),
        ({"relations": ("vv",)}, {}),
    ],
    ids=str,
)
def test_untrained(task, model):
    task = stages.distill({"color_jitter": 0.0, **task}, **model)
    zero, names = stages.zero_gradients(stages.Compiled(task))
    fixed = {"encoder/pos_embed"} if task.student_cfg.posembed == "fixed" else set()
    assert not fixed & zero  # it is read, and must be named to stay as it is
    assert stages.declared(task, names) == zero | fixed
    block = task.task.student_block
    trained = names - zero - fixed
    assert {n.split("/", 2)[2] for n in trained if n.startswith(f"encoder/block{block}/")} == {
        "norm1/scale",
        "norm1/bias",
        "attn/qkv/kernel",
        "attn/qkv/bias",
    }
    assert {"encoder/cls_token", "encoder/patch_embed/kernel"} <= trained
    assert not any(n.startswith(f"encoder/block{block + 1}/") for n in trained)


def test_untrained_tells_block_1_from_block_12():
    patterns = distill.untrained(config.ViT(12, 12, 3), 1)
    names = {"encoder/block1/attn/qkv/kernel", "encoder/block11/attn/qkv/kernel", "encoder/block12/norm1/scale"}
    task = type("Task", (), {"untrained": patterns})
    assert stages.declared(task, names) == names - {"encoder/block1/attn/qkv/kernel"}


def test_the_teacher_gets_no_gradient():
    task = compiled("vv").task
    params, frozen = stages.weights(task)

    def loss(f):
        return task.loss(params, {}, f, stages.batch(), stages.rngs(), train=False)[0]

    assert not any(np.any(g) for g in jax.tree.leaves(jax.jit(jax.grad(loss))(frozen)))


# The teacher


def cut(stage=None, teacher=stages.TEACHER, **kwargs):
    return distill.cut_teacher(stage or stages.distill_stage(**kwargs), teacher)


def test_cut_teacher_computes_what_the_full_teacher_does():
    full = stages.TEACHER.build()
    images = stages.normalised(stages.batch()["image"]).astype(np.float32)
    params = reference.random_params(full.init, images)
    task = stages.distill()
    kept = stages.weights(task)[1]["encoder"].keys()
    assert kept == params.keys() - {"block4", "norm"}
    frozen = {"encoder": {key: params[key] for key in kept}}
    teacher, _ = jax.jit(functools.partial(task.traces, train=True))(
        stages.weights(task)[0], frozen, stages.batch(), stages.rngs()
    )
    trace = jax.jit(functools.partial(full.apply, capture=(3,)))({"params": params}, images).trace[3]
    for name in ("q", "k", "v"):
        reference.close(getattr(teacher, name), getattr(trace, name), 1e-6)


def test_cut_teacher_fields():
    teacher = dataclasses.replace(
        stages.TEACHER,
        num_classes=7,
        remat=True,
        dtype="bfloat16",
        attention="cudnn",
        image_size=32,
        posembed="trainable",
        mlp_ratio=2.0,
    )
    out = cut(teacher=teacher)
    assert out == dataclasses.replace(
        stages.TEACHER, depth=3, last_block_heads=3, pool="mean", posembed="trainable", mlp_ratio=2.0
    )
    assert teacher.depth == 4  # left as it was


def test_a_teacher_attends_as_the_stage_does():
    stage = stages.distill_stage(attention="cudnn", dtype="bfloat16")
    assert cut(stage).attention == "cudnn"
    with pytest.raises(InputError, match="the teacher: attention 'cudnn' takes .* 4 heads are 6 wide"):
        cut(
            stages.distill_stage(attention="cudnn", dtype="bfloat16", last_block_heads=4),
            dataclasses.replace(stages.TEACHER, num_heads=4),
        )


def test_heads_of_a_teacher_cut_at_its_last_block():
    teacher = dataclasses.replace(stages.TEACHER, last_block_heads=6)
    out = cut(stages.distill_stage(teacher={"block": 4}, last_block_heads=6), teacher)
    assert (out.depth, out.num_heads, out.last_block_heads) == (4, 3, 6)
    # Before its last block a teacher has its other number of heads.
    assert cut(teacher=teacher).last_block_heads == 3


def test_regrouped_heads():
    """The teacher's block 4 was trained with 6 heads and is read with 4, its other blocks with their own 3."""
    full = dataclasses.replace(stages.TEACHER, last_block_heads=6)
    stage = stages.distill_stage(teacher={"block": 4, "heads": 4}, init={"regroup_heads": True}, last_block_heads=4)
    task = stages.make_task(stage, full)
    assert task.teacher_cfg == dataclasses.replace(full, last_block_heads=4, pool="mean")
    run = stages.Compiled(task)
    assert run.frozen["encoder"]["block4"]["attn"]["qkv"]["kernel"].shape == (24, 3, 4, 6)
    assert run.frozen["encoder"]["block3"]["attn"]["qkv"]["kernel"].shape == (24, 3, 3, 8)
    batch = stages.batch()
    images = stages.normalised(batch["image"])
    # The reference takes the channels in torch's layout, in which the same weights serve any number of heads.
    teacher, student = references(task, run.params, run.frozen, images, images, ((3, 3, 3, 4), (2, 2, 4)))
    expected = sum(reference.relation_kl((teacher[a], teacher[b]), (student[a], student[b])) for a, b in ("qk", "vv"))
    np.testing.assert_allclose(run.loss(batch, train=False)[0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: cut(stages.distill_stage(teacher={"block": 0})),
            "task.teacher.block 0 is beyond the teacher's 4",
        ),
        (
            lambda: cut(stages.distill_stage(teacher={"block": 5})),
            "task.teacher.block 5 is beyond the teacher's 4 blocks",
        ),
        (
            lambda: cut(stages.distill_stage(teacher={"heads": 6}, last_block_heads=6)),
            r"block 3 \(width 24\) was trained with 3 heads, not task.teacher.heads=6; .*regroup_heads=True",
        ),
        (
            lambda: cut(stages.distill_stage(teacher={"heads": 5}, init={"regroup_heads": True}, last_block_heads=6)),
            r"not task.teacher.heads=5; leave it None, or set .* a divisor of the width",
        ),
        (
            lambda: cut(stages.distill_stage(last_block_heads=4)),
            r"block 3 has 4 heads, the teacher's block 3 has 3; set model.last_block_heads=3, or task.teacher.heads=4",
        ),
        (
            lambda: cut(stages.distill_stage(task={"student_block": 2})),
            r"student's block 2 has 2 heads, the teacher's block 3 has 3",
        ),
        (
            lambda: cut(stages.distill_stage(patch_size=8)),
            r"same patches: patch_size 4 and 8",
        ),
    ],
)
def test_teachers_that_cannot_teach(make, message):
    with pytest.raises(InputError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_the_advice_about_heads_helps_where_the_block_is_not_the_last():
    """last_block_heads does not reach block 2 of 3: the message must not send the user there."""
    with pytest.raises(InputError) as error:
        cut(stages.distill_stage(task={"student_block": 2}))
    assert "last_block_heads=3" not in str(error.value)
    assert "num_heads=3" in str(error.value)


# Features


@pytest.mark.parametrize("block", [3, 2])
def test_features_are_the_patches_that_enter_the_target_block(block):
    run = stages.Compiled(stages.distill({"student_block": block}, num_heads=3))
    batch = stages.batch()
    out = run.predict(batch)
    trace = reference.vit(run.params["encoder"], stages.normalised(batch["image"]), 4, (3, 3, 3))
    reference.close(out.features, trace[block - 2]["out"][:, 1:].mean(axis=1))
    assert out.logits is None


# Cost


def test_flops():
    student, teacher = stages.vit(width=12, last_block_heads=3), stages.TEACHER

    def blocks(d, count):  # whole blocks before the target, then its qkv; 17 tokens of 48 pixel values
        return count * (2 * 17 * d * 12 * d + 4 * 17 * 17 * d) + 2 * 17 * d * 3 * d

    def embed(d):
        return 2 * 16 * 48 * d

    relations = 2 * 2 * 17 * 17 * (teacher.width + 3 * student.width)
    expected = embed(24) + blocks(24, 2) + 2 * embed(12) + 3 * blocks(12, 2) + relations
    assert stages.distill().flops_per_image() == expected


def test_flops_against_xla():
    """Teacher to block 6 of 8 forward, student forward and backward, and nothing else."""
    sizes = {"image_size": 64, "patch_size": 8}
    teacher = config.ViT(256, 8, 4, **sizes)
    student = config.ViT(192, 4, 3, last_block_heads=4, drop_path=0.1, **sizes)
    task = config.Distill(config.Teacher(config.Init(stage="t"), block=6), student_block=4)
    data = config.Data("digits", image_size=64)
    stage = config.Stage(task, student, data, config.Optim(lr=1.0), config.Run(batch_size=4, steps=1))
    ratio = flops_ratio(distill.Distill(stage, teacher), 4)
    print(f"XLA over counted: {ratio:.4f}")
    assert 0.95 < ratio < 1.05
