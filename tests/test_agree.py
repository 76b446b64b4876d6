import json
import subprocess
import sys

import pytest

from tests.processes import ROOT, environment, free_port
from tinymim_jax import agree
from tinymim_jax.config import InputError
from tinymim_jax.stop import Interrupted, StopRequest


def fail():
    raise InputError("no room")


def test_a_signal_during_an_agreement_is_not_lost(monkeypatch):
    stop = StopRequest()

    def agreed(flag):
        stop.asked = True
        return flag

    monkeypatch.setattr(agree, "agreed", agreed)
    agree.check_stop(stop, "here")
    assert stop.asked
    with pytest.raises(Interrupted, match="here"):
        agree.check_stop(stop, "here")


def test_one_process_agrees_with_itself():
    assert agree.agreed(True) and not agree.agreed(False)
    for run in (agree.on_first, agree.together):
        assert run(lambda: [1, "a"]) == [1, "a"]
        with pytest.raises(InputError, match="^no room$"):
            run(fail)
    assert agree.gather("ä") == ["ä"]


PROCESS = """
import json, sys
import jax
jax.distributed.initialize(sys.argv[1], 3, int(sys.argv[2]))
from tinymim_jax import agree
from tinymim_jax.config import InputError
from tinymim_jax.stop import StopRequest
me = jax.process_index()
found = []

def said(run, action):
    try:
        found.append(run(action))
    except InputError as error:
        found.append(str(error))

def fail():
    raise InputError(f"no room in {me}")

found.append(agree.gather("x" * me * 700 + "ä"))
found.append(agree.gather(""))
said(agree.on_first, lambda: {"from": me})
said(agree.on_first, fail)
said(agree.together, lambda: me)
said(agree.together, fail if me == 1 else lambda: me)
found.append(agree.agreed(me == 2))
try:
    stop = StopRequest()
    stop.asked = me == 1
    agree.check_stop(stop, "here")
except KeyboardInterrupt as stopped:
    found.append(str(stopped))
print(json.dumps(found))
"""


def test_three_processes():
    address = f"127.0.0.1:{free_port()}"
    running = [
        subprocess.Popen([sys.executable, "-c", PROCESS, address, str(i)], env=environment(), cwd=ROOT,
                         stdout=subprocess.PIPE, text=True)
        for i in range(3)
    ]  # fmt: skip
    for me, process in enumerate(running):
        found = json.loads(process.communicate(timeout=100)[0].splitlines()[-1])
        assert found[0] == ["ä", "x" * 700 + "ä", "x" * 1400 + "ä"] and found[1] == ["", "", ""]
        assert found[2:4] == [{"from": 0}, "no room in 0"]
        assert found[4:6] == [me, "no room in 1" if me == 1 else "process 1: no room in 1"]
        assert found[6:] == [True, "here; run the same command to go on"]
