"""The two errors that are told in one line."""


class InputError(ValueError):
    """What the user gave is wrong; the message is one line that says what and how to mend it."""


class Unavailable(InputError):
    """The storage or another process failed: once that is mended, or later, the same command goes on."""
