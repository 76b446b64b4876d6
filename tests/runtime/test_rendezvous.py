import concurrent.futures
import contextlib
import itertools
import json
import socket
import threading

import pytest

from tests.processes import connected, free_port
from tinymim_jax.runtime import rendezvous
from tinymim_jax.runtime.cluster import Cluster
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.preemption import Interrupted, StopRequest
from tinymim_jax.runtime.rendezvous import meet

HOST = socket.gethostname()


def at_once(clusters, facts, stops=None):
    """What ends each of the processes: an error, or None."""

    def one(i):
        try:
            return meet(clusters[i], facts[i], 300, stops[i] if stops else None)
        except (InputError, Interrupted) as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, range(len(clusters))))


def local(count, processes, port=None):
    """Those of `count` processes on this host."""
    address = f"127.0.0.1:{port or free_port()}"
    return [Cluster(address, count, i) for i in processes]


@pytest.fixture
def looks(monkeypatch):
    """looks(action): calls `action(roll, time)` whenever process 0 looks who is there; time[0] is the time for all."""
    now, is_complete = [0.0], rendezvous._Roll.is_complete
    monkeypatch.setattr(rendezvous, "clock", lambda: now[0])
    monkeypatch.setattr(rendezvous, "TICK", 0.02)

    def arrange(action):
        def look(roll):
            action(roll, now)
            return is_complete(roll)

        monkeypatch.setattr(rendezvous._Roll, "is_complete", look)

    return arrange


def test_all_are_there_and_agree():
    assert at_once(local(5, range(5)), [{"jax": "0.10", "config": {"lr": 1}}] * 5) == [None] * 5


def test_the_missing_are_named_to_everyone(looks):
    def action(roll, now):
        if len(roll.lines) == 1:
            now[0] = 301.0

    looks(action)
    line = "processes 1, 3 of 4 did not come within 300 s; see their logs, or raise --start_timeout"
    assert [str(error) for error in at_once(local(4, (0, 2)), [{}] * 2)] == [line] * 2


def test_waiting_is_said(looks, monkeypatch, capsys):
    def action(roll, now):
        now[0] += 7

    looks(action)
    at_once(local(3, [0]), [{}])
    assert capsys.readouterr().err.splitlines() == ["waiting for processes 1, 2 of 3"] * 5
    monkeypatch.setattr(rendezvous, "clock", itertools.count(0, 7).__next__)
    at_once(local(2, [1]), [{}])
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(
        line.startswith("waiting for process 0 at 127.0.0.1:") and "firewall" in line for line in lines
    )


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"jax": "0.11", "config": {"lr": 1}}, 'jax: "0.10" -> "0.11"'),
        ({"jax": "0.10", "config": {"lr": 2}}, "config.lr: 1 -> 2"),
        ({"jax": "0.10"}, 'config: {"lr": 1} -> null'),
        ({"jax": "0.10", "config": {"lr": 1, "keep": 2}}, "config"),  # which is no other stage, but no such run
    ],
)
def test_a_difference_is_told_to_everyone(other, what):
    facts = [{"jax": "0.10", "config": {"lr": 1}}] * 2
    for error in at_once(local(3, range(3)), [*facts, other]):
        assert str(error).startswith(f"process 2 ({HOST}) differs from process 0 in {what}; start all with the same")


@pytest.mark.parametrize("counts", [(2, 3), (3, 2), (2, 3, 3), (3, 3, 2)])
def test_numbers_of_processes_that_differ(counts, looks):
    def action(roll, now):
        if len(roll.lines) == len(counts) - 1:
            now[0] += 1

    looks(action)
    address = f"127.0.0.1:{free_port()}"
    errors = at_once([Cluster(address, count, i) for i, count in enumerate(counts)], [{}] * len(counts))
    odd = next(i for i, count in enumerate(counts) if count != counts[0])
    what = f"differs from process 0 in num_processes: {counts[0]} -> {counts[odd]}; start all with the same"
    assert all(str(error).startswith(f"process {odd} ({HOST}) {what}") for error in errors)


