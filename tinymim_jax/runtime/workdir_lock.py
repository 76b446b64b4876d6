"""One run at a time in a workdir: a file that says who, and that its owner is alive."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from typing import Any

from etils.epath import Path
from fsspec.implementations.local import LocalFileSystem

from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError

FILE = "run.lock"
BEAT = 10.0  # seconds between signs of life
STALE = 60.0  # seconds without one, after which a run that cannot be looked at is taken to be dead
WHO = {"host", "pid", "born", "token"}


class WorkdirLock:
    """Held from `__enter__` to `__exit__`; a lock whose owner is dead is taken over.

    An owner that was only suspended, or cut off from the storage, learns of it from `check`.
    """

    def __init__(self, workdir: Path):
        self.workdir = workdir
        self.files, self.path = storage.files(workdir), str(workdir / FILE)
        self.token = uuid.uuid4().hex
        who = {"host": socket.gethostname(), "pid": os.getpid(), "born": born(os.getpid()), "place": place()}
        self.own = json.dumps({**who, "token": self.token}).encode()
        self.released, self.guard = threading.Event(), threading.Lock()  # either a beat or the release

    def __enter__(self) -> "WorkdirLock":
        """Raises InputError if another run holds it."""
        while not self._take():
            owner = self.read()
            if who := self._dead(owner):
                print(f"{self.workdir}: the run before ({who}) has died; going on")
                self._remove(owner.get("token"))
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.released.set()
        with self.guard, contextlib.suppress(Exception) if kind else contextlib.nullcontext():  # the first is the cause
            self._remove(self.token)

    def check(self) -> None:
        """Raises InputError if another run has taken over; to be called by the owner before each checkpoint."""
        owner = self.read()
        if owner is None:
            who = f"{self.path} is gone: another run has taken over {self.workdir}, or it was deleted by hand"
        elif owner.get("token", self.token) != self.token:  # one that is being written says none
            who = "another run (process {pid} on {host}) has taken over ".format(**owner) + str(self.workdir)
        else:
            return
        raise InputError(f"{who}; this one stops, and has written no checkpoint since")

    def check_free(self) -> None:
        """Raises InputError if a living run holds it; one on another host is watched for a sign of life."""
        self._dead(self.read())

    def see(self, token: str) -> None:
        """Returns once the lock is seen to be that of `token`; raises InputError if this process looks elsewhere."""
        storage.wait_for(self.workdir / FILE, lambda: self._is_of(token))

    def read(self) -> dict[str, Any] | None:
        """What the file says; {} if that is not whole (yet), None if there is no file."""
        try:
            found = json.loads(self.files.cat_file(self.path))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return found if isinstance(found, dict) and set(found) >= WHO else {}

    def _is_of(self, token: str | None) -> bool:
        owner = self.read()
        return owner is not None and owner.get("token") == token

    def _take(self) -> bool:
        """Whether the file could be made, which a disk and a bucket let one of several do."""
        try:
            with storage.writing(self.path), self.files.open(self.path, "xb") as file:
                file.write(self.own)
        except FileExistsError:
            return self._is_of(self.token)  # a request whose answer was lost was sent again
        return True

    def _remove(self, token: str | None) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self._is_of(token):
                self.files.rm_file(self.path)

    def _dead(self, owner: dict[str, Any] | None) -> str:
        """Who held it and is dead; "" if there is no such one. Raises InputError if it is alive."""
        if owner is None:  # never taken, or let go this moment
            return ""
        who = "process {pid} on {host}".format(**owner) if owner else "a run that has not said who it is"
        if self._is_alive(owner):
            raise InputError(f"{self.workdir} is in use by {who}; wait for it or stop it, or choose another folder")
        return who

    def _is_alive(self, owner: dict[str, Any]) -> bool:
        if owner.get("place") == place() is not None:
            try:
                os.kill(owner["pid"], 0)
                return born(owner["pid"]) == owner["born"]
            except ProcessLookupError:
                return False
            except PermissionError:  # another user's, which /proc may hide
                pass
        return self._beats()

    def _beats(self) -> bool:
        """Waits until the file changes, which a living owner sees to, or is too old; by the storage's own clock."""
        probe = f"{self.path}.{self.token}"
        self.files.pipe_file(probe, b"")
        now = self.files.modified(probe)
        self.files.rm_file(probe)
        with contextlib.suppress(FileNotFoundError):  # let go meanwhile
            first = self.files.modified(self.path)
            end = time.monotonic() + STALE - (now - first).total_seconds()
            print(f"{self.path}: waiting for up to {STALE:.0f} s to see whether its owner lives", flush=True)
            while time.monotonic() < end:
                time.sleep(min(1.0, STALE / 10))
                if self.files.modified(self.path) != first:
                    return True
        return False

    def _beat(self) -> None:
        while not self.released.wait(BEAT):
            with self.guard, contextlib.suppress(Exception):  # each bucket's library has its own; the next may succeed
                if not self.released.is_set() and self._is_of(self.token):
                    self._sign()

    def _sign(self) -> None:
        """Makes the file new, on a disk without its ever being half written or made anew."""
        if isinstance(self.files, LocalFileSystem):
            os.utime(self.path)
        else:
            self.files.pipe_file(self.path, self.own)


def place() -> str | None:
    """Within what the number of a process means one: this boot of this host, this container. None: not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def born(pid: int) -> str | None:
    """When a process of this host began, in clock ticks: numbers of processes are used again. None: it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]  # killed, and not yet buried by its parent
