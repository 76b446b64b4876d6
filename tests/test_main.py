import os
import subprocess
import sys

import pytest

from tinymim_jax.__main__ import COMMANDS, main
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.preemption import Interrupted


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


def test_a_bug_keeps_its_traceback(monkeypatch, capsys):
    from tinymim_jax.commands import run

    def fail(argv):
        raise ValueError("a bug")

    monkeypatch.setattr(run, "main", fail)
    assert main(["run"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith("ValueError: a bug\n")


@pytest.mark.parametrize(
    ("text", "is_distributed", "status", "line"),
    [
        ("UNKNOWN: all-reduce failed: Connection closed by peer", True, 74, "another process has died, or cannot be"),
        ("DEADLINE_EXCEEDED: barrier timed out", True, 74, "another process has died, or cannot be"),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), True, 74, "another process has died"),
        (ValueError("no peer is called x"), True, 1, ""),
        ("UNKNOWN: all-reduce failed: Connection closed by peer", False, 1, ""),
        ("INVALID_ARGUMENT: shapes", True, 1, ""),
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying",
            True,
            2,
            "the devices have too little memory (JaxRuntimeErr",
        ),
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying",
            False,
            2,
            "the devices have too little memory (JaxRuntimeErr",
        ),
    ],
)
def test_what_jax_says_of_devices_and_of_other_processes(text, is_distributed, status, line, monkeypatch, capsys):
    import jax

    from tinymim_jax.commands import run

    def fail(argv):
        raise jax.errors.JaxRuntimeError(text) if isinstance(text, str) else text

    left = []
    monkeypatch.setattr(run, "main", fail)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: is_distributed)
    monkeypatch.setattr(os, "_exit", left.append)
    assert main(["run"]) == status and left == [status] * is_distributed
    err = capsys.readouterr().err
    assert err.startswith(f"error: {line}" if line else "Traceback")


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "tinymim_jax", "fly"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("end", "status", "waits"),
    [
        (None, 0, True),
        (Interrupted("agreed", 75), 75, True),
        (KeyboardInterrupt(), 130, False),
        (InputError(), 2, False),
    ],
)
def test_what_others_do_not_know_of_waits_for_nobody(end, status, waits, monkeypatch):
    import jax

    from tinymim_jax.commands import run

    def fail(argv):
        if end is not None:
            raise end

    left = []
    monkeypatch.setattr(run, "main", fail)
    monkeypatch.setattr(os, "_exit", left.append)
    assert main(["run"]) == status and left == []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert main(["run"]) == status and left == [status] * (not waits)


@pytest.mark.parametrize("name", ["cuda", "nothing", "cpu,nothing"])
def test_a_platform_that_is_not_there_is_one_line(name):
    code = (
        "import sys, importlib, types; from tinymim_jax import __main__ as m; import jax\n"
        "m.importlib = types.SimpleNamespace(import_module=lambda _: types.SimpleNamespace(main=lambda _: jax.devices()))\n"
        "sys.exit(m.main(['doctor']))"
    )
    env = {**os.environ, "JAX_PLATFORMS": name}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if name == "cuda" and done.returncode == 0:
        pytest.skip("there is a GPU")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(lines) == 1 and f"JAX_PLATFORMS={name} " in lines[0] and "unset it" in lines[0]


def test_an_assertion_elsewhere_is_a_bug(monkeypatch, capsys):
    from tinymim_jax.commands import run

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(run, "main", lambda argv: [].pop())
    assert main(["run"]) == 1
    assert "IndexError" in capsys.readouterr().err
