"""All targets at once, each with its own term: as micro-batches, replicas, in bfloat16 and on several devices."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.conftest import tiny_distill, tiny_mae
from tests.training.test_step import batch_of
from tinymim_jax.experiment.config import AttentionLogits, ClassToken, Decoder, Feature, Reconstruction, Relation
from tinymim_jax.runtime import keys, sharding
from tinymim_jax.training.setup import make_setup
from tinymim_jax.training.step import create_state, host_keys, train_step

pytestmark = pytest.mark.slow
TARGETS = {
    "relation": Relation(3, 2, ("qk", "kk", "qq", "vv")),
    "products": Relation(2, 2, softmax=False),
    "feature": Feature(2, 1, ("mlp_out", "mid", "q")),
    "cls": ClassToken(3, 2),
    "logits": AttentionLogits(3, 2),
    "pixels": Reconstruction(1, Decoder(16, 1, 2)),
}
MASK = 0.25  # three of four patches are seen


def distill(*left_out, mask_ratio=MASK, **run):
    stage = tiny_distill()
    stage.task.targets = {name: target for name, target in TARGETS.items() if name not in left_out}
    stage.task.mask_ratio, stage.task.color_jitter, stage.model.drop_path = mask_ratio, 0.0, 0.0
    stage.optim.warmup_epochs, stage.run = 0, dataclasses.replace(stage.run, **run)
    return stage


def one_step(stage, batch=None, shared=True, mesh=None):
    """(state behind one step, its metrics by name), of frozen weights that are always the same."""
    setup = make_setup(stage, "stage", {"teacher": tiny_mae().model}, 40)
    batch = batch_of(stage) if batch is None else batch
    state = create_state(setup, host_keys(setup, keys.INIT))
    frozen = jax.jit(setup.task.init)(jax.random.key(0), batch_of(stage))[1]
    if mesh is not None:
        batch = sharding.put_batch(batch, mesh, axis=0)
        state, frozen = (sharding.put_tree(x, sharding.state_sharding(mesh, x)) for x in (state, frozen))
    state, metrics = jax.jit(train_step(setup))(state, frozen, batch, host_keys(setup, keys.STEPS))
    return state, {name: mean.value().tolist() for name, mean in metrics.items()}


def close(ours, theirs, rtol=2e-4):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), ours.opt_state, theirs.opt_state)


def test_micro_batches_are_one_batch():
    whole, expected = one_step(distill("pixels", mask_ratio=0.0))
    stage = distill("pixels", mask_ratio=0.0)
    stage.optim.accum_steps = 2
    parts, found = one_step(stage)
    assert {name.split("_")[0] for name in found} > {*TARGETS} - {"pixels"}
    assert found == pytest.approx(expected, rel=1e-4)
    close(parts, whole)


def test_replicas_are_single_runs():
    together, found = one_step(distill(seed=3, replicas=2, data_seed=0))
    for replica in range(2):
        alone, expected = one_step(distill(seed=3 + replica))
        assert {name: values[replica] for name, values in found.items()} == pytest.approx(expected, rel=1e-4)
        close(jax.tree.map(lambda x, i=replica: x[i], together), alone)


def test_in_bfloat16_each_term_is_near():
    stage = distill()
    _, expected = one_step(stage)
    stage.model.dtype = "bfloat16"
    state, found = one_step(stage)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    terms = {name for name in expected if name.split("_")[0] in TARGETS}
    assert {name.split("_")[0] for name in terms} == {*TARGETS}
    assert {name: found[name] for name in terms} == pytest.approx({name: expected[name] for name in terms}, rel=0.03)


DEVICES = """
import json, jax, numpy as np
from tests.training.test_every_target import distill, one_step
from tinymim_jax.runtime.sharding import make_mesh
out = []
for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(2, 2)):
    state, metrics = one_step(distill(), mesh=mesh)
    moments = [float(np.abs(np.asarray(x)).sum()) for x in jax.tree.leaves(state.opt_state)]
    out.append([{name: float(value) for name, value in metrics.items()}, moments])
print("RESULT" + json.dumps(out))
"""


def test_on_two_by_two_devices_all_is_as_on_one():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    (one, moments), (four, found) = json.loads(done.stdout.split("RESULT")[1])
    assert four == pytest.approx(one, rel=1e-4)
    assert found == pytest.approx(moments, rel=1e-3, abs=1e-6)
