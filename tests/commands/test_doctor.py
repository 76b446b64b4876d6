import pytest

from tinymim_jax.__main__ import main


def test_this_machine(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert main(["doctor", "--config=configs/digits/chain.py", f"--workdir={tmp_path}"]) == 0
    assert "digits, split test: 500 images" in capsys.readouterr().out
    assert main(["doctor"]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["doctor", "--workdri=x"], "workdri"),
        (["doctor", "x"], "unexpected argument 'x'"),
        (["doctor", "--process_id=1", "--num_processes=2"], "coordinator is missing"),
        (
            ["doctor", "--process_id=1", "--num_processes=2", "--coordinator=h:99999"],
            "with a port from 1 to 65535",
        ),
        (["doctor", "--config=configs/digits/chain.py", "--config.mesh.fsdp=7"], "1 of these need mending"),
    ],
)
def test_bad_input(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err
