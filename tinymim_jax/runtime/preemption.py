"""A wish to stop, or a failure, noted at any moment and acted on between steps.

Imports nothing heavy: it is needed before jax.
"""

import signal
import sys
from typing import Any

INTERRUPTED = 130  # exit status after Ctrl-C
RUN_AGAIN = 75  # and after SIGTERM, which schedulers send before they take a machine away (EX_TEMPFAIL)
GO_ON, STOP, FAILED = range(3)  # what a process tells the others


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; its state is on disk. `status` is the exit status that says by whom."""

    def __init__(self, message: str, status: int = INTERRUPTED):
        super().__init__(message)
        self.status = status


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a flag to read between steps; a second one acts at once.

    `failure` is what has gone wrong in this process and is to be raised as soon as the others know, too.
    """

    def __init__(self) -> None:
        self.asked = False
        self.failure: Exception | None = None
        self.status = RUN_AGAIN  # where another process was asked
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self.previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def obey(self, where: str) -> None:
        """Raises Interrupted: this process or another was asked; `where` says how far the run has come."""
        self.asked = True
        raise Interrupted(f"{where}; run the same command to go on", self.status)

    def fail(self, error: Exception) -> None:
        """Notes a failure; of several, the first."""
        self.failure = self.failure or error

    def raise_failure(self) -> None:
        """Raises what `fail` was given, if anything."""
        if self.failure:
            raise self.failure

    def wish(self) -> int:
        """GO_ON, STOP or FAILED."""
        return FAILED if self.failure else STOP if self.asked else GO_ON

    def _ask(self, number: int, _: object) -> None:
        self.asked, self.status = True, INTERRUPTED if number == signal.SIGINT else RUN_AGAIN
        self._restore()
        print("\nstopping; what was trained is saved first. Ctrl-C again stops at once", file=sys.stderr, flush=True)

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