def test_two_with_one_number(looks):
    def action(roll, now):
        if len(roll.lines) == 2:
            now[0] += 1

    looks(action)
    line = f"two processes say that they are process 1 (host {HOST}, host {HOST}); give each its own --process_id"
    assert [str(error) for error in at_once(local(3, (0, 1, 1)), [{}] * 3)] == [line] * 3


@pytest.mark.parametrize("junk", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\n", b"[1]\n", b'{"process": null}\n'])
def test_a_stranger_at_the_port_does_no_harm(junk):
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(at_once, local(2, [0], port), [{}])
        with connected(port) as stranger:
            stranger.sendall(junk)
            assert at_once(local(2, [1], port), [{}]) == [None] and first.result(20) == [None]


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n", b"[1]\n", b'{"a": 1}\n'])
def test_a_port_where_something_else_answers(answer, monkeypatch):
    monkeypatch.setattr(rendezvous, "clock", itertools.count(0, 40).__next__)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    with server.accept()[0] as connection:
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        (error,) = at_once(local(2, [1], server.getsockname()[1]), [{}])
    assert isinstance(error, InputError) and "is it running, is the address right" in str(error)


def test_without_process_0(monkeypatch):
    monkeypatch.setattr(rendezvous, "clock", itertools.count(0, 40).__next__)
    for address in (f"127.0.0.1:{free_port()}", "nowhere.invalid:1"):
        (error,) = at_once([Cluster(address, 2, 1)], [{}])
        assert str(error).startswith(f"process 1 did not reach process 0 at {address} within 300 s (")


@pytest.mark.parametrize("comes_again", [True, False])
def test_one_that_came_and_ended_may_come_again_and_is_named_if_it_does_not(looks, comes_again):
    port, has_left = free_port(), threading.Event()

    def action(roll, now):
        if 1 in roll.left:
            has_left.set()
            now[0] += 0 if comes_again else 301

    looks(action)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(at_once, local(3, [0], port), [{}])
        with connected(port) as connection:
            connection.sendall(b'{"process": 1, "host": "h1", "facts": {"num_processes": 3}}\n')
        assert has_left.wait(20)
        if comes_again:
            assert at_once(local(3, (1, 2), port), [{}] * 2) == [None] * 2 and first.result(20) == [None]
        else:
            assert "processes 1 (h1: it came and ended), 2 of 3 did not come" in str(first.result(20)[0])


@pytest.mark.parametrize("who", [0, 1])
def test_a_stop_is_heard_and_told_to_all(who, looks):
    stops = [StopRequest() for _ in range(3)]
    stops[who].status = 130

    def action(roll, now):
        if len(roll.lines) == 2:  # process 3 does not come
            stops[who].asked = True

    looks(action)
    errors = at_once(local(4, range(3)), [{}] * 3, stops)
    line = f"process {who} ({HOST}) was stopped while processes were waited for; run the same command again"
    assert [str(error) for error in errors] == [line] * 3
    assert [error.status for error in errors] == [130 if i == who else 75 for i in range(3)]


def test_a_stop_before_process_0_is_there(monkeypatch):
    stop = StopRequest()
    monkeypatch.setattr(rendezvous._Patience, "wait", lambda *_: setattr(stop, "asked", True))
    with pytest.raises(Interrupted, match="process 1 .* was stopped"):
        meet(*local(2, [1]), {}, 300, stop)


def test_a_stop_that_comes_after_the_verdict_leaves_nobody_alone():
    """Process 0 has told all to begin: who was asked meanwhile begins too, and stops where all can."""
    stop = StopRequest()
    with socket.create_server(("127.0.0.1", 0)) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        own = pool.submit(meet, *local(2, [1], server.getsockname()[1]), {}, 20, stop)
        with server.accept()[0] as connection, connection.makefile("rwb", 0) as lines:
            assert json.loads(lines.readline())["process"] == 1
            stop.asked = True
            assert json.loads(lines.readline()) == {"is_stopped": True}
            lines.write(b'{"error": "", "is_stop": false}\n')
            assert own.result(10) is None


def test_a_port_in_use():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (error,) = at_once(local(2, [0], port), [{}])
    assert str(error).startswith(f"process 0 cannot listen on port {port} (Address already in use")
    assert str(error).endswith(", or choose another --coordinator")
