"""Process 0 hears all others before JAX connects them, and tells each what is wrong.

JAX ends a process with a stack trace if another does not come; the roll call says which one, and what differs.
"""

import contextlib
import dataclasses
import itertools
import json
import selectors
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from tinymim_jax.runtime.cluster import Cluster
from tinymim_jax.runtime.codec import differences
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.preemption import Interrupted, StopRequest

MAX_MESSAGE = 2**20  # bytes
TICK = 1.0  # seconds between looks at whether a stop was asked for
GRACE = 10.0  # seconds for the others to come and be told, once something is known to be wrong
RETRY = 0.2  # seconds between attempts to reach process 0
SAID = 10.0, 60.0  # seconds of waiting, after which and between which the user is told
LAST_WORD = 5.0  # seconds for a message to arrive
MAX_NAMED = 8
UNREACHED = "is process 0 running, is the address right, and does no firewall stand between?"
STRANGER = (
    "what answers there calls no roll, or no longer; was process 0 started with another --num_processes, is there a"
    " second process with this process_id, or is the port another program's?"
)

Facts = Mapping[str, Any]  # what must be equal in every process: name -> JSON types


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What process 0 tells all: `error` is empty if all are there and agree, `is_stop` if one was asked to stop."""

    error: str = ""
    is_stop: bool = False


def roll_call(cluster: Cluster, facts: Facts, timeout: float, stop: StopRequest | None = None) -> None:
    """Returns in every process when all have come and agree.

    Raises, the same in all of them:
      InputError: some did not come within `timeout` seconds, or differ in `facts` or in the number of processes.
      Interrupted: one of them was asked to stop.
    """
    stop = stop or StopRequest()  # never asked
    host, port = cluster.coordinator.rsplit(":", 1)
    facts = {"num_processes": cluster.num_processes, **facts}
    own = {"process": cluster.process_id, "host": socket.gethostname(), "facts": facts}
    if cluster.process_id:
        verdict = _answer_roll_call(host.strip("[]"), int(port), own, timeout, stop)
    else:
        verdict = _call_roll(int(port), own, timeout, stop)
    if verdict.is_stop:
        raise Interrupted(f"{verdict.error}; run the same command again", stop.status)
    if verdict.error:
        raise InputError(verdict.error)


class _Patience:
    """Says now and then what is waited for."""

    def __init__(self) -> None:
        self.next = time.monotonic() + SAID[0]

    def wait(self, what: str) -> None:
        if time.monotonic() > self.next:
            self.next = time.monotonic() + SAID[1]
            print(f"waiting for {what}", file=sys.stderr, flush=True)


class _Line:
    """A connection to process 0, and what it has said so far."""

    def __init__(self, connection: socket.socket):
        self.connection, self.buffer = connection, b""
        self.who: dict[str, Any] | None = None  # None: not yet said, or a stranger
        self.is_stopped = False

    def hear(self) -> bool:
        """Takes in what has come; False if the other end is gone or is no process of ours."""
        try:
            chunk = self.connection.recv(65536)
            self.buffer += chunk
            *messages, self.buffer = self.buffer.split(b"\n")
            for message in map(json.loads, messages):
                self.is_stopped |= bool(message.get("is_stopped"))
                if self.who is None:
                    self.who = {**message, "process": int(message["process"]), "facts": dict(message["facts"])}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        return bool(chunk) and len(self.buffer) <= MAX_MESSAGE


class _Roll:
    """Process 0's list."""

    def __init__(self, own: dict[str, Any], stop: StopRequest):
        self.own, self.stop, self.count = own, stop, own["facts"]["num_processes"]
        self.lines: list[_Line] = []
        self.left: dict[int, str] = {}  # came and went: process -> host

    def drop(self, line: _Line) -> None:
        """Takes out who has gone; it may come again."""
        line.connection.close()
        self.lines.remove(line)
        if line.who:
            self.left[line.who["process"]] = line.who.get("host")

    def present(self) -> list[dict[str, Any]]:
        """Who has said who it is, process 0 first."""
        return [self.own, *sorted((line.who for line in self.lines if line.who), key=lambda who: who["process"])]

    def is_complete(self) -> bool:
        """Whether all are there, by any one's count: all shall be told if these differ."""
        present = self.present()
        count = max(who["facts"].get("num_processes", 0) for who in present)  # an older version says none
        return {who["process"] for who in present} >= set(range(count))

    def trouble(self) -> str:
        """What is wrong with those who are there."""
        return _duplicate(self.present()) or _disagreement(self.present())

    def stopped(self) -> str:
        """Who was asked to stop, if any was."""
        asked = [self.own] if self.stop.asked else [line.who for line in self.lines if line.who and line.is_stopped]
        return _stopped(asked[0]) if asked else ""

    def absent(self) -> str:
        """Who has not come; "" if all have."""
        here = {who["process"] for who in self.present()}
        absent = [i for i in range(self.count) if i not in here]
        if not absent:
            return ""
        named = [f"{i} ({self.left[i]}: it came and ended)" if i in self.left else str(i) for i in absent]
        names = f"process{'es' if len(absent) > 1 else ''} {', '.join(named[:MAX_NAMED])}"
        return f"{names}{' ...' if len(absent) > MAX_NAMED else ''} of {self.count}"

    def missing(self, timeout: float) -> str:
        """Who has not come in time, and what to do."""
        if not (absent := self.absent()):
            return ""
        return (
            f"{absent} did not come within {timeout:g} s; see their logs, or raise --start_timeout if they are slow to"
            " start"
        )

    def tell(self, verdict: Verdict) -> None:
        """Sends it to all who have said who they are."""
        message = json.dumps(dataclasses.asdict(verdict)).encode() + b"\n"
        for line in self.lines:
            if line.who:
                with contextlib.suppress(OSError):
                    line.connection.sendall(message)

    def close(self) -> None:
        """Hangs up."""
        for line in self.lines:
            line.connection.close()


