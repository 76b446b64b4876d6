"""Process 0 hears all others before JAX connects them, and tells each what is wrong.

JAX aborts a process with a stack trace if another does not come; this says which one, and what differs.
"""

import asyncio
import contextlib
import itertools
import json
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from tinymim_jax.runtime.cluster import Cluster
from tinymim_jax.runtime.codec import differences
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.preemption import Interrupted, StopRequest

MAX_MESSAGE = 2**20  # bytes
TICK = 0.2  # seconds between looks at what has changed, and between attempts to reach process 0
PATIENCE = 2.0  # seconds for a connection to be made
GRACE = 10.0  # seconds for the others to come and be told, once something is known to be wrong
SAID = 10.0, 60.0  # seconds of waiting, after which and between which the user is told
LAST_WORD = 5.0  # seconds for a message to arrive
MAX_NAMED = 8
UNREACHED = "is it running, is the address right, does no firewall stand between, and has no other this process_id?"

Who = Mapping[str, Any]  # "process", "host", and "facts", which must be equal in every process
clock = time.monotonic


class Verdict(NamedTuple):
    """What process 0 tells all: `error` is empty if all are there and agree, `is_stop` if one was asked to stop."""

    error: str = ""
    is_stop: bool = False


def meet(cluster: Cluster, facts: Mapping[str, Any], timeout: float, stop: StopRequest | None = None) -> None:
    """Returns in every process when all have come and agree on `facts`, which are JSON types.

    Raises, the same in all of them:
      InputError: some did not come within `timeout` seconds, or differ in `facts` or in the number of processes.
      Interrupted: one of them was asked to stop.
    """
    stop = stop or StopRequest()  # never asked
    host, port = cluster.coordinator.rsplit(":", 1)
    facts = {"num_processes": cluster.num_processes, **facts}
    own = {"process": cluster.process_id, "host": socket.gethostname(), "facts": facts}
    if cluster.process_id:
        verdict = asyncio.run(_report(host.strip("[]"), int(port), own, timeout, stop))
    else:
        verdict = asyncio.run(_Roll(own, stop).call(int(port), timeout))
    if verdict.is_stop:
        raise Interrupted(f"{verdict.error}; run the same command again", stop.status)
    if verdict.error:
        raise InputError(verdict.error)


class _Patience:
    """Says now and then what is waited for."""

    def __init__(self) -> None:
        self.next = clock() + SAID[0]

    def wait(self, what: str) -> None:
        if clock() > self.next:
            self.next = clock() + SAID[1]
            print(f"waiting for {what}", file=sys.stderr, flush=True)


