"""Where files lie: disks, and buckets that fsspec reaches; what is wrong with them, in one line."""

import contextlib
import errno
import fnmatch
import functools
import hashlib
import logging
import os
import re
import sys
import textwrap
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
from etils.epath import Path

from tinymim_jax.runtime.errors import InputError, Unavailable

EXTRAS = {"gs": "gcs", "s3": "s3"}  # of setup.py
LOGINS = {"gs": "log in: gcloud auth application-default login", "s3": "log in: aws configure"}
LIBRARIES = {"aiohttp", "botocore", "gcsfs", "google", "requests", "s3fs"}  # whose errors are the storage's fault
# Errors that are the fault of a disk, of a mount or of what is behind it.
DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENOTCONN,
    errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ECONNRESET,
)  # fmt: skip
WRAPPED = DISK[:6]  # what is known by its words alone: those of a network may be of another process
APPEARS = 90.0  # seconds until a network's file system shows every host a new file; NFS' caches keep 60
PATIENCE = 20.0  # seconds for a bucket's first answer; the libraries themselves go on for half a minute


@functools.cache
def prepare() -> None:
    """Sets the libraries that reach buckets, once in a process: no old listings, no talk."""
    for scheme in EXTRAS:  # listings would lack what orbax, tensorstore and other processes write
        fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    # Else gcsfs asks over gRPC what kind of bucket each is, and warns at every file if it may not know.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    for name in ("gcsfs", "google.auth", "asyncio"):  # they log with tracebacks what we say in a line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    talk = sys.unraisablehook
    sys.unraisablehook = lambda it: None if _is_left_over(it) else talk(it)


def _is_left_over(unraisable: Any) -> bool:
    """Whether it is of the other reads and writes of a checkpoint, one of which has failed and was heard.

    orbax has closed its event loop, which tensorstore still calls, and drops its coroutines with their own errors.
    """
    code = getattr(unraisable.object, "cr_code", None)
    is_of_orbax = "/orbax/checkpoint/" in getattr(code, "co_filename", "")
    return is_of_orbax or str(unraisable.exc_value) == "Event loop is closed"


def files(path: str | Path) -> fsspec.AbstractFileSystem:
    """The file system of `path`, for what paths cannot do; raises InputError if its package is missing."""
    scheme = _scheme(path)
    try:
        return fsspec.filesystem(scheme or "file", use_listings_cache=False)
    except ImportError as error:
        raise InputError(f"{path}: {error}: pip install 'tinymim_jax[{EXTRAS[scheme]}]'") from None


def path(text: str | Path) -> Path:
    """What a user names; raises InputError if it is in storage of an unknown kind."""
    if re.match(r"[a-z][a-z0-9+.-]*:/", str(text)) and _scheme(text) not in EXTRAS:  # with one slash, a slip
        raise InputError(f"{text}: no such kind of storage; give a folder, gs://BUCKET/... or s3://BUCKET/...")
    return Path(text).expanduser()


def absolute(path: Path) -> Path:
    """What orbax and JAX ask for; unlike `Path.absolute` and `Path.resolve`, it leaves a bucket's path alone."""
    return path if _scheme(path) else Path(os.path.abspath(path))


def make(folder: Path) -> None:
    """Makes a folder and those above it, as far as they lack."""
    if not folder.exists():  # gcsfs would make the bucket anew, too
        folder.mkdir(parents=True, exist_ok=True)


def children(folder: Path, pattern: str = "*") -> list[Path]:
    """What in `folder` has a name like `pattern`, in order; `Path.glob` would take a [ in the folder's name for one."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if fnmatch.fnmatchcase(path.name, pattern))


def sha256(*paths: Path) -> str:
    """Of the files' contents, one behind the other, in hexadecimal."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: total)
    return total.hexdigest()


