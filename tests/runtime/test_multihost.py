import json
import subprocess
import sys

import pytest

from tests.processes import ROOT, environment, free_port
from tinymim_jax.runtime import multihost
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.preemption import Interrupted, StopRequest


def fail():
    raise InputError("no room")


def test_a_signal_during_an_agreement_is_not_lost(monkeypatch):
    stop = StopRequest()

    def agreed(flag):
        stop.asked = True
        return flag

    monkeypatch.setattr(multihost, "agreed", agreed)
    multihost.check_stop(stop, "here")
    assert stop.asked
    with pytest.raises(Interrupted, match="here"):
        multihost.check_stop(stop, "here")


def test_one_process_agrees_with_itself():
    assert multihost.agreed(True) and not multihost.agreed(False)
    for run in (multihost.run_on_primary, multihost.raise_everywhere):
        assert run(lambda: [1, "a"]) == [1, "a"]
        with pytest.raises(InputError, match="^no room$"):
            run(fail)
    assert multihost.gather("ä") == ["ä"]


PROCESS = """
import json, sys
import jax
jax.distributed.initialize(sys.argv[1], 3, int(sys.argv[2]))
from tinymim_jax.runtime import multihost
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.preemption import StopRequest
me = jax.process_index()
found = []

def said(run, action):
    try:
        found.append(run(action))
    except InputError as error:
        found.append(str(error))

def fail():
    raise InputError(f"no room in {me}")

found.append(multihost.gather("x" * me * 700 + "ä"))
found.append(multihost.gather(""))
said(multihost.run_on_primary, lambda: {"from": me})
said(multihost.run_on_primary, fail)
said(multihost.raise_everywhere, lambda: me)
said(multihost.raise_everywhere, fail if me == 1 else lambda: me)
found.append(multihost.agreed(me == 2))
try:
    stop = StopRequest()
    stop.asked = me == 1
    multihost.check_stop(stop, "here")
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
