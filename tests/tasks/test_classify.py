import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import reference
from tests.tasks import stages
from tinymim_jax.data.device_augment import partner
from tinymim_jax.experiment import config, recipes
from tinymim_jax.models.contract import EncoderOutput
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks import classify
from tinymim_jax.tasks.contract import Context

PLAIN = {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0}


@functools.cache
def compiled(pool="mean", **task):
    return stages.Compiled(stages.classify({**PLAIN, **task}, pool=pool))


def forward(params, batch, pool):
    """Features and logits in float64."""
    p = params["encoder"]
    tokens = reference.vit(p, stages.normalised(batch["image"]), 4, (2, 2))[-1]["out"]
    if pool == "cls":
        features = reference.layer_norm(p["norm"], tokens)[:, 0]
        return features, reference.linear(p["head"], features)
    features = tokens[:, 1:].mean(axis=1)
    return features, reference.linear(p["head"], reference.layer_norm(p["fc_norm"], features))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_predict(pool):
    batch = stages.batch()
    out = compiled(pool).predict(batch)
    features, logits = forward(compiled(pool).params, batch, pool)
    reference.close(out.features, features)
    reference.close(out.logits, logits)


@pytest.mark.parametrize("train", [False, True])
def test_labels_are_smoothed_in_training_only(train):
    batch = stages.batch(is_valid=[1, 1, 0, 1])
    loss, _ = compiled(label_smoothing=0.1).loss(batch, train=train)
    smoothing = 0.1 if train else 0.0
    targets = np.full((4, 5), smoothing / 5)
    targets[np.arange(4), batch["label"]] += 1 - smoothing
    log_p = reference.log_softmax(forward(compiled().params, batch, "mean")[1])
    np.testing.assert_allclose(loss, -(targets * log_p).sum(axis=1)[[0, 1, 3]].mean(), rtol=1e-5)


def test_images_are_normalised_then_erased_then_mixed(monkeypatch):
    calls = []

    def erase(key, images, prob):
        calls.append(("erase", jax.random.key_data(key), images, prob))
        return images + 1

    def mix(key, images, targets, **how):
        calls.append(("mix", jax.random.key_data(key), images, targets, how))
        return images * 2, targets[::-1]

    monkeypatch.setattr(classify, "random_erasing", erase)
    monkeypatch.setattr(classify, "mix", mix)
    task = stages.classify({"erasing": 0.3, "label_smoothing": 0.2, "mix_group": 2})
    batch, seen = stages.batch(), []
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)

    class Model:
        def apply(self, variables, images, **kwargs):
            seen.append((images, kwargs))
            return stages_output(logits), {}

    task.model = Model()
    loss, _ = task.loss({"encoder": {}}, {}, {}, batch, stages.rngs(), train=True)
    (first, erase_key, clean, prob), (second, mix_key, erased, targets, how) = calls
    assert (first, second, prob) == ("erase", "mix", 0.3)
    assert how == {"mixup": 0.8, "cutmix": 1.0, "mix_prob": 1.0, "switch_prob": 0.5, "mix_group": 2}
    assert not np.array_equal(erase_key, mix_key)
    np.testing.assert_allclose(clean, stages.normalised(batch["image"]), atol=1e-5)
    np.testing.assert_array_equal(erased, clean + 1)
    np.testing.assert_array_equal(seen[0][0], erased * 2)
    assert seen[0][1]["train"] is True
    assert np.allclose(np.unique(targets), [0.04, 0.84])
    expected = -(reference.f64(targets)[::-1] * reference.log_softmax(reference.f64(logits))).sum(axis=1).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    task.loss({"encoder": {}}, {}, {}, batch, stages.rngs(), train=False)
    assert len(calls) == 2  # neither outside training
    np.testing.assert_allclose(seen[1][0], stages.normalised(batch["image"]), atol=1e-5)
    assert seen[1][1]["train"] is False


