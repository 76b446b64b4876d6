import os
import signal
import subprocess
import sys
import time

import pytest

from tinymim_jax.runtime.preemption import StopRequest


@pytest.fixture
def handlers():
    """Handlers of our own, so that a mistake does not end the tests."""
    calls = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, _: calls.append(number)) for n in numbers}
    yield calls
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_acts(handlers, number):
    own = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with StopRequest() as stop:
        assert not stop.asked
        assert all(signal.getsignal(n) is not own[n] for n in own)
        os.kill(os.getpid(), number)
        assert stop.asked and handlers == []
        assert {n: signal.getsignal(n) for n in own} == own
        os.kill(os.getpid(), number)
        assert handlers == [number]
    assert {n: signal.getsignal(n) for n in own} == own


def test_the_second_ctrl_c_is_the_usual_one():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.asked
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, before)


def test_without_a_signal_all_is_as_before(handlers):
    own = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        pass
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == own and not stop.asked
    with pytest.raises(RuntimeError), StopRequest():
        raise RuntimeError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == own


def test_where_the_run_had_come_to():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt, match="at step 3; run the same command to go on"):
            stop.obey("at step 3")


def test_nothing_heavy_is_imported_first():
    code = "import sys, tinymim_jax.runtime.preemption; print(sorted({'jax', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
