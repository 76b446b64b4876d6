import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinymim_jax.bench import step as bench
from tinymim_jax.experiment.config import Classify
from tinymim_jax.runtime import keys
from tinymim_jax.training.setup import make_setup
from tinymim_jax.training.step import create_state, host_keys, make_train_step
from tinymim_jax.weights.parameters import flatten


def batch_of(stage, n=8):
    rng = np.random.default_rng(0)
    size = stage.data.image_size
    images = rng.integers(0, 256, (n, size, size, 3), np.uint8)
    labels = rng.integers(0, 10, n).astype(np.int32)
    flags = {"is_valid": np.ones(n, bool), "stop": np.zeros(n, np.uint8)}
    return {"image": images, "label": labels, "index": np.arange(n, dtype=np.int32), **flags}


def plain_classify(chain, **optim):
    stage = chain.stages["finetune"]
    stage.init, stage.model.drop_path = None, 0.0
    stage.task = Classify(mixup=0.0, cutmix=0.0, erasing=0.0)
    stage.optim = dataclasses.replace(stage.optim, warmup_epochs=0, **optim)
    return stage


def one_step(stage, batch, steps=1):
    plan = make_setup(stage, "stage", {}, 40)
    state = create_state(plan, host_keys(plan, keys.INIT))
    step = jax.jit(make_train_step(plan))
    for _ in range(steps):
        state, metrics = step(state, {}, batch, jax.random.key(1))
    return state, metrics


@pytest.mark.parametrize("per_call", [1, 3])
def test_a_step_writes_its_state_where_the_one_before_lay(chain, mesh, per_call):
    stage = plain_classify(chain)
    stage.run.steps_per_call = per_call
    compiled, (state, *_) = bench.compile_step(make_setup(stage, "stage", {}, 40), mesh)
    assert compiled.memory_analysis().alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(state))


@pytest.mark.slow
def test_accumulation_gives_the_gradient_of_the_whole_batch(chain):
    stage = plain_classify(chain)
    batch = batch_of(stage)
    whole, whole_metrics = one_step(stage, batch)
    stage.optim.accum_steps = 4
    parts, parts_metrics = one_step(stage, batch)
    # Adam's first step divides by |gradient|: compare its moments, which hold the gradient itself.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-7), whole.opt_state, parts.opt_state)
    assert float(parts_metrics["loss"].count) == 8
    np.testing.assert_allclose(parts_metrics["loss"].value(), whole_metrics["loss"].value(), rtol=1e-5)


def test_accumulation_weighs_micro_batches_by_their_valid_images(chain):
    stage = plain_classify(chain)
    batch = batch_of(stage)
    batch["is_valid"][[0, 4]] = False  # both in the first of four micro-batches
    whole, _ = one_step(stage, batch)
    stage.optim.accum_steps = 4
    parts, _ = one_step(stage, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-7), whole.opt_state, parts.opt_state)


def test_accumulation_keeps_the_statistics_of_the_whole_batch(chain):
    stage = plain_classify(chain)
    stage.model = dataclasses.replace(stage.model, depth=1, head_norm=True)
    batch = batch_of(stage)
    whole, _ = one_step(stage, batch)
    stage.optim.accum_steps = 2
    parts, _ = one_step(stage, batch)
    stats = [flatten(state.model_state) for state in (whole, parts)]
    assert set(stats[0]) == {"batch_stats/head_norm/mean", "batch_stats/head_norm/var"} == set(stats[1])
    for name, value in stats[0].items():
        np.testing.assert_allclose(stats[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_ema_follows_the_weights(chain):
    stage = plain_classify(chain, ema=0.9)
    plan = make_setup(stage, "stage", {}, 40)
    start = create_state(plan, host_keys(plan, keys.INIT)).params
    state, _ = one_step(stage, batch_of(stage), steps=1)
    expected = jax.tree.map(lambda old, new: 0.9 * np.float64(old) + 0.1 * np.float64(new), start, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.ema, expected)
    assert one_step(plain_classify(chain, ema=None), batch_of(stage))[0].ema == {}


@pytest.mark.slow
def test_frozen_and_untrained_parameters_keep_their_values(chain, mesh, tmp_path):
    chain.stages["mae"].optim.freeze = ("encoder/block1/.*",)
    stage = chain.stages["mae"]
    plan = make_setup(stage, "stage", {}, 40)
    start = flatten(create_state(plan, host_keys(plan, keys.INIT)).params)
    state, _ = one_step(stage, batch_of(stage), steps=3)
    for name, value in flatten(state.params).items():
        moved = bool(jnp.any(value != start[name]))
        # A zero gradient in the first steps would leave a bias of keys where it is; nothing else may stay.
        assert moved == (name not in plan.untrained()), name
