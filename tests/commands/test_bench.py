import json

import pytest

from tests.conftest import tiny_classify, tiny_distill, tiny_mae
from tinymim_jax.__main__ import main
from tinymim_jax.commands import bench
from tinymim_jax.plan import make_plan

DIGITS = "--config=configs/digits/chain.py"


def test_step_prints_one_json_object(capsys):
    assert main(["bench", "step", DIGITS, "--stage=distill_t", "--batch_size=4", "--rounds=1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["stage"], result["batch_size"], result["devices"]) == ("distill_t", 4, 1)
    assert result["images_per_s"] == pytest.approx(4 / result["step_s"])
    assert result["model_flops_share"] == pytest.approx(
        result["model_flops"] / result["step_s"] / result["matmul_flops_per_s"]
    )
    assert result["model_flops"] < result["xla_flops"] and result["peak_memory_bytes"] > 0


@pytest.mark.parametrize(
    ("stage", "teacher"), [(tiny_mae(), None), (tiny_distill(), tiny_mae().model), (tiny_classify(), None)]
)
def test_every_task_can_be_timed(stage, teacher, mesh):
    compiled, arguments = bench.compile_step(make_plan(stage, teacher, 40), mesh)
    for _ in range(2):
        arguments, seconds = bench.timed_step(compiled, arguments)
        assert seconds > 0
    assert int(arguments[0].step) == 2


def test_the_matmul_is_not_optimised_away():
    assert 1e8 < bench.matmul("float32")() < 1e13


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fly"], "unknown benchmark 'fly'; choose one of step"),
        ([DIGITS, "--stage=mae_l"], "unknown benchmark '--config=configs/digits/chain.py'; choose one of step"),
        (["augment", DIGITS, "--stage=mae_l"], "--stage=mae_l does not mix or erase images"),
        (["step", DIGITS], "--stage=NAME is needed; choose one of mae_l"),
        (["step", DIGITS, "--stage=x"], "--stage=x: no such stage; choose one of mae_l"),
        (["step", DIGITS, "--stage=mae_l", "--batch_size=0"], "--batch_size=0: 0 is not a positive integer"),
        (
            ["step", DIGITS, "--stage=mae_l", "--config.stages.mae_l.optim.accum_steps=3"],
            "not a multiple of accum_steps",
        ),
    ],
)
def test_bad_input(argv, message, capsys):
    assert main(["bench", *argv]) == 2
    assert message in capsys.readouterr().err


def test_loader_prints_one_json_object(capsys, monkeypatch):
    monkeypatch.setattr(bench, "LOADER_IMAGES", 5)
    assert main(["bench", "loader", DIGITS, "--stage=mae_l", "--rounds=1"]) == 0
    result = json.loads(capsys.readouterr().out)
    rates = [result[f"{name}_images_per_s"] for name in ("decode", "random_resized_crop", "transform")]
    assert min(rates) > 0 and result["of_decode"] == pytest.approx(rates[2] / rates[0])


def test_augment_prints_one_json_object(capsys):
    assert main(["bench", "augment", DIGITS, "--stage=finetune_chain_0", "--batch_size=8", "--rounds=1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["share"] == pytest.approx(1 - result["plain_step_s"] / result["step_s"])
