import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from tinymim_jax.runtime import workdir_lock
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.workdir_lock import WorkdirLock


def held(folder, **changes):
    """A lock as another run would have left it."""
    own = {"host": "elsewhere", "pid": 1, "born": "0", "place": "p", "token": "t"}
    (folder / workdir_lock.FILE).write_text(json.dumps({**own, **changes}))


def test_one_run_at_a_time(tmp_path):
    with WorkdirLock(tmp_path):
        with pytest.raises(InputError, match=rf"in use by process {os.getpid()} on .*choose another folder"):
            WorkdirLock(tmp_path).__enter__()
        assert [p.name for p in tmp_path.iterdir()] == [workdir_lock.FILE]
    assert list(tmp_path.iterdir()) == []
    with WorkdirLock(tmp_path):
        pass


def test_whether_it_is_held_can_be_asked(tmp_path):
    WorkdirLock(tmp_path).check_free()
    with WorkdirLock(tmp_path), pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
        WorkdirLock(tmp_path).check_free()
    held(tmp_path, host=socket.gethostname(), place=workdir_lock.place(), pid=os.getpid(), born="1")
    WorkdirLock(tmp_path).check_free()
    assert (tmp_path / workdir_lock.FILE).exists()  # it was only asked


def test_a_killed_run_of_this_host_leaves_no_obstacle(tmp_path, capsys):
    code = f"from tinymim_jax.runtime.workdir_lock import WorkdirLock; WorkdirLock(__import__('pathlib').Path({str(tmp_path)!r})).__enter__();"
    process = subprocess.Popen([sys.executable, "-c", code + "print('held', flush=True); input()"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"in use by process {process.pid}"):
        WorkdirLock(tmp_path).__enter__()
    process.kill()
    process.wait()
    with WorkdirLock(tmp_path):
        assert f"the run before (process {process.pid}" in capsys.readouterr().out


def test_a_number_that_another_process_has_now_is_no_sign_of_life(tmp_path):
    held(tmp_path, host=socket.gethostname(), place=workdir_lock.place(), pid=os.getpid(), born="1")
    with WorkdirLock(tmp_path):
        assert WorkdirLock(tmp_path).read()["born"] == workdir_lock.born(os.getpid()) != "1"


def test_a_silent_run_on_another_host_is_dead_and_one_that_beats_is_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workdir_lock, "STALE", 0.5)
    held(tmp_path)
    with WorkdirLock(tmp_path):
        pass
    assert "the run before (process 1 on elsewhere) has died" in capsys.readouterr().out

    monkeypatch.setattr(workdir_lock, "STALE", 30.0)
    monkeypatch.setattr(workdir_lock, "BEAT", 0.2)
    with WorkdirLock(tmp_path) as first:
        own, first.own = first.own, json.dumps({**json.loads(first.own), "host": "elsewhere", "place": "p"}).encode()
        (tmp_path / workdir_lock.FILE).write_bytes(first.own)
        with pytest.raises(InputError, match="on elsewhere; wait for it"):
            WorkdirLock(tmp_path).__enter__()
        first.own = own


def test_a_lock_that_was_taken_over_is_not_taken_away(tmp_path):
    with WorkdirLock(tmp_path):
        held(tmp_path, token="somebody else's")
    assert (tmp_path / workdir_lock.FILE).exists()


def test_a_lock_that_was_cut_short_is_nobodys_once_it_is_silent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workdir_lock, "STALE", 1.0)
    (tmp_path / workdir_lock.FILE).write_text("{")
    with WorkdirLock(tmp_path) as own:
        assert own.read()["token"] == own.token
    assert "a run that has not said who it is" in capsys.readouterr().out


def test_a_file_of_something_else_is_nobodys(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workdir_lock, "STALE", 0.3)
    (tmp_path / workdir_lock.FILE).write_text("[1]")
    with WorkdirLock(tmp_path):
        assert "a run that has not said who it is" in capsys.readouterr().out


