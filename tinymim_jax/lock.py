"""One run at a time in a workdir: a file that says who, and that its owner is alive."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from tinymim_jax.serial import InputError

FILE = "run.lock"
BEAT = 10.0  # seconds between signs of life
STALE = 60.0  # seconds without one, after which a run on another host is taken to be dead


class Lock:
    """Held from `__enter__` to `__exit__`; a lock whose owner is dead is taken over."""

    def __init__(self, workdir: Path):
        self.path = workdir / FILE
        self.token = uuid.uuid4().hex
        self.released = threading.Event()

    def __enter__(self) -> "Lock":
        """Raises InputError if another run holds it."""
        while not self._take():
            self._judge(read(self.path))
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        if (read(self.path) or {}).get("token") == self.token:
            self.path.unlink()

    def _take(self) -> bool:
        """Whether the file could be made; written whole before it has its name, so that nobody reads half of it."""
        own = {"host": socket.gethostname(), "pid": os.getpid(), "born": born(os.getpid()), "token": self.token}
        draft = self.path.with_name(f"{FILE}.{self.token}")
        draft.write_text(json.dumps(own))
        try:
            os.link(draft, self.path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def _judge(self, owner: dict[str, Any] | None) -> None:
        """Removes the lock of a dead run; raises InputError if it is alive."""
        if owner is None:  # let go this moment
            return
        if owner["host"] == socket.gethostname():
            is_alive = born(owner["pid"]) is not None and born(owner["pid"]) == owner["born"]
        else:
            is_alive = self._beats()
        if is_alive:
            raise InputError(
                f"{self.path.parent} is in use by process {owner['pid']} on {owner['host']}; wait for it or stop it, or"
                " choose another --workdir"
            )
        print(f"{self.path.parent}: the run before (process {owner['pid']} on {owner['host']}) has died; going on")
        with contextlib.suppress(FileNotFoundError):
            if (read(self.path) or {}).get("token") == owner["token"]:
                self.path.unlink()

    def _beats(self) -> bool:
        """Waits until the file changes, which a living owner sees to, or is too old; by the storage's own clock."""
        with contextlib.suppress(FileNotFoundError):
            first = self.path.stat().st_mtime
            while self._now() - first < STALE:
                time.sleep(min(1.0, STALE / 10))
                if self.path.stat().st_mtime != first:
                    return True
        return False

    def _now(self) -> float:
        probe = self.path.with_name(f"{FILE}.{self.token}")
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _beat(self) -> None:
        while not self.released.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def read(path: Path) -> dict[str, Any] | None:
    """What a lock says; None if there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        raise InputError(f"{path} is damaged; if no run is at work there, delete it") from None


def born(pid: int) -> str | None:
    """When a process of this host began, in clock ticks: numbers of processes are used again. None: there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except FileNotFoundError:
        return None
