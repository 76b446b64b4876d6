"""One run at a time in a workdir: a file that says who, and that its owner is alive."""

import contextlib
import datetime
import json
import os
import socket
import threading
import time
import uuid
from typing import Any

from etils.epath import Path

from tinymim_jax import storage
from tinymim_jax.serial import InputError

FILE = "run.lock"
BEAT = 10.0  # seconds between signs of life
STALE = 60.0  # seconds without one, after which a run on another host is taken to be dead


class Lock:
    """Held from `__enter__` to `__exit__`; a lock whose owner is dead is taken over."""

    def __init__(self, workdir: Path):
        self.workdir = workdir
        self.files, self.path = storage.files(workdir), str(workdir / FILE)
        self.token = uuid.uuid4().hex
        own = {"host": socket.gethostname(), "pid": os.getpid(), "born": born(os.getpid()), "token": self.token}
        self.own = json.dumps(own).encode()
        self.released = threading.Event()

    def __enter__(self) -> "Lock":
        """Raises InputError if another run holds it."""
        while not self._take():
            self._judge(self.read())
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.released.set()
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():  # the first error is the cause
            if self._is_of(self.token):
                self.files.rm_file(self.path)

    def see(self, token: str) -> None:
        """Returns once the lock is seen to be that of `token`; raises InputError if this process looks elsewhere."""
        storage.wait_for(self.workdir / FILE, lambda: self._is_of(token))

    def _take(self) -> bool:
        """Whether the file could be made, which a disk and a bucket let one of several do."""
        try:
            with self.files.open(self.path, "xb") as file:
                file.write(self.own)
        except FileExistsError:
            return self._is_of(self.token)  # a request whose answer was lost was sent again
        return True

    def _judge(self, owner: dict[str, Any] | None) -> None:
        """Removes the lock of a dead run; raises InputError if it is alive."""
        if owner is None:  # let go this moment
            return
        who = "process {pid} on {host}".format(**owner) if owner else "a run that has not said who it is"
        if owner.get("host") == socket.gethostname():
            is_alive = born(owner["pid"]) is not None and born(owner["pid"]) == owner["born"]
        else:
            is_alive = self._beats()
        if is_alive:
            raise InputError(f"{self.workdir} is in use by {who}; wait for it or stop it, or choose another folder")
        print(f"{self.workdir}: the run before ({who}) has died; going on")
        with contextlib.suppress(FileNotFoundError):
            if self._is_of(owner.get("token")):
                self.files.rm_file(self.path)

    def _beats(self) -> bool:
        """Waits until the file changes, which a living owner sees to, or is too old; by the storage's own clock."""
        with contextlib.suppress(FileNotFoundError):
            first = self.files.modified(self.path)
            while (self._now() - first).total_seconds() < STALE:
                time.sleep(min(1.0, STALE / 10))
                if self.files.modified(self.path) != first:
                    return True
        return False

    def _now(self) -> datetime.datetime:
        probe = f"{self.path}.{self.token}"
        self.files.pipe_file(probe, b"")
        try:
            return self.files.modified(probe)
        finally:
            self.files.rm_file(probe)

    def _beat(self) -> None:
        while not self.released.wait(BEAT):
            with contextlib.suppress(Exception):  # each bucket's library has its own; the next beat may succeed
                if self._is_of(self.token):
                    self._sign()

    def _sign(self) -> None:
        """Makes the file new, on a disk without its ever being half written."""
        try:
            self.files.touch(self.path, truncate=False)
        except NotImplementedError:
            self.files.pipe_file(self.path, self.own)

    def _is_of(self, token: str | None) -> bool:
        owner = self.read()
        return owner is not None and owner.get("token") == token

    def read(self) -> dict[str, Any] | None:
        """What the file says; {} if that is not whole (yet), None if there is no file."""
        try:
            return json.loads(self.files.cat_file(self.path))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}


def born(pid: int) -> str | None:
    """When a process of this host began, in clock ticks: numbers of processes are used again. None: there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except FileNotFoundError:
        return None
