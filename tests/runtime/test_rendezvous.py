import concurrent.futures
import contextlib
import json
import socket
import threading
import time

import pytest

from tests.processes import free_port
from tinymim_jax.runtime import rendezvous as module
from tinymim_jax.runtime.cluster import Cluster
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.preemption import Interrupted, StopRequest
from tinymim_jax.runtime.rendezvous import roll_call


def at_once(clusters, facts, timeout=20.0, stops=()):
    """What ends each of the processes: an error, or None."""

    def one(i):
        try:
            return roll_call(clusters[i], facts[i], timeout, stops[i] if stops else None)
        except (InputError, Interrupted) as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, range(len(clusters))))


def call(facts, timeout=20.0, absent=()):
    """The verdict that each of the processes hears: "" or an error."""
    address, there = f"127.0.0.1:{free_port()}", [i for i in range(len(facts)) if i not in absent]
    clusters = [Cluster(address, len(facts), i) for i in there]
    return [str(error or "") for error in at_once(clusters, [facts[i] for i in there], timeout)]


def test_all_are_there_and_agree():
    assert call([{"jax": "0.10", "config": {"lr": 1}}] * 5) == [""] * 5


def test_the_missing_are_named_to_everyone():
    began = time.monotonic()
    verdicts = call([{}] * 4, timeout=1.5, absent=(1, 3))
    assert set(verdicts) == {
        "processes 1, 3 of 4 did not come within 1.5 s; see their logs, or raise --start_timeout if they are slow to"
        " start"
    }
    assert len(verdicts) == 2 and time.monotonic() - began < 10


def test_waiting_is_said(monkeypatch, capsys):
    monkeypatch.setattr(module, "SAID", (0.2, 60.0))
    call([{}] * 3, timeout=2.5, absent=(2,))
    err = capsys.readouterr().err.splitlines()
    assert sorted(err) == ["waiting for process 2 of 3", "waiting for the others, which process 0 knows"]
    call([{}] * 2, timeout=1.0, absent=(0,))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("waiting for process 0 at 127.0.0.1:") and "firewall" in line


def test_without_process_0():
    (verdict,) = call([{}] * 2, timeout=1.0, absent=(0,))
    assert verdict.startswith("process 1 did not reach process 0 at 127.0.0.1:") and "within 1 s" in verdict


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"jax": "0.11", "config": {"lr": 1}}, 'jax: "0.10" -> "0.11"'),
        ({"jax": "0.10", "config": {"lr": 2}}, "config.lr: 1 -> 2"),
        ({"jax": "0.10"}, 'config: {"lr": 1} -> null'),
    ],
)
def test_a_difference_is_told_to_everyone(other, what):
    facts = [{"jax": "0.10", "config": {"lr": 1}}] * 3
    facts[2] = other
    for verdict in call(facts):
        assert verdict.startswith(f"process 2 ({socket.gethostname()}) differs from process 0 in {what};")


def test_a_stranger_at_the_port_does_no_harm():
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        clusters = [Cluster(f"127.0.0.1:{port}", 2, i) for i in range(2)]
        first = pool.submit(roll_call, clusters[0], {}, 20)
        for junk in (b"GET / HTTP/1.1\r\n\r\n", b"\n", b"[1]\n", b'{"process": null}\n'):
            for _ in range(100):
                try:
                    with socket.create_connection(("127.0.0.1", port), 1) as stranger:
                        stranger.sendall(junk)
                    break
                except OSError:
                    time.sleep(0.02)
        pool.submit(roll_call, clusters[1], {}, 20).result(20)
        first.result(20)


def test_a_stranger_who_says_nothing_holds_nobody_up():
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(3) as pool, contextlib.ExitStack() as strangers:
        clusters = [Cluster(f"127.0.0.1:{port}", 2, i) for i in range(2)]
        first = pool.submit(roll_call, clusters[0], {}, 10)
        strangers.enter_context(connected(port))
        began = time.monotonic()
        pool.submit(roll_call, clusters[1], {}, 10).result(20)
        first.result(20)
        assert time.monotonic() - began < 2


def connected(port):
    """A connection to process 0, once it is there."""
    for _ in range(3000):
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port), 1)
        time.sleep(0.02)
    raise TimeoutError


@pytest.mark.parametrize("counts", [(2, 3), (3, 2), (2, 3, 3), (3, 3, 2)])
def test_numbers_of_processes_that_differ(counts, monkeypatch):
    monkeypatch.setattr(module, "GRACE", 2.0)
    address = f"127.0.0.1:{free_port()}"
    errors = at_once([Cluster(address, count, i) for i, count in enumerate(counts)], [{}] * len(counts))
    odd = next(i for i, count in enumerate(counts) if count != counts[0])
    what = f"differs from process 0 in num_processes: {counts[0]} -> {counts[odd]}; start all with the same"
    assert all(str(error).startswith(f"process {odd} ({socket.gethostname()}) {what}") for error in errors)


