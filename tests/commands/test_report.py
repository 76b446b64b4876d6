import json

import pytest

from tinymim_jax.__main__ import main


def test_a_folder_without_a_run(tmp_path, capsys):
    nothing = tmp_path / "none"
    assert main(["report", str(nothing)]) == 2
    assert capsys.readouterr().err == f"error: {nothing}: there is no such folder; give the --workdir of a run\n"
    assert main(["report", str(tmp_path)]) == 2
    said = f"error: {tmp_path} holds no run: neither stages nor chain.json; give the --workdir of a run\n"
    assert capsys.readouterr().err == said
    (tmp_path / "chain.json").write_text("{}")
    assert main(["report", str(tmp_path), f"--compare={nothing}"]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_a_stage_for_a_workdir(tmp_path, capsys):
    (tmp_path / "stage.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 2
    assert f"is the folder of a stage; give the folder above, {tmp_path.parent}" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["x", "{}", "[]", '{"stages": 1}', '{"compare": [1]}', '{"compare": {"T": 1}}'])
def test_damaged_results_are_a_note_at_most(content, tmp_path, capsys):
    (tmp_path / "results.json").write_text(content)
    assert main(["report", str(tmp_path)]) == 0
    assert "no stage is finished yet" in capsys.readouterr().out
    assert (tmp_path / "report" / "index.html").is_file()


def test_one_argument_is_taken(capsys):
    assert main(["report", "a", "b"]) == 2
    assert "expected WORKDIR, got a b; see --help" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_seconds_to_watch_with(value, tmp_path, capsys):
    (tmp_path / "chain.json").write_text("{}")
    assert main(["report", str(tmp_path), f"--watch={value}"]) == 2
    assert "watch" in capsys.readouterr().err


def test_the_recipe_of_a_run_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text(
        "from tests.conftest import tiny_chain\n\ndef get_config():\n    return tiny_chain()\n"
    )
    argv = ["run", "--config=config.py", "--workdir=work", "--stage=mae", "--config.stages.mae.run.steps=2"]
    assert main(argv) == 0
    recipe = json.loads((tmp_path / "work" / "chain.json").read_text())
    assert recipe == {
        "name": "tiny", "config": "config.py", "changed": ["stages.mae.run.steps: 4 -> 2"],
        "stages": ["mae", "distill", "finetune"],
    }  # fmt: skip
    text = (tmp_path / "work" / "report" / "index.html").read_text()
    assert "<code>config.py</code>" in text and "stages.mae.run.steps: 4 -&gt; 2" in text and "not begun" in text
