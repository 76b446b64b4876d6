import json

import pytest

from tinymim_jax.__main__ import main

DIGITS = "--config=configs/digits/chain.py"


def test_a_stage_on_this_machine(capsys, tmp_path):
    assert main(["plan", DIGITS, "--stage=distill_t", f"--json={tmp_path / 'plan.json'}"]) == 0
    out = capsys.readouterr().out
    assert "| distill_t | 128 |" in out
    assert json.loads((tmp_path / "plan.json").read_text())["stages"]["distill_t"]["batch_size"] == 128


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([DIGITS, "--stage=x"], "--stage=x: no such stage; choose one of mae_l"),
        ([DIGITS, "--topology=v9:2x2"], "--topology=v9:2x2: write it like v5e:16x16"),
        (["--topology=v4:4x4x4"], "--config=FILE is needed"),
        ([DIGITS, "--json=plan"], "name a file that ends in .json"),
        ([DIGITS, "--json=README.md/plan.json"], "README.md"),
    ],
)
def test_bad_input(argv, message, capsys):
    assert main(["plan", *argv]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out
