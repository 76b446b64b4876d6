import json
import os
import subprocess
import sys
import time

import pytest

from tinymim_jax import lock
from tinymim_jax.config import InputError
from tinymim_jax.lock import Lock


def held(folder, **changes):
    """A lock as another run would have left it."""
    own = {"host": "elsewhere", "pid": 1, "born": "0", "token": "t"}
    (folder / lock.FILE).write_text(json.dumps({**own, **changes}))


def test_one_run_at_a_time(tmp_path):
    with Lock(tmp_path):
        with pytest.raises(InputError, match=rf"in use by process {os.getpid()} on .*choose another folder"):
            Lock(tmp_path).__enter__()
        assert [p.name for p in tmp_path.iterdir()] == [lock.FILE]
    assert list(tmp_path.iterdir()) == []
    with Lock(tmp_path):
        pass


def test_a_killed_run_of_this_host_leaves_no_obstacle(tmp_path, capsys):
    code = f"from tinymim_jax.lock import Lock; Lock(__import__('pathlib').Path({str(tmp_path)!r})).__enter__();"
    process = subprocess.Popen([sys.executable, "-c", code + "print('held', flush=True); input()"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"in use by process {process.pid}"):
        Lock(tmp_path).__enter__()
    process.kill()
    process.wait()
    with Lock(tmp_path):
        assert f"the run before (process {process.pid}" in capsys.readouterr().out


def test_a_number_that_another_process_has_now_is_no_sign_of_life(tmp_path):
    import socket

    held(tmp_path, host=socket.gethostname(), pid=os.getpid(), born="1")
    with Lock(tmp_path):
        assert Lock(tmp_path).read()["born"] == lock.born(os.getpid()) != "1"


def test_a_silent_run_on_another_host_is_dead_and_one_that_beats_is_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "STALE", 1.0)
    held(tmp_path)
    begin = time.monotonic()
    with Lock(tmp_path):
        assert time.monotonic() - begin > 0.5
    assert "the run before (process 1 on elsewhere) has died" in capsys.readouterr().out

    monkeypatch.setattr(lock, "STALE", 30.0)
    monkeypatch.setattr(lock, "BEAT", 0.2)
    with Lock(tmp_path) as first:
        own, first.own = first.own, json.dumps({**json.loads(first.own), "host": "elsewhere"}).encode()
        (tmp_path / lock.FILE).write_bytes(first.own)
        with pytest.raises(InputError, match="on elsewhere; wait for it"):
            Lock(tmp_path).__enter__()
        first.own = own


def test_a_lock_that_was_taken_over_is_not_taken_away(tmp_path):
    with Lock(tmp_path):
        held(tmp_path, token="somebody else's")
    assert (tmp_path / lock.FILE).exists()


def test_a_lock_that_was_cut_short_is_nobodys_once_it_is_silent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "STALE", 1.0)
    (tmp_path / lock.FILE).write_text("{")
    with Lock(tmp_path) as own:
        assert own.read()["token"] == own.token
    assert "a run that has not said who it is" in capsys.readouterr().out
