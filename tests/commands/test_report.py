import pytest

from tinymim_jax.__main__ import main


def test_a_folder_without_results(tmp_path, capsys):
    def said(folder):
        assert main(["report", str(folder)]) == 2
        return capsys.readouterr().err

    nothing = tmp_path / "none"
    assert said(nothing) == f"error: {nothing} has no results.json: there is no such folder\n"
    assert said(tmp_path) == f"error: {tmp_path} has no results.json: no run ended there\n"
    (tmp_path / "chain.json").write_text("{}")
    assert said(tmp_path).endswith(
        "has no results.json: the run is not at its end; the same run command goes on with it\n"
    )


def test_a_stage_for_a_workdir(tmp_path, capsys):
    (tmp_path / "stage.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 2
    assert f"is the folder of a stage; give the folder above, {tmp_path.parent}" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["x", "{}", "[]", '{"stages": 1}'])
def test_damaged_results(content, tmp_path, capsys):
    (tmp_path / "results.json").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/results.json is damaged; the run command makes it anew\n"


def test_one_argument_is_taken(capsys):
    assert main(["report", "a", "b"]) == 2
    assert "expected WORKDIR, got a b; see --help" in capsys.readouterr().err
