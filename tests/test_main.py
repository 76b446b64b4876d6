import os
import subprocess
import sys

import pytest

from tinymim_jax.__main__ import COMMANDS, leave, main


def test_help_lists_every_command(capsys):
    for argv in ([], ["--help"], ["-h"]):
        assert main(argv) == 0
        out = capsys.readouterr().out
        assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"python -m tinymim_jax {command}" in capsys.readouterr().out


def test_an_unknown_command_lists_the_choices(capsys):
    assert main(["fly"]) == 2
    assert capsys.readouterr().err == f"error: unknown command 'fly'; choose one of {', '.join(COMMANDS)}\n"


def test_an_interruption_has_its_own_status(monkeypatch, capsys):
    from tinymim_jax.commands import run

    def stop(argv):
        raise KeyboardInterrupt("stage mae stopped at step 3")

    monkeypatch.setattr(run, "main", stop)
    assert main(["run"]) == 130
    assert capsys.readouterr().err == "interrupted: stage mae stopped at step 3\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    from tinymim_jax.commands import run

    def fail(argv):
        raise ValueError("a bug")

    monkeypatch.setattr(run, "main", fail)
    with pytest.raises(ValueError, match="a bug"):
        main(["run"])


def test_the_death_of_another_process_is_no_bug_of_this_one(monkeypatch, capsys):
    import jax

    from tinymim_jax.commands import run

    def fail(argv):
        raise jax.errors.JaxRuntimeError("UNKNOWN: all-reduce failed: Connection closed by peer")

    monkeypatch.setattr(run, "main", fail)
    with pytest.raises(jax.errors.JaxRuntimeError):
        main(["run"])
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert main(["run"]) == 74
    assert "error: another process has died" in capsys.readouterr().err


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "tinymim_jax", "fly"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("status", "at_once"), [(0, False), (2, True), (74, True), (75, False)])
def test_an_error_in_one_of_several_processes_waits_for_nobody(status, at_once, monkeypatch):
    import jax

    left = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", left.append)
    with pytest.raises(SystemExit) as ended:
        leave(status)
    assert left == ([status] if at_once else []) and ended.value.code == status
