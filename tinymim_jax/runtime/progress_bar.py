"""How far long work is, its rate and when it ends: a bar on a terminal, plain lines in a log."""

import sys
from typing import Any

import tqdm

INTERVAL = 10.0  # seconds between two lines of a log


class Bar(tqdm.tqdm):
    """tqdm's; rate and end are counted from the first `update` on, as what comes before it is mostly compiling.

    Until then it says `first`; afterwards `note` is shown behind the rate, which is in `speed`: how many in a unit, of
    what.
    """

    FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{eta}, {pace}{note}]"

    def __init__(self, title: str, total: int, unit: str, first: str, speed: tuple[float, str], **options: Any):
        self.first, self.note, self.speed = first, "", speed
        # Averages over all: neither batches that are dispatched together nor an evaluation make the end jump.
        super().__init__(None, title, total, unit=unit, bar_format=self.FORMAT, smoothing=0, miniters=1, **options)

    @property
    def format_dict(self) -> dict[str, Any]:
        """tqdm's fields, and ours."""
        found, count, rate, eta = super().format_dict, self.n - self.initial, "?", "?"
        if count and found["elapsed"]:
            eta = self.format_interval((self.total - self.n) * found["elapsed"] / count)
            rate = self.format_sizeof(self.speed[0] * count / found["elapsed"])
        prefix = f"{self.desc}, {self.first}" if self.first else self.desc
        return found | {"prefix": prefix, "pace": f"{rate} {self.speed[1]}/s", "eta": eta, "note": self.note}

    def update(self, n: float = 1) -> bool | None:
        """`n` more are done."""
        if not (self.first and n) or self.disable:
            return super().update(n)
        self.n += n
        self.first, self.initial, self.start_t = "", self.n, self._time()
        self.last_print_t = 0.0  # the next update has a rate, and is shown at once
        return None


class Lines(Bar):
    """The same as lines of their own."""

    FORMAT = "{desc}: {unit} {n_fmt}/{total_fmt}{note} {pace} eta {eta}"

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Prints a line."""
        print(f"{self.desc}: {self.first}" if self.first else str(self), file=sys.stderr, flush=True)

    def clear(self, nolock: bool = False) -> None:
        """Nothing: lines stay."""

    def close(self) -> None:
        """The last line, unless it is there or none is wanted."""
        if self.disable:
            return
        self.disable = True
        if self.leave and self.n != self.last_print_n:
            self.display()
        self._decr_instances(self)


def bar(
    title: str, total: int, unit: str, *, first: str = "starting", speed: tuple[float, str] | None = None,
    leave: bool = True, **options: Any,
) -> Bar:  # fmt: skip
    """On standard error; what is not to `leave` is gone at the end, and in a log shown of long work alone."""
    options |= {"first": first, "speed": speed or (1, unit), "leave": leave}
    if sys.stderr.isatty():
        return Bar(title, total, unit, **options)
    return Lines(title, total, unit, mininterval=INTERVAL, delay=0 if leave else INTERVAL, **options)
