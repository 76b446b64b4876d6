import itertools

import jax
import pytest

from tinymim_jax.bench import timing


def test_one_after_the_other_and_the_first_round_is_left_out(capsys):
    order = []

    def clock(name):
        values = itertools.count(1)
        return lambda: order.append(name) or next(values)

    found = timing.in_turn({"a": clock("a"), "b": clock("b")}, rounds=2, turns=2)
    assert order == ["a", "b"] * 6
    assert found == {"a": [3 + 4, 5 + 6], "b": [3 + 4, 5 + 6]}
    assert capsys.readouterr().err.splitlines()[1:] == ["round 1 of 2: a 7, b 7", "round 2 of 2: a 11, b 11"]


def test_a_ratio_is_that_of_the_same_round():
    assert timing.ratio([1.0, 10.0, 4.0], [2.0, 5.0, 1.0]) == 2.0


def test_seconds_of_each_call():
    now, calls = iter([3.0, 13.0]), []
    clock = timing.clock_of(lambda: calls.append(1), calls=5, now=lambda: next(now))
    assert clock() == 2.0 and len(calls) == 5


def test_conditions(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    monkeypatch.setenv("MALLOC", "8")
    found = timing.conditions()
    assert found["jax"] == jax.__version__ and found["environment"]["MALLOC_ARENA_MAX"] == "8"
    assert "MALLOC" not in found["environment"] and found["device"].startswith(timing.processor())
    assert "no_package" not in timing.software("no_package")


@pytest.mark.parametrize(("file", "found"), [("self/comm", "p"), ("self/none", "")])
def test_what_linux_says(file, found):
    assert timing.of_linux(file, "(p)y") == found
