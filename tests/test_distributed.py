import json
import sys

import jax
import pytest

from tinymim_jax import distributed
from tinymim_jax.config import InputError
from tinymim_jax.stop import Interrupted, StopRequest


def test_a_signal_during_an_agreement_is_not_lost(monkeypatch):
    stop = StopRequest()

    def agreed(flag):
        stop.asked = True
        return flag

    monkeypatch.setattr(distributed, "agreed", agreed)
    distributed.check_stop(stop, "here")
    assert stop.asked
    with pytest.raises(Interrupted, match="here"):
        distributed.check_stop(stop, "here")


def test_one_process_gathers_its_own():
    assert distributed.gather("a b") == ["a b"]


def test_own_facts_are_versions_code_and_what_is_given():
    facts = distributed.own_facts(config={"a": 1})
    assert facts["jax"] == jax.__version__ and len(facts["code"]) == 12 and facts["config"] == {"a": 1}
    assert facts["Python"] == f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert json.loads(json.dumps(facts)) == facts


def test_one_process_agrees_with_itself():
    assert distributed.agreed(True) and not distributed.agreed(False)
    distributed.barrier("x")
    done = []
    distributed.on_first(lambda: done.append(1))
    assert done == [1]

    def fail():
        raise InputError("no room")

    with pytest.raises(InputError, match="no room"):
        distributed.on_first(fail)
