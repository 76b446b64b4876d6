from tinymim_jax.__main__ import main


def test_a_folder_without_results(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} has no results.json: it is not the workdir of a run with a finished stage\n"
    )
