"""`python -m tinymim_jax COMMAND`."""

import importlib
import os
import re
import sys
import traceback

import absl.logging

from tinymim_jax.runtime import storage, streams
from tinymim_jax.runtime.errors import InputError, Unavailable
from tinymim_jax.runtime.preemption import INTERRUPTED, Interrupted

BUG, BAD = 1, 2  # exit status
UNAVAILABLE = 74  # EX_IOERR
CODE = re.compile("[A-Z_]{5,}: ")  # what XLA's errors begin with
# How JAX and its transports speak of another process.
UNREACHED = re.compile(
    "UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|gloo|nccl|connection|peer|heartbeat|coordination|barrier", re.I
)
COMMANDS = {
    "run": "run a chain of stages, or go on with it",
    "plan": "compile a chain for a pod, without the pod: memory, FLOPs, hours",
    "doctor": "what is wrong with this machine or cluster, and the fix",
    "prepare": "pack a data set into shards that are fast to read",
    "bench": "measure speed, as JSON",
    "eval": "measure a finished model: accuracy, robustness, probes",
    "analyze": "look into finished models: similarity of layers, attention, relations, spectra, neighbours",
    "features": "a folder of images -> what a model makes of each, as .npz or .parquet",
    "predict": "a folder of images -> classes and probabilities, as CSV",
    "report": "a run as one page with its curves, tables and pictures",
    "convert": "other people's checkpoint -> ours",
    "inspect": "say what is in a checkpoint, theirs or ours",
    "export": "our checkpoint -> timm, Hugging Face, MAE's .pth or ONNX",
}


def main(argv: list[str]) -> int:
    """Runs one command.

    Returns the exit status: 0, 1 after a bug, with its traceback, 2 on bad input, 74 if the storage or another process
    failed, 130 after Ctrl-C, 75 after SIGTERM: run me again.
    """
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:8} {text}" for name, text in COMMANDS.items()]
        print("\n".join(["usage: python -m tinymim_jax COMMAND ...", "", *lines, "", "COMMAND --help says more."]))
        return 0
    absl.logging.set_verbosity(absl.logging.FATAL)  # orbax logs with tracebacks what we say in a line
    storage.prepare()
    os.environ["JAX_ENABLE_X64"] = "0"  # checkpoints, data and draws are of 32 bits
    try:
        if argv[0] not in COMMANDS:
            raise InputError(f"unknown command {argv[0]!r}; choose one of {', '.join(COMMANDS)}")
        importlib.import_module(f"tinymim_jax.commands.{argv[0]}").main(argv[1:])
    except Interrupted as stop:  # which all processes have agreed on
        print(f"interrupted: {stop}", file=sys.stderr)
        return stop.status
    except KeyboardInterrupt as stop:
        print(f"interrupted: {stop}" if str(stop) else "interrupted", file=sys.stderr)
        return at_once(INTERRUPTED)
    except Exception as error:
        known = storage.blame(error) or of_devices(error) or of_platform(error)
        if known is None:
            traceback.print_exc()
            return at_once(BUG)
        print(f"error: {known}", file=sys.stderr)
        return at_once(UNAVAILABLE if isinstance(known, Unavailable) else BAD)
    return 0


def of_devices(error: Exception) -> InputError | None:
    """What JAX notes of the devices' memory, or of the death of another process; None if `error` is something else."""
    jax = sys.modules.get("jax")
    # The first call of a program raises ValueError.
    if jax is None or not (isinstance(error, jax.errors.JaxRuntimeError) or CODE.match(str(error))):
        return None
    if "RESOURCE_EXHAUSTED" in str(error):
        return InputError(
            f"the devices have too little memory ({storage.reason(error)}); try optim.accum_steps, model.remat=True,"
            " mesh.fsdp or a smaller run.batch_size"
        )
    if not jax.distributed.is_initialized() or not UNREACHED.search(str(error)):
        return None
    return Unavailable(
        f"another process has died, or cannot be reached ({storage.reason(error)}); run the same command again in all"
    )


def of_platform(error: Exception) -> InputError | None:
    """What JAX raises where it cannot start a device; None if `error` is something else."""
    frames = [
        (frame.f_globals["__name__"], frame.f_code.co_name) for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    if ("jax._src.xla_bridge", "backends") not in frames:
        return None
    asked = os.environ.get("JAX_PLATFORMS")
    why = f" ({text})" if (text := " ".join(str(error).split())) else ""
    if asked:
        return InputError(f"JAX_PLATFORMS={asked} names what JAX does not find here{why}; unset it, or set it to cpu")
    return InputError(f"JAX finds no device that it can use{why}; mend its driver or package, or set JAX_PLATFORMS=cpu")


def at_once(status: int) -> int:
    """`status`; but one of several processes ends here, as JAX would have it wait at its exit for the others."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    streams.make_safe()
    sys.exit(main(sys.argv[1:]))