def stages_output(logits):
    return EncoderOutput(jnp.zeros((4, 17, 16)), {}, (), logits, (logits,))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_an_invalid_image_leaks_into_no_partner(kind, monkeypatch):
    """Its partner is mixed with itself."""
    monkeypatch.setattr(classify, "mix", lambda key, x, y, **_: ((x + partner(x)) / 2, (y + partner(y)) / 2))
    run = stages.Compiled(stages.classify({**PLAIN, kind: 1.0}))
    batch, other = (stages.batch(is_valid=[1, 0, 1, 1]) for _ in range(2))
    other["image"][1], other["label"][1] = 255 - other["image"][1], (other["label"][1] + 1) % 5
    results = [run.loss(data)[1].metrics["loss"] for data in (batch, other)]
    assert results[0].count == 3
    np.testing.assert_array_equal(results[0].sum, results[1].sum)


def test_an_invalid_image_gives_way_to_its_partner():
    values = jnp.arange(8.0).reshape(4, 2)
    replaced = classify.replace_by_partner(values, jnp.array([True, False, True, True]))
    np.testing.assert_array_equal(replaced, values[jnp.array([0, 3, 2, 3])])
    mixed = (replaced + partner(replaced)) / 2
    np.testing.assert_array_equal(mixed[3], values[3])


def test_drop_path_in_training_only():
    run, batch = stages.standard("classify"), stages.batch()  # drop path 0.3
    targets = np.eye(5)[batch["label"]]
    plain = -(targets * reference.log_softmax(forward(run.params, batch, "cls")[1])).sum(axis=1).mean()
    np.testing.assert_allclose(run.loss(batch, train=False)[0], plain, rtol=1e-5)
    assert run.task.task.erasing == 0  # nothing else is random
    assert len({float(run.loss(batch, seed)[0]) for seed in range(4)}) > 1


def test_flops_of_a_linear_probe():
    """Forward through frozen blocks, and the head's own backward pass."""
    stage = recipes.linear_probe(stages.vit(num_classes=5), config.Init(path="p"), stages.DATA, stages.DATA)
    head = 2.0 * stage.model.width * 5
    task = stage.task.build(Context(stage.model, stage.data, stage.optim.freeze))
    assert task.frozen_blocks == stage.model.depth
    assert task.flops_per_image() == pytest.approx(stage.model.forward_flops() + 2 * head)


def test_bfloat16_loss_is_float32():
    task = stages.classify(PLAIN, dtype="bfloat16")
    args = (*stages.weights(task), stages.batch(), stages.rngs())
    loss, _ = jax.eval_shape(lambda p, f, b, r: task.loss(p, {}, f, b, r, train=True), *args)
    assert loss.dtype == jnp.float32


# Labels from a teacher


TEACHER = stages.LABEL_TEACHER


def distilled(labels="hard", **teacher):
    teacher = config.LabelTeacher(config.Init("t"), labels=labels, **teacher)
    return stages.classify({**PLAIN, "label_smoothing": 0.1, "teacher": teacher}, dist_token=True, pool="mean")


@pytest.mark.parametrize(("labels", "weight"), [("hard", 0.3), ("soft", 0.6), ("hard", 0.0), ("soft", 1.0)])
def test_the_distillation_token_learns_from_the_teacher(labels, weight):
    """DeiT: (1 - a) CE(head, label) + a teacher's loss on the other head; the teacher sees the same images."""
    task, batch = distilled(labels, weight=weight, temperature=2.0), stages.batch()
    run, images = stages.Compiled(task), task.images(batch)
    loss, aux = run.loss(batch)
    out = jax.jit(task.model.apply)({"params": run.params["encoder"]}, images)
    teacher = jax.jit(task.teacher_cfg.build().apply)({"params": run.frozen["teacher"]["encoder"]}, images).logits
    smooth = np.full((4, 5), 0.02) + 0.9 * np.eye(5)[batch["label"]]
    own = -(smooth * reference.log_softmax(reference.f64(out.heads[0]))).sum(axis=1)
    log_p = reference.log_softmax(reference.f64(out.heads[1]))
    if labels == "hard":
        other = -log_p[np.arange(4), np.argmax(teacher, axis=1)]
    else:
        p, q = (reference.log_softmax(reference.f64(x) / 2) for x in (out.heads[1], teacher))
        other = 4 * (np.exp(q) * (q - p)).mean(axis=1)
    np.testing.assert_allclose(loss, ((1 - weight) * own + weight * other).mean(), rtol=1e-4)
    assert set(aux.metrics) == {"loss", "labels_beyond_head", "loss_labels", "loss_teacher"}