class _Roll:
    """Process 0's list of who has come, each with a connection that stays."""

    def __init__(self, own: Who, stop: StopRequest):
        self.own, self.stop = own, stop
        self.lines: dict[asyncio.StreamWriter, Who] = {}
        self.stopped: list[Who] = []
        self.left: dict[int, str] = {}  # came and went: process -> host

    async def call(self, port: int, timeout: float) -> Verdict:
        """Waits until all are there and agree, or something is wrong; tells all, and returns what it told."""
        server = await asyncio.start_server(self.attend, sock=_listen(port), limit=MAX_MESSAGE)
        end, trouble, patience = clock() + timeout, "", _Patience()
        while not self.stop.asked and not self.stopped and not self.is_complete() and clock() < end:
            await asyncio.sleep(TICK)
            patience.wait(self.absent() or "the others")
            if not trouble and (trouble := _trouble(self.present())):
                end = min(end, clock() + GRACE)
        server.close()
        if stopped := [self.own] if self.stop.asked else self.stopped:
            verdict = _stop(stopped[0])
        elif found := _trouble(self.present()) or trouble:
            verdict = Verdict(found)
        else:
            late = f"{self.absent()} did not come within {timeout:g} s; see their logs, or raise --start_timeout"
            verdict = Verdict("" if self.is_complete() else late)
        for line in self.lines:
            line.write(json.dumps(verdict._asdict()).encode() + b"\n")
        return verdict

    async def attend(self, reader: asyncio.StreamReader, line: asyncio.StreamWriter) -> None:
        """Hears who it is, and perhaps that it is asked to stop, until it hangs up; a stranger is sent away."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads(await reader.readline())
            who = {**said, "process": int(said["process"]), "facts": dict(said["facts"])}
            self.lines[line] = who
            if await reader.readline():
                self.stopped.append(who)
                return
        if who := self.lines.pop(line, None):
            self.left[who["process"]] = who.get("host", "")
        line.close()

    def present(self) -> list[Who]:
        """Who has said who it is, process 0 first."""
        return [self.own, *sorted(self.lines.values(), key=lambda who: who["process"])]

    def is_complete(self) -> bool:
        """Whether all are there, by any one's count: all shall be told if these differ."""
        present = self.present()
        count = max(who["facts"].get("num_processes", 0) for who in present)  # an older version says none
        return {who["process"] for who in present} >= set(range(count))

    def absent(self) -> str:
        """Who has not come; "" if all have."""
        here, count = {who["process"] for who in self.present()}, self.own["facts"]["num_processes"]
        absent = [i for i in range(count) if i not in here]
        named = [f"{i} ({self.left[i]}: it came and ended)" if i in self.left else str(i) for i in absent]
        names = f"process{'es' if len(absent) > 1 else ''} {', '.join(named[:MAX_NAMED])}"
        return f"{names}{' ...' if len(absent) > MAX_NAMED else ''} of {count}" if absent else ""


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise InputError(
            f"process 0 cannot listen on port {port} ({error.strerror}); stop what does (another process 0?), or choose"
            " another --coordinator"
        ) from None


async def _report(host: str, port: int, own: Who, timeout: float, stop: StopRequest) -> Verdict:
    """Any other process: reports to process 0, and returns what it tells."""
    end, why, patience = clock() + timeout, "", _Patience()
    while not stop.asked and clock() < end:
        try:
            reader, line = await asyncio.wait_for(asyncio.open_connection(host, port, limit=MAX_MESSAGE), PATIENCE)
            with contextlib.closing(line):
                line.write(json.dumps(own).encode() + b"\n")
                return await _hear(reader, line, end + LAST_WORD, stop)
        except (OSError, ValueError, TypeError) as error:  # the latter two: a stranger's answer
            why = f" ({getattr(error, 'strerror', None) or error or 'no answer'}); {UNREACHED}"
        patience.wait(f"process 0 at {host}:{port}{why}")
        await asyncio.sleep(TICK)
    late = f"process {own['process']} did not reach process 0 at {host}:{port} within {timeout:g} s{why}"
    return _stop(own) if stop.asked else Verdict(late)


async def _hear(reader: asyncio.StreamReader, line: asyncio.StreamWriter, end: float, stop: StopRequest) -> Verdict:
    """What process 0 tells, to which a stop here is said meanwhile; raises ValueError if it hangs up instead."""
    answer, has_said, patience = asyncio.ensure_future(reader.readline()), False, _Patience()
    while not answer.done() and clock() < end:
        patience.wait("the others, which process 0 knows")
        if stop.asked and not has_said:  # if all are already told to begin, this one must, too
            line.write(b'{"is_stopped": true}\n')
            end, has_said = clock() + LAST_WORD, True
        await asyncio.wait([answer], timeout=TICK)
    if not answer.done() or not answer.result():
        answer.cancel()
        raise ValueError("what answers there is no process 0 of ours, or no longer")
    return Verdict(**json.loads(answer.result()))


def _stop(who: Who) -> Verdict:
    return Verdict(f"process {who['process']} ({who.get('host')}) was stopped while processes were waited for", True)


def _trouble(present: list[Who]) -> str:
    """What is wrong with those who are there, sorted by process; "" if nothing."""
    for one, other in itertools.pairwise(present):
        if one["process"] == other["process"]:
            return (
                f"two processes say that they are process {one['process']} (host {one.get('host')}, host"
                f" {other.get('host')}); give each its own --process_id"
            )
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