def wait_for(path: Path, is_seen: Callable[[], bool] | None = None) -> None:
    """Returns once `path`, which the first process has written, is seen here, or `is_seen` says so of its content.

    Raises InputError if it does not appear.
    """
    end, is_said = time.monotonic() + APPEARS, False
    while not (is_seen or path.exists)():
        if not is_said:
            print(f"waiting for up to {APPEARS:.0f} s until {path} is seen here", file=sys.stderr, flush=True)
            is_said = True
        elif time.monotonic() > end:
            raise InputError(
                f"{path}, which the first process has written, is not seen here within {APPEARS:.0f} s; all processes"
                " need one shared --workdir"
            )
        time.sleep(0.2)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Names `path`, if it is on a disk, in the error of a write, where the system leaves that out."""
    try:
        yield
    except OSError as error:
        if not _scheme(path) and error.errno is not None and not error.filename:
            error.filename = str(path)
        raise


def check(path: Path) -> None:
    """Raises InputError if `path` is in a bucket that is not there or does not let us in."""
    if scheme := _scheme(path):
        _check_bucket(scheme, "/".join(str(path).split("/")[:3]))


@functools.cache
def _check_bucket(scheme: str, bucket: str) -> None:
    try:
        is_there = files(bucket).exists(bucket, timeout=PATIENCE)
    except InputError:
        raise
    except TimeoutError:
        raise Unavailable(f"{bucket} does not answer within {PATIENCE:.0f} s; check the network and proxies") from None
    except Exception as error:  # each library has its own
        raise InputError(f"{bucket} cannot be reached ({reason(error)}); {LOGINS[scheme]}") from None
    if not is_there:
        raise InputError(f"there is no bucket {bucket} that you may see; make it, or {LOGINS[scheme]}")


def check_writable(folder: Path) -> None:
    """Makes the folder; raises InputError if nothing can be written to it."""
    check(folder)
    try:
        make(folder)
        probe = folder / f"writable.{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except Exception as error:  # each bucket's library has its own
        if isinstance(error, OSError) and error.errno in DISK:
            raise blame(error) from None
        raise InputError(f"{folder} cannot be written to ({reason(error)}); choose another folder") from None


def check_checkpoints(folder: Path) -> None:
    """Raises InputError if checkpoints cannot be written under `folder`."""
    if odd := re.search(r"[][*?\\\udc80-\udcff]", str(absolute(folder))):
        raise InputError(f"{str(folder)!r}: orbax loses checkpoints in paths with {odd[0]!r}; choose another folder")
    if _scheme(folder) not in ("", "gs"):  # which is what orbax writes
        raise InputError(
            f"{folder}: checkpoints can be written to disks and gs:// only; mount the bucket (mount-s3 mounts those of"
            " s3://) and give that folder"
        )


def check_on_disk(path: Path, what: str) -> None:
    """Raises InputError if `path` is in a bucket, which what is done with `what` does not reach."""
    if _scheme(path):
        raise InputError(f"{path}: {what} must be on a disk; copy it, or mount the bucket (gcsfuse, mount-s3)")


def blame(error: Exception) -> InputError | None:
    """`error` as a fault of the input, of a disk or of a bucket; None if it is something else."""
    if isinstance(error, InputError):
        return error
    number, name = (error.errno, error.filename) if isinstance(error, OSError) else (None, None)
    if number in (errno.EACCES, errno.EPERM) and name:
        return InputError(f"{name}: {error.strerror}; mend its rights, or choose another place")
    if number in DISK:
        what = f"{name}: {error.strerror}" if name else error.strerror
    elif not (what := _said(error)):
        if not _is_of_bucket(error):
            return None
        what = f"the bucket failed ({reason(error)})"
    return Unavailable(f"{what}; make room or mend the storage, and run the same command again: what was saved is kept")


def _is_of_bucket(error: Exception) -> bool:
    passed = {type(error).__module__.split(".")[0]}
    if isinstance(error, OSError):
        passed |= {frame.f_globals["__name__"].split(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)}
    return bool(passed & LIBRARIES)


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Around what reads a record; raises InputError, "NAME: cannot be read ...", Unavailable if it is not at fault."""
    try:
        yield
    except Exception as error:  # each bucket's library, array_record and tfds have their own
        kind = Unavailable if isinstance(blame(error), Unavailable) else InputError
        raise kind(f"{name}: cannot be read ({reason(error)}); mend it") from error


def reason(error: BaseException) -> str:
    """An error in a line; what the disk said, if a library has only wrapped that."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if said := _said(error):
        return said
    if type(error) is Exception and error.__cause__ is not None:  # as orbax raises
        return reason(error.__cause__)
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 160, placeholder=' ...')}".removesuffix(": ")


def _said(error: BaseException) -> str:
    """What a disk has said, in an error that a library (orbax, tensorstore) has made of that; "" if nothing."""
    texts = [str(one) for one in (error, error.__cause__) if one is not None]
    return next((words for words in map(os.strerror, WRAPPED) if any(words in text for text in texts)), "")


def _scheme(path: Any) -> str:
    """Of gs://..., "gs"; of a path on a disk, ""."""
    before, found, _ = str(path).partition("://")
    return before if found else ""