def test_inference_averages_both_heads():
    task, batch = distilled(), stages.batch()
    variables, frozen = stages.fresh(task)
    out = task.model.apply({"params": variables["params"]["encoder"]}, task.images(batch))
    np.testing.assert_allclose(task.predict(variables, frozen, batch).logits, sum(out.heads) / 2, rtol=1e-6)


def test_a_teacher_attends_as_the_stage_does():
    student = stages.vit(num_classes=5, dist_token=True, attention="cudnn", dtype="bfloat16")
    teacher = dataclasses.replace(TEACHER, remat=True)
    assert classify.check_teacher(student, teacher) == dataclasses.replace(TEACHER, attention="cudnn", dtype="bfloat16")
    with pytest.raises(InputError, match="the teacher: attention 'cudnn' takes .* 2 heads are 12 wide"):
        classify.check_teacher(student, dataclasses.replace(TEACHER, num_heads=2))


def test_models_that_cannot_classify():
    cfg = config.Classify(teacher=config.LabelTeacher(config.Init("t")))
    with pytest.raises(InputError, match=r"^task: classify needs model.num_classes of at least 2, got 1$"):
        cfg.check("task", stages.vit(num_classes=1))
    with pytest.raises(InputError, match=r"^task.teacher labels a distillation token: set model.dist_token=True$"):
        cfg.check("task", stages.vit(num_classes=5))
    cfg.check("task", stages.vit(num_classes=5, dist_token=True))


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ({}, {"num_classes": 7}, "the teacher has 7 classes and model.num_classes is 5"),
        ({}, {"num_classes": 0}, "the teacher has 0 classes"),
        ({}, {"head_norm": True}, "the teacher has a BatchNorm before its head"),
        ({}, {"image_size": 32}, "the teacher sees 32 px, the student 16"),
    ],
)
def test_teachers_that_cannot_label(student, teacher, message):
    student = stages.vit(**{"num_classes": 5, "dist_token": True, **student})
    with pytest.raises(InputError, match=message):
        classify.check_teacher(student, dataclasses.replace(TEACHER, **teacher))


# Linear probing


def test_a_probe_normalises_features_and_keeps_their_statistics():
    """BatchNorm without affine: the batch's statistics in training, running ones (torch's momentum 0.1) behind it."""
    task = stages.classify(PLAIN, head_norm=True, pool="cls")
    batch = stages.batch()
    variables, _ = stages.fresh(task)
    assert set(variables) == {"params", "batch_stats"} and "head_norm" not in variables["params"]["encoder"]
    model_state = {"batch_stats": variables["batch_stats"]}
    losses = [
        jax.jit(functools.partial(task.loss, train=train))(variables["params"], model_state, {}, batch, stages.rngs())
        for train in (False, True)
    ]
    (_, same), (_, aux) = losses
    cls = np.asarray(
        jax.jit(task.model.apply)({**model_state, "params": variables["params"]["encoder"]}, task.images(batch)).tokens[
            :, 0
        ]
    )
    stats = aux.model_state["batch_stats"]["head_norm"]
    np.testing.assert_allclose(stats["mean"], 0.1 * cls.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * cls.var(axis=0, ddof=1), rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, same.model_state, model_state)


def test_a_probe_s_head_starts_from_an_uncut_normal():
    """MAE's trunc_normal_(std=0.01) cuts at 2, not at two standard deviations: a normal's tail is there."""
    task = stages.classify(PLAIN, head_norm=True, pool="cls", num_classes=20_000)
    kernel = np.asarray(stages.fresh(task)[0]["params"]["encoder"]["head"]["kernel"])
    assert kernel.std() == pytest.approx(0.01, rel=0.01)
    beyond = [(np.abs(kernel) > k * 0.01).mean() for k in (2, 3)]
    assert beyond == pytest.approx([0.0455, 0.0027], rel=0.2)
