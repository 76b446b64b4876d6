import json

import pytest

from tinymim_jax.__main__ import main

STUDY = "--config=configs/cifar10/study.py:table=7,short"


@pytest.mark.slow
def test_students_beside_each_other_and_one_by_one(capsys):
    assert main(["bench", "beside", STUDY, "--stage=relation_b", "--batch_size=4", "--rounds=1", "--students=2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["stage"], found["students"], found["batch_size"]) == ("relation_b", 2, 4)
    assert found["ratio"] == pytest.approx(found["alone_s"] / found["together_s"])
    assert 1.15 < found["flops_ratio"] < 1.5  # the teacher has a quarter or more of the operations
    assert found["alone_bytes"] < found["together_bytes"] < 2 * found["alone_bytes"]


@pytest.mark.parametrize("stage", ["mae_l", "relation_b_finetuned"])
def test_a_stage_that_shares_nothing(stage, capsys):
    assert main(["bench", "beside", STUDY, f"--stage={stage}"]) == 2
    assert f"--stage={stage} shares no teacher's pass; choose a stage that distils" in capsys.readouterr().err
