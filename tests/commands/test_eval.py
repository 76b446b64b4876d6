from tests.conftest import tiny_mae
from tinymim_jax.__main__ import main
from tinymim_jax.training.loop import run_stage


def test_a_checkpoint_is_measured(mesh, tmp_path, capsys):
    run_stage(tiny_mae(), "mae", tmp_path, mesh)
    assert main(["eval", str(tmp_path / "mae"), "--suite=probe"]) == 0
    out = capsys.readouterr().out
    assert "| logistic/top1 |" in out and f"and {tmp_path / 'mae' / 'eval' / 'eval.md'}" in out
    assert main(["eval", str(tmp_path / "mae"), "--suite=imagenet"]) == 2
    assert "needs a model with a head" in capsys.readouterr().err


def test_bad_input(tmp_path, capsys):
    assert main(["eval", str(tmp_path / "gone")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