def _call_roll(port: int, own: dict[str, Any], timeout: float, stop: StopRequest) -> Verdict:
    """Process 0: hears all others and tells each the verdict."""
    roll, end, trouble, patience = _Roll(own, stop), time.monotonic() + timeout, "", _Patience()
    with _listen(port) as server, selectors.DefaultSelector() as selector, contextlib.closing(roll):
        server.settimeout(TICK)  # who knocked may be gone
        selector.register(server, selectors.EVENT_READ)
        while not roll.stopped() and not roll.is_complete() and (left := end - time.monotonic()) > 0:
            for key, _ in selector.select(min(left, TICK)):
                _attend(roll, selector, server, key.data)
            if absent := roll.absent():
                patience.wait(absent)
            if not trouble and (trouble := roll.trouble()):
                end = min(end, time.monotonic() + GRACE)
        if stopped := roll.stopped():
            verdict = Verdict(stopped, True)
        else:
            verdict = Verdict(roll.trouble() or trouble or roll.missing(timeout))
        roll.tell(verdict)
    return verdict


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise InputError(
            f"process 0 cannot listen on port {port} ({error.strerror}); stop what does (another process 0?), or choose"
            " another --coordinator"
        ) from None


def _attend(roll: _Roll, selector: selectors.BaseSelector, server: socket.socket, line: _Line | None) -> None:
    """Lets somebody in, if `line` is None, or hears what a line says."""
    if line is None:
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            connection.settimeout(LAST_WORD)
            roll.lines.append(_Line(connection))
            selector.register(connection, selectors.EVENT_READ, roll.lines[-1])
    elif not line.hear():
        selector.unregister(line.connection)
        roll.drop(line)


def _answer_roll_call(host: str, port: int, own: dict[str, Any], timeout: float, stop: StopRequest) -> Verdict:
    """Any other process: reports to process 0, and returns its verdict."""
    deadline, why, patience = time.monotonic() + timeout, "", _Patience()
    while not stop.asked and (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((host, port), min(left, 2 * TICK))
        except socket.gaierror as error:
            why = f" (the name {host} is not known: {error.strerror}); {UNREACHED}"
        except OSError as error:
            why = f" ({error.strerror or error}); {UNREACHED}"
        else:
            with connection, contextlib.suppress(OSError, ValueError, TypeError):  # the latter: a stranger's answer
                if verdict := _report(connection, own, timeout, stop):
                    return verdict
            why = f": {STRANGER}"
        patience.wait(f"process 0 at {host}:{port}{why}")
        time.sleep(RETRY)
    if stop.asked:
        return Verdict(_stopped(own), True)
    return Verdict(f"process {own['process']} did not reach process 0 at {host}:{port} within {timeout:g} s{why}")


def _report(connection: socket.socket, own: dict[str, Any], timeout: float, stop: StopRequest) -> Verdict | None:
    """Says who this is and waits for the verdict, as process 0 may; None if it hangs up."""
    connection.settimeout(TICK)
    connection.sendall(json.dumps(own).encode() + b"\n")
    deadline, answer, has_said = time.monotonic() + timeout + LAST_WORD, b"", False
    patience = _Patience()
    while time.monotonic() < deadline:
        patience.wait("the others, which process 0 knows")
        if stop.asked and not has_said:  # if all are already told to begin, this one must, too
            connection.sendall(b'{"is_stopped": true}\n')
            deadline, has_said = time.monotonic() + LAST_WORD, True
        try:
            chunk = connection.recv(65536)
        except TimeoutError:
            continue
        answer += chunk
        if answer.endswith(b"\n"):
            return Verdict(**json.loads(answer))
        if not chunk or len(answer) > MAX_MESSAGE:
            break
    return None


def _stopped(who: Mapping[str, Any]) -> str:
    return f"process {who['process']} ({who.get('host')}) was stopped while the roll was called"


def _duplicate(present: list[dict[str, Any]]) -> str:
    """`present` is sorted by process."""
    for one, other in itertools.pairwise(present):
        if one["process"] == other["process"]:
            return (
                f"two processes say that they are process {one['process']} (host {one.get('host')}, host"
                f" {other.get('host')}); give each its own --process_id"
            )
    return ""


def _disagreement(present: list[dict[str, Any]]) -> str:
    first = present[0]["facts"]
    for who in present:
        for name in {**first, **who["facts"]}:
            mine, theirs = first.get(name), who["facts"].get(name)
            if mine != theirs:
                what = "; ".join(differences(mine, theirs, name)[:3]) or name
                return (
                    f"process {who['process']} ({who.get('host')}) differs from process 0 in {what}; start all with the"
                    " same code, packages and command line"
                )
    return ""
