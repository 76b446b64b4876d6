"""The contract, for every task."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tasks import stages
from tests.tasks.stages import MAKE, standard
from tinymim_jax.data.fields import Fields
from tinymim_jax.experiment import config
from tinymim_jax.models.contract import Outputs
from tinymim_jax.objectives.metrics import Mean
from tinymim_jax.tasks import TASKS
from tinymim_jax.tasks.contract import STREAMS, Aux, Context, TaskConfig
from tinymim_jax.tasks.targets import TARGETS

STATE = {"moco": {"moco"}, "segment": {"batch_stats"}}  # collections beside the parameters
COUNTED = {"segment": 16 * 16}  # of each image, where it is not one
TASK = pytest.mark.parametrize("kind", MAKE)


def test_no_task_is_untested():
    assert MAKE.keys() == TASKS.keys() == {cfg.kind for cfg in TASKS.values()}
    assert all(issubclass(cfg, TaskConfig) for cfg in TASKS.values())
    assert {kind: cfg.kind for kind, cfg in TARGETS.items()} == {kind: kind for kind in TARGETS}


def test_streams():
    assert STREAMS == ("mask", "augment", "drop_path")  # their order is part of a run's random numbers


@TASK
def test_contract(kind):
    task = MAKE[kind]()
    assert isinstance(task.fields, Fields)
    assert isinstance(task.flops_per_image(), float) and task.flops_per_image() > 0
    variables, frozen = jax.eval_shape(task.init, jax.random.key(0), stages.batch(1))
    assert set(variables) == {"params", *STATE.get(kind, ())}
    assert set(variables["params"]) == ({"encoder", "pretext"} if kind in ("mae", "moco", "segment") else {"encoder"})
    assert frozen.keys() == ({"teacher"} if kind == "distill" else set())
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype("float32")}


@TASK
@pytest.mark.parametrize("train", [False, True])
def test_loss_and_its_metrics(kind, train):
    loss, aux = standard(kind).loss(stages.batch(is_valid=[1, 1, 0, 1]), train=train)
    assert loss.shape == () and loss.dtype == jnp.float32 and np.isfinite(loss)
    assert isinstance(aux, Aux) and aux.model_state.keys() == STATE.get(kind, set())
    assert all(isinstance(m, Mean) and m.sum.shape == m.count.shape == () for m in aux.metrics.values())
    np.testing.assert_allclose(aux.metrics["loss"].value(), loss, rtol=1e-6)
    assert {float(m.count) for key, m in aux.metrics.items() if key != "labels_beyond_head"} == {
        3 * COUNTED.get(kind, 1)
    }


@TASK
def test_model_state_is_handed_on(kind):
    task, (params, frozen) = MAKE[kind](), stages.weights(MAKE[kind]())
    own = dict(jax.eval_shape(task.init, jax.random.key(0), stages.batch())[0])
    state = {"batch_stats": {"mean": np.ones(3)}, **{name: own[name] for name in own if name != "params"}}
    _, aux = jax.eval_shape(
        functools.partial(task.loss, train=True), params, state, frozen, stages.batch(), stages.rngs()
    )
    assert jax.tree.structure(aux.model_state) == jax.tree.structure(state)


@TASK
def test_a_step_is_a_function_of_its_keys(kind):
    task = standard(kind)
    first, again, other = (task.loss(stages.batch(), seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first != other


@TASK
def test_evaluation_draws_nothing_but_the_mask(kind):
    task = standard(kind)
    losses = [float(task.loss(stages.batch(), seed, train=False)[0]) for seed in (0, 1)]
    assert (losses[0] == losses[1]) == (kind != "mae")
    outputs = [task.predict(stages.batch()) for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *outputs)


@TASK
@pytest.mark.parametrize("train", [False, True])
def test_an_invalid_image_counts_for_nothing(kind, train):
    task = standard(kind)
    batch, other = (stages.batch(is_valid=[1, 0, 1, 1]) for _ in range(2))
    other["image"][1] = np.random.default_rng(9).integers(0, 256, other["image"][1].shape)
    other["label"][1] = -7
    for (name, a), b in zip(
        task.loss(batch, train=train)[1].metrics.items(), task.loss(other, train=train)[1].metrics.values(), strict=True
    ):
        np.testing.assert_array_equal(a.sum, b.sum, err_msg=name)
    if kind == "moco" or (kind == "segment" and train):  # where images are compared with each other, or normalised
        return
    # The valid rows weigh as much as if they were alone: the sum of four is that of the three and the fourth.
    every = task.loss(stages.batch(), train=train)[1].metrics["loss"]
    fourth = task.loss(stages.batch(is_valid=[0, 1, 0, 0]), train=train)[1].metrics["loss"]
    three = task.loss(batch, train=train)[1].metrics["loss"]
    np.testing.assert_allclose(every.sum, fourth.sum + three.sum, rtol=1e-5)
    assert [mean.count / COUNTED.get(kind, 1) for mean in (every, fourth, three)] == [4, 1, 3]


@TASK
def test_an_invalid_image_has_no_gradient(kind):
    task = standard(kind)
    batch, other = (stages.batch(is_valid=[1, 0, 1, 1]) for _ in range(2))
    other["image"][1] = 0  # constant patches too
    grads = [task.gradients(data) for data in (batch, other)]
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    jax.tree.map(np.testing.assert_array_equal, *grads)


def test_a_masked_nan_does_not_leak():
    values = jnp.array([1.0, jnp.nan, 3.0])
    mean = Mean.of(values, jnp.array([True, False, True]))
    assert (mean.sum, mean.count, mean.value()) == (4, 2, 2)
    assert np.isnan(Mean.of(values).value())


@TASK
def test_predict(kind):
    out = standard(kind).predict(stages.batch())
    assert isinstance(out, Outputs)
    assert out.features.shape == (4, 12 if kind == "distill" else 16)
    assert (out.logits is None) == (kind != "classify")


POSITIONS = {"encoder/pos_embed"}
TRAINABLE = {"posembed": "trainable"}
PLAIN = {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0}


@pytest.mark.parametrize(
    ("make", "untrained"),
    [
        (stages.mae, {*POSITIONS, "pretext/decoder/pos_embed"}),
        (functools.partial(stages.mae, **TRAINABLE), {"pretext/decoder/pos_embed"}),
        (functools.partial(stages.classify, PLAIN), POSITIONS),
        (stages.moco, POSITIONS),
        (functools.partial(stages.classify, PLAIN, pool="mean", neck=8, **TRAINABLE), set()),
        (functools.partial(stages.classify, {**PLAIN, "teacher": config.LabelTeacher(config.Init("t"))},
                           pool="mean", dist_token=True), POSITIONS),
    ],
    ids=["mae", "mae trained positions", "classify", "moco", "classify with a neck", "classify with a teacher"],
)  # fmt: skip
def test_untrained_is_what_has_no_gradient(make, untrained):
    """Of distillation, where most of it is: tests of its targets."""
    assert stages.check_untrained(make())[0] == untrained


@pytest.mark.parametrize("lie", [lambda name: False, lambda name: name == "encoder/cls_token"])
def test_a_task_that_is_wrong_about_it_is_caught(lie):
    task = stages.mae()
    task.is_untrained = lie
    with pytest.raises(AssertionError):
        stages.check_untrained(task)


WIDE = {"width": 256, "depth": 2, "num_heads": 4, "image_size": 64, "patch_size": 8}


@pytest.mark.parametrize(
    ("task", "extra"),
    [
        (config.Mae(decoder=config.Decoder(192, 2, 4)), {}),
        (config.Classify(mixup=0.0, cutmix=0.0), {"num_classes": 100, "pool": "mean"}),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_flops_against_xla(task, extra):
    """The cost of a gradient, element-wise work included, is at most 5 % above the matmuls counted by hand."""
    context = Context(config.ViT(**WIDE, **extra), config.Data("digits", image_size=64))
    assert 0.95 < flops_ratio(task.build(context), 4) < 1.05


def flops_ratio(task, batch_size):
    """XLA's FLOPs of the gradient over the task's own count."""
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, 64, 64, 3), "uint8"),
        "label": jax.ShapeDtypeStruct((batch_size,), "int32"),
        "is_valid": jax.ShapeDtypeStruct((batch_size,), "bool"),
    }
    variables, frozen = jax.eval_shape(task.init, jax.random.key(0), batch)

    def loss(params, frozen, batch):
        return task.loss(params, {}, frozen, batch, stages.rngs(), train=True)[0]

    compiled = jax.jit(jax.grad(loss)).lower(variables["params"], frozen, batch).compile()
    return compiled.cost_analysis()["flops"] / (task.flops_per_image() * batch_size)