def test_one_of_an_older_version():
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(at_once, [Cluster(f"127.0.0.1:{port}", 2, 0)], [{"code": "new"}])
        with connected(port) as connection:
            connection.sendall(b'{"process": 1, "host": "h1", "facts": {"code": "old"}}\n')
            assert "process 1 (h1) differs from process 0 in num_processes: 2 -> null" in str(first.result(10)[0])


def test_two_with_one_number(monkeypatch):
    monkeypatch.setattr(module, "GRACE", 1.0)
    address, host = f"127.0.0.1:{free_port()}", socket.gethostname()
    errors = at_once([Cluster(address, 3, i) for i in (0, 1, 1)], [{}] * 3)
    line = f"two processes say that they are process 1 (host {host}, host {host}); give each its own --process_id"
    assert [str(error) for error in errors] == [line] * 3


def test_a_port_where_no_roll_is_called():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up():
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        with pytest.raises(InputError, match="what answers there calls no roll, or no longer; was process 0 started"):
            roll_call(Cluster(f"127.0.0.1:{server.getsockname()[1]}", 2, 1), {}, 1)


def test_a_name_that_is_not_known():
    with pytest.raises(
        InputError, match=r"did not reach process 0 at nowhere\.invalid:1 .*the name nowhere.invalid is not"
    ):
        roll_call(Cluster("nowhere.invalid:1", 2, 1), {}, 1)


def test_one_that_came_and_ended_may_come_again_and_is_named_if_it_does_not():
    port = free_port()
    own = {"process": 1, "host": "h1", "facts": {"num_processes": 2}}
    for comes_again in (True, False):
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            first = pool.submit(at_once, [Cluster(f"127.0.0.1:{port}", 3, 0)], [{}], 2.0)
            for i in (1, 2):
                with connected(port) as connection:
                    own = {"process": i, "host": f"h{i}", "facts": {"num_processes": 3}}
                    connection.sendall(json.dumps(own).encode() + b"\n")
                    time.sleep(0.2)
            if comes_again:
                assert at_once([Cluster(f"127.0.0.1:{port}", 3, i) for i in (1, 2)], [{}] * 2, 5) == [None, None]
                assert first.result(10) == [None]
            else:
                assert "processes 1 (h1: it came and ended), 2 (h2: it came and ended) of 3 did not come" in str(
                    first.result(10)[0]
                )


@pytest.mark.parametrize("who", [0, 1])
def test_a_stop_is_heard_at_once_and_told_to_all(who):
    address, stops = f"127.0.0.1:{free_port()}", [StopRequest() for _ in range(3)]
    stops[who].status = 130

    def ask():
        stops[who].asked = True

    timer = threading.Timer(1.0, ask)
    timer.start()
    began = time.monotonic()
    errors = at_once([Cluster(address, 4, i) for i in range(3)], [{}] * 3, 60, stops)  # process 3 does not come
    assert time.monotonic() - began < 6
    line = f"process {who} ({socket.gethostname()}) was stopped while the roll was called; run the same command again"
    assert [str(error) for error in errors] == [line] * 3
    assert [error.status for error in errors] == [130 if i == who else 75 for i in range(3)]


def test_a_stop_before_process_0_is_there():
    stop = StopRequest()
    threading.Timer(0.5, lambda: setattr(stop, "asked", True)).start()
    began = time.monotonic()
    with pytest.raises(Interrupted, match="process 1 .* was stopped"):
        roll_call(Cluster(f"127.0.0.1:{free_port()}", 2, 1), {}, 60, stop)
    assert time.monotonic() - began < 5


def test_a_stop_that_comes_after_the_verdict_leaves_nobody_alone():
    """Process 0 has told all to begin: who was asked meanwhile begins too, and stops where all can."""
    stop = StopRequest()
    with socket.create_server(("127.0.0.1", 0)) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        own = pool.submit(roll_call, Cluster(f"127.0.0.1:{server.getsockname()[1]}", 2, 1), {}, 20, stop)
        with server.accept()[0] as connection, connection.makefile("rwb", 0) as lines:
            assert json.loads(lines.readline())["process"] == 1
            stop.asked = True
            assert json.loads(lines.readline()) == {"is_stopped": True}
            lines.write(b'{"error": "", "is_stop": false}\n')
            assert own.result(10) is None


def test_a_port_in_use():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(
            InputError, match=f"process 0 cannot listen on port {port} .*, or choose another --coordinator"
        ):
            roll_call(Cluster(f"127.0.0.1:{port}", 2, 0), {}, 1)
