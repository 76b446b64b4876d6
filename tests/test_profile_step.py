import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests import profile_step
from tests.conftest import tiny_distill, tiny_mae
from tests.processes import ROOT, environment
from tinymim_jax.tasks.contract import STREAMS
from tinymim_jax.tasks.targets import relation
from tinymim_jax.training import optim
from tinymim_jax.training.setup import example_batch, make_setup
from tinymim_jax.training.step import create_state


@pytest.fixture
def gradient():
    """A function that gives the text of the program for a distillation's loss and gradient, and these."""
    stage = tiny_distill()
    stage.model.drop_path = 0.0
    plan = make_setup(stage, "distill", {"teacher": tiny_mae().model}, 40)
    key = jax.random.key(0)
    batch = example_batch(plan.task, stage)
    batch["image"] = np.random.default_rng(0).integers(0, 256, batch["image"].shape, np.uint8)
    params, (_, frozen) = create_state(plan, key).params, plan.task.init(key, batch)

    def run():
        def loss(params):
            rngs = dict.fromkeys(STREAMS, key)
            return plan.task.loss(optim.stop_frozen(params, plan.labels), {}, frozen, batch, rngs, train=True)[0]

        lowered = jax.jit(jax.value_and_grad(loss)).lower(params)
        return lowered.as_text(), lowered.compile()(params)

    return run


@pytest.mark.slow
def test_each_plain_piece_computes_the_same_by_another_program(gradient):
    text, (value, expected) = gradient()
    for name in profile_step.PLAIN:
        with profile_step.plain(name):
            other, (plain_value, found) = gradient()
        assert other != text, name
        np.testing.assert_allclose(plain_value, value, rtol=1e-5, err_msg=name)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6, err_msg=name)
    assert gradient()[0] == text  # nothing stays behind


@pytest.mark.slow
def test_one_json_object(capsys):
    argv = ["--config=tests/tiny_chain.py:steps=1000", "--stage=distill", "--batch_size=4", "--rounds=1"]
    profile_step.main(argv)
    found = json.loads(capsys.readouterr().out)["found"]
    assert {f"step, plain {name}" for name in [*profile_step.PLAIN, "all"]} < set(found)
    assert all(one["s"] > 0 for one in found.values())


def test_ratios_are_of_plain_steps_to_the_step_as_it_is(monkeypatch, capsys):
    """Which takes 2 s here, and 3 if its relation loss is plain."""

    def fake(*_):
        return functools.partial(float, 3 if relation.relation_kl is profile_step.plain_kl else 2)

    monkeypatch.setattr(profile_step, "step_clock", fake)
    monkeypatch.setattr(profile_step, "parts", lambda *_: {})
    profile_step.main(["--config=tests/tiny_chain.py:steps=1000", "--stage=distill", "--rounds=2"])
    found = json.loads(capsys.readouterr().out)["found"]
    slow = {"step, plain relation loss", "step, plain all"}
    assert found.pop("step") == {"s": 2.0}
    assert all(
        one == ({"s": 3.0, "ratio": 1.5} if name in slow else {"s": 2.0, "ratio": 1.0}) for name, one in found.items()
    )


@pytest.mark.parametrize("stage", ["mae_l", "x"])
def test_bad_input(stage):
    argv = [sys.executable, "-m", "tests.profile_step", "--config=configs/digits/chain.py", f"--stage={stage}"]
    done = subprocess.run(argv, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"error: --stage={stage} is no distillation of the chain; choose one of distill_b")
