"""Standard output and error, whatever stands at their other end."""

import errno
import io
import os
import sys

GONE = (errno.EPIPE, errno.EIO)  # who read a pipe has left, a terminal was hung up


class _Raw(io.FileIO):
    """Drops what nobody reads any more: that is no reason for work to fail."""

    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in GONE:
                raise
            return len(data)


def make_safe() -> None:
    """Lets `print` never fail for want of a reader or of a character; for the start of a program.

    Characters that the terminal does not have become "?", or an escape in errors.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file opened would have its number, and get what libraries print
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for number, name, errors in ((1, "stdout", "replace"), (2, "stderr", "backslashreplace")):
        encoding = getattr(getattr(sys, name), "encoding", "utf-8")
        buffer = io.BufferedWriter(_Raw(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, encoding, errors, line_buffering=True))
