import threading

import jax
import jax.numpy as jnp
import pytest

from tinymim_jax.evals.online import Online
from tinymim_jax.runtime.errors import InputError

STUCK = 60  # seconds: a wait that long has failed


class Recorded:
    """Dispatches `num_batches` batches; what is left waits until `let_go` is set."""

    def __init__(self, events, num_batches=3):
        self.events, self.num_batches, self.let_go = events, num_batches, threading.Event()

    def __call__(self, predict, variables, frozen):
        for i in range(self.num_batches):
            self.events.append(f"batch {i}")
            yield
        found = predict(variables, frozen, None)
        return lambda: {"value": float(found), "let_go": float(self.let_go.wait(STUCK))}


def predict(variables, frozen, batch):
    return variables["w"] + frozen["b"]


@pytest.fixture
def events():
    return []


@pytest.fixture
def evaluator(events):
    return Recorded(events)


@pytest.fixture
def online(events, evaluator):
    with Online({"x": evaluator}, predict, {"b": 1.0}, lambda step, results: events.append((step, results))) as online:
        yield online
        evaluator.let_go.set()


def test_a_batch_goes_between_two_steps_and_nothing_waits_for_the_host(online, evaluator, events):
    online.start(7, {"w": jnp.float32(2)})
    for step in range(8, 14):
        events.append(f"step {step}")
        online.advance()
    assert events == [
        "step 8", "batch 0", "step 9", "batch 1", "step 10", "batch 2", "step 11", "step 12", "step 13"
    ]  # fmt: skip
    evaluator.let_go.set()
    online.wait()
    assert events[-1] == (7, {"x/value": 3.0, "x/let_go": 1.0})
    online.wait()
    online.advance()
    assert len(events) == 10


def test_results_come_without_waiting_once_the_host_is_done(online, evaluator, events):
    online.start(2, {"w": jnp.float32(0)})
    evaluator.let_go.set()
    for _ in range(4):
        online.advance()
    online.finishing.result(STUCK)
    online.advance()
    assert events[-1][0] == 2


def test_the_weights_are_those_of_the_step(online, evaluator, events):
    weights = {"w": jnp.arange(4.0).sum()}
    online.start(1, weights)
    jax.jit(lambda w: jax.tree.map(lambda x: x * 100, w), donate_argnums=0)(weights)
    assert weights["w"].is_deleted()
    evaluator.let_go.set()
    online.wait()
    assert events[-1] == (1, {"x/value": 7.0, "x/let_go": 1.0})


def test_the_next_waits_for_the_one_before(online, evaluator, events):
    evaluator.let_go.set()
    online.start(1, {"w": jnp.float32(1)})
    online.start(2, {"w": jnp.float32(2)})
    online.wait()
    assert [(event[0], event[1]["x/value"]) for event in events if isinstance(event, tuple)] == [(1, 2.0), (2, 3.0)]


def test_waiting_ends_when_a_stop_is_asked_for(online, evaluator, events):
    online.start(1, {"w": jnp.float32(1)})
    assert not online.wait(lambda: True) and online.state()[0] == 1
    asked = iter([False] * 5 + [True])
    assert not online.wait(lambda: next(asked)) and events == ["batch 0", "batch 1", "batch 2"]  # the host is busy
    evaluator.let_go.set()
    assert online.wait(lambda: False) and events[-1][0] == 1 and online.state() is None


def test_what_goes_wrong_is_raised_in_the_training_thread(events):
    class Failing(Recorded):
        def __call__(self, predict, variables, frozen):
            yield
            return self.fail

        def fail(self):
            raise InputError("no place for label 7")

    with Online({"x": Failing(events)}, predict, {}, None) as online:
        online.start(1, {})
        with pytest.raises(InputError, match="no place for label 7"):
            online.wait()


def test_leaving_early_stops_the_pass_over_the_data(events):
    closed = []

    class Endless(Recorded):
        def __call__(self, predict, variables, frozen):
            try:
                while True:
                    yield
            finally:
                closed.append(True)

    with Online({"x": Endless(events)}, predict, {}, None) as online:
        online.start(1, {})
        online.advance()
    assert closed == [True]