def test_a_beat_and_the_release_wait_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir_lock, "BEAT", 0.01)
    sign, is_in, is_out = WorkdirLock._sign, threading.Event(), threading.Event()

    def slowly(self):
        is_in.set()
        time.sleep(0.3)
        try:
            sign(self)
        finally:
            is_out.set()

    monkeypatch.setattr(WorkdirLock, "_sign", slowly)
    with WorkdirLock(tmp_path):
        assert is_in.wait(10)
    assert is_out.wait(10) and list(tmp_path.iterdir()) == []


def test_a_beat_makes_no_file(tmp_path):
    with WorkdirLock(tmp_path) as own:
        (tmp_path / workdir_lock.FILE).unlink()
        with pytest.raises(FileNotFoundError):
            own._sign()
        assert list(tmp_path.iterdir()) == []


def test_a_check_notices_that_another_run_has_taken_over_whose_lock_gets_no_beat(tmp_path, monkeypatch):
    looks, is_of = threading.Semaphore(0), WorkdirLock._is_of

    def looked(self, token):
        looks.release()
        return is_of(self, token)

    monkeypatch.setattr(workdir_lock, "BEAT", 0.02)
    with WorkdirLock(tmp_path) as own:
        own.check()
        held(tmp_path)
        with pytest.raises(
            InputError, match=r"another run \(process 1 on elsewhere\) has taken over .*; this one stops, "
        ):
            own.check()
        before = (tmp_path / workdir_lock.FILE).stat().st_mtime_ns
        monkeypatch.setattr(WorkdirLock, "_is_of", looked)
        assert all(looks.acquire(timeout=10) for _ in range(3))
        assert (tmp_path / workdir_lock.FILE).stat().st_mtime_ns == before
    assert own.read()["token"] == "t"


def test_a_check_notices_that_the_lock_is_gone(tmp_path):
    with WorkdirLock(tmp_path) as own:
        (tmp_path / workdir_lock.FILE).unlink()
        with pytest.raises(InputError, match=r"run\.lock is gone: another run has taken over .*, or it was deleted"):
            own.check()


SUSPENDED = """
from pathlib import Path
from tinymim_jax.runtime import workdir_lock

workdir_lock.STALE, workdir_lock.BEAT = 2.0, 0.05
held = workdir_lock.WorkdirLock(Path({folder!r})).__enter__()
held.check()
print("held", flush=True)
input()
try:
    held.check()
except workdir_lock.InputError as error:
    print(error, flush=True)
"""


def test_a_run_that_was_suspended_stops_if_another_has_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir_lock, "STALE", 2.0)
    monkeypatch.setattr(workdir_lock, "place", lambda: "another container of this host")
    code = SUSPENDED.format(folder=str(tmp_path))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"in use by process {process.pid} on {socket.gethostname()}"):
            WorkdirLock(tmp_path).__enter__()  # its number says nothing here, its beats do
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)  # until it has stopped, it may beat once more
        try:
            with WorkdirLock(tmp_path):
                process.stdin.write("\n")
                process.stdin.flush()
                process.send_signal(signal.SIGCONT)
                line = process.stdout.readline()
                assert line.startswith(f"another run (process {os.getpid()} on {socket.gethostname()}) has taken over")
        finally:
            process.kill()  # one that is stopped would be waited for for ever


def test_a_killed_run_that_nobody_has_buried_is_dead(tmp_path, capsys):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    held(
        tmp_path,
        host=socket.gethostname(),
        place=workdir_lock.place(),
        pid=process.pid,
        born=workdir_lock.born(process.pid),
    )
    with pytest.raises(InputError, match=f"in use by process {process.pid}"):
        WorkdirLock(tmp_path).__enter__()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with WorkdirLock(tmp_path):
        assert "waiting" not in capsys.readouterr().out
    process.wait()
