import pytest

from tinymim_jax.__main__ import main

DIGITS = "--config=configs/digits/chain.py"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fly"], "unknown benchmark 'fly'; choose one of step"),
        ([DIGITS, "--stage=mae_l"], "unknown benchmark '--config=configs/digits/chain.py'; choose one of step"),
        (["augment", DIGITS, "--stage=mae_l", "--vs=torch"], "--vs is for bench step, not augment"),
        (["step", DIGITS, "--stage=mae_l", "--tokens=1"], "--tokens is for bench relation, not step"),
        (["step", DIGITS, "--stage=mae_l", "--rows=1"], "--rows is for bench relation, not step"),
        (
            ["loader", DIGITS, "--stage=mae_l", "--batch_size=1"],
            "--batch_size is for bench step, beside, augment, relation, not loader",
        ),
        (["step", DIGITS, "--stage=mae_l", "--vs=numpy"], "--vs"),
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
