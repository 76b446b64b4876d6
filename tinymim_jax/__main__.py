"""`python -m tinymim_jax COMMAND`."""

import importlib
import os
import sys

import absl.logging

from tinymim_jax import storage
from tinymim_jax.serial import InputError, Unavailable
from tinymim_jax.stop import INTERRUPTED, Interrupted

BAD = 2  # exit status
UNAVAILABLE = 74  # EX_IOERR
COMMANDS = {
    "run": "run a chain of stages, or go on with it",
    "plan": "compile a chain for a pod, without the pod: memory, FLOPs, hours",
    "doctor": "what is wrong with this machine or cluster, and the fix",
    "prepare": "pack a data set into shards that are fast to read",
    "bench": "measure speed, as JSON",
    "eval": "measure a finished model: accuracy, robustness, probes",
    "report": "make the tables and pictures of a finished run again",
    "convert": "other people's checkpoint -> ours",
    "inspect": "say what is in a checkpoint, theirs or ours",
    "export": "our checkpoint -> timm, Hugging Face, MAE's .pth or ONNX",
}


def main(argv: list[str]) -> int:
    """Runs one command.

    Returns the exit status: 0, 2 on bad input, 74 if the storage or another process failed, 130 after Ctrl-C, 75 after
    SIGTERM: run me again.
    """
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:8} {text}" for name, text in COMMANDS.items()]
        print("\n".join(["usage: python -m tinymim_jax COMMAND ...", "", *lines, "", "COMMAND --help says more."]))
        return 0
    absl.logging.set_verbosity(absl.logging.FATAL)  # orbax logs with tracebacks what we say in a line
    storage.prepare()
    try:
        if argv[0] not in COMMANDS:
            raise InputError(f"unknown command {argv[0]!r}; choose one of {', '.join(COMMANDS)}")
        importlib.import_module(f"tinymim_jax.commands.{argv[0]}").main(argv[1:])
    except Exception as error:
        known = storage.blame(error) or lost(error)
        if known is None:
            raise
        print(f"error: {known}", file=sys.stderr)
        return UNAVAILABLE if isinstance(known, Unavailable) else BAD
    except KeyboardInterrupt as stop:
        print(f"interrupted: {stop}" if str(stop) else "interrupted", file=sys.stderr)
        return stop.status if isinstance(stop, Interrupted) else INTERRUPTED
    return 0


def lost(error: Exception) -> Unavailable | None:
    """The death of another process, which JAX notes in its next collective; None if `error` is something else."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized() or not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    return Unavailable(
        f"another process has died, or cannot be reached ({storage.reason(error)}); run the same command again in all"
    )


def leave(status: int) -> None:
    """Ends the process; at once after an error in one of several, for whom JAX would have it wait at its exit."""
    jax = sys.modules.get("jax")
    if status in (BAD, UNAVAILABLE) and jax is not None and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
