from tinymim_jax.__main__ import main


def test_a_checkpoint_is_measured(finished, tmp_path, capsys):
    assert main(["eval", str(finished / "mae"), "--suite=probe", f"--out={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "| logistic/top1 |" in out and f"wrote {tmp_path}/eval.json and {tmp_path}/eval.md" in out
    assert main(["eval", str(finished / "mae"), "--suite=imagenet"]) == 2
    assert "needs a model with a head" in capsys.readouterr().err


def test_bad_input(tmp_path, capsys):
    assert main(["eval", str(tmp_path / "gone")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
