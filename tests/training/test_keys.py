"""No two uses of randomness share a key: within a stage, between stages of one seed, and between seeds."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.conftest import tiny_mae
from tinymim_jax.data import resident
from tinymim_jax.data.fields import IMAGE_LABEL
from tinymim_jax.data.rows import epoch_order
from tinymim_jax.objectives.metrics import Mean
from tinymim_jax.runtime import keys
from tinymim_jax.tasks.contract import STREAMS, Aux
from tinymim_jax.training import start
from tinymim_jax.training.setup import StageSetup, make_setup, step_batch
from tinymim_jax.training.step import create_state, host_keys, make_train_step

STEPS, EPOCHS, IMAGES, REPEATS = 6, 2, 40, 2  # 5 steps an epoch, of 20 images twice each


def words(key: jax.Array) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


class Recorder:
    """A task that notes the keys it is given, and learns nothing."""

    fields = IMAGE_LABEL

    def __init__(self, found):
        self.found = found

    def init(self, rng, batch):
        self.found.append(words(rng))
        return {"params": {"x": jnp.zeros(())}}, {}

    def merge_state(self, before, parts, rows):
        return before

    def loss(self, params, model_state, frozen, batch, rngs, *, train):
        self.found += [words(rng) for rng in rngs.values()]
        nothing = 0.0 * params["x"]
        return nothing, Aux({"loss": Mean.of(nothing)}, model_state)


def stage_setup(name: str, seed: int, accum_steps: int) -> StageSetup:
    stage = tiny_mae()
    stage.run.seed, stage.data.repeats, stage.optim.accum_steps = seed, REPEATS, accum_steps
    return make_setup(stage, name, {}, IMAGES)


def keys_of_the_loop(setup: StageSetup) -> list[tuple[int, ...]]:
    """Of the initial weights, and of every step's streams."""
    found: list[tuple[int, ...]] = []
    tx = optax.scale_by_learning_rate(setup.schedule)
    setup = dataclasses.replace(setup, task=Recorder(found), labels={"x": "decay"}, tx=tx)
    with jax.disable_jit():  # keys are numbers then, also of micro-batches
        state = create_state(setup, host_keys(setup, keys.INIT))
        step, batch = make_train_step(setup), step_batch(setup)
        for _ in range(STEPS):
            state, _ = step(state, {}, batch, host_keys(setup, keys.STEPS))
    return found


def keys_of_crops(setup: StageSetup, mesh, monkeypatch) -> list[tuple[int, ...]]:
    """Of each image that is cropped on the device."""
    with monkeypatch.context() as patched:
        patched.setattr(resident, "crop_and_flip", lambda data, image, key: jax.random.key_data(key)[None, None])
        rows = start.rows_of(setup)
        made = [
            resident.make_batch(setup.stage.data, batch)["image"][:, 0, 0]
            for batch in resident.train_batches(rows, 0, STEPS, mesh)
        ]
    return [tuple(row) for row in np.concatenate(made).tolist()]


def seeds_of_the_host(setup: StageSetup, monkeypatch) -> list[tuple[int, ...]]:
    """What each generator of orders and images begins with."""
    found = []
    default_rng = np.random.default_rng

    def noted(seed):
        found.append(tuple(np.random.SeedSequence(seed).generate_state(4).tolist()))
        return default_rng(seed)

    epoch_order.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(np.random, "default_rng", noted)
        rows = start.rows_of(setup)
        for step in range(STEPS):
            rows(step)
    return found


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_no_two_uses_share_a_key(accum_steps, mesh, monkeypatch):
    on_devices, on_host = [], []
    for name, seed in (("a", 0), ("b", 0), ("a", 1)):
        setup = stage_setup(name, seed, accum_steps)
        loop, crops = keys_of_the_loop(setup), keys_of_crops(setup, mesh, monkeypatch)
        assert len(loop) == 1 + STEPS * accum_steps * len(STREAMS)
        assert len(crops) == STEPS * setup.stage.run.batch_size
        on_devices += [*loop, *crops]
        found = seeds_of_the_host(setup, monkeypatch)
        assert len(found) == EPOCHS + STEPS * setup.stage.run.batch_size
        on_host += found
    for used in (on_devices, on_host):
        twice = [key for key, count in collections.Counter(used).items() if count > 1]
        assert twice == []


def test_the_replicas_of_a_stage_have_the_keys_of_its_seeds():
    stage = tiny_mae()
    stage.run.replicas = 3
    setup = make_setup(stage, "a", {}, IMAGES)
    for stream in (keys.INIT, keys.STEPS):
        own = jax.random.key_data(host_keys(setup, stream))
        alone = [jax.random.key_data(host_keys(stage_setup("a", seed, 1), stream)) for seed in range(3)]
        np.testing.assert_array_equal(own, jnp.stack(alone))
