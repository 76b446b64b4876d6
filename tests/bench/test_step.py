import json
import sys

import jax
import pytest

from tests.conftest import tiny_classify, tiny_distill, tiny_mae
from tinymim_jax.__main__ import main
from tinymim_jax.bench import step
from tinymim_jax.training.setup import make_setup
from tinymim_jax.weights.parameters import flatten

DIGITS = "--config=configs/digits/chain.py"


@pytest.mark.slow
def test_step_prints_one_json_object(capsys, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    assert main(["bench", "step", DIGITS, "--stage=distill_t", "--batch_size=4", "--rounds=1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["stage"], result["batch_size"], result["devices"]) == ("distill_t", 4, 1)
    assert result["images_per_s"] == pytest.approx(4 / result["step_s"])
    assert result["model_flops_share"] == pytest.approx(
        result["model_flops"] / result["step_s"] / result["matmul_flops_per_s"]
    )
    assert result["memory_bytes_per_s"] > 1e7 and result["first_step_s"] > result["step_s"]
    assert result["command"].startswith("python ") and sys.executable not in result["command"]
    assert result["floor_s"] >= result["model_flops"] / result["matmul_flops_per_s"]
    assert result["floor_share"] == pytest.approx(result["floor_s"] / result["step_s"])
    assert result["jax"] == jax.__version__ and result["environment"]["MALLOC_ARENA_MAX"] == "8"
    assert result["model_flops"] < result["xla_flops"] and result["peak_memory_bytes"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "teacher"), [(tiny_mae(), None), (tiny_distill(), tiny_mae().model), (tiny_classify(), None)]
)
def test_every_task_can_be_timed(stage, teacher, mesh):
    compiled, arguments = step.compile_step(
        make_setup(stage, "stage", {"teacher": teacher} if teacher else {}, 40), mesh
    )
    steps = []

    def noted(*args):
        steps.append(int(args[0].step))
        return compiled(*args)

    clock = step.step_clock(noted, arguments)
    assert clock() > 0 and clock() > 0 and steps == [0, 1]


def test_the_matmul_is_not_optimised_away():
    assert 1e8 < step.matmul("float32")() < 1e13


def test_the_least_bytes_are_those_of_weights_moments_and_images(mesh):
    stage = tiny_mae()
    setup = make_setup(stage, "stage", {}, 40)
    _, (state, frozen, batch, _) = step.compile_step(setup, mesh)
    sizes = {name: leaf.size for name, leaf in flatten(setup.params).items()}
    trained = sum(size for name, size in sizes.items() if name not in setup.untrained())
    found = step.least_bytes(state, frozen, batch, 1)
    images = sum(array.nbytes for array in batch.values())
    state = 2 * 4 * (sum(sizes.values()) + 2 * trained)  # weights, and two moments of those that are trained
    assert state <= found - images < state + 500  # and counters


@pytest.mark.slow
def test_augment_prints_one_json_object(capsys):
    assert main(["bench", "augment", DIGITS, "--stage=finetune_chain", "--batch_size=8", "--rounds=1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["share"] == pytest.approx(1 - result["plain_step_s"] / result["step_s"])
