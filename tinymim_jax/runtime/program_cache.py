"""Where compiled programs are kept, so that the next process finds them."""

import hashlib
import os
from pathlib import Path as LocalPath

import jax
from etils.epath import Path

from tinymim_jax.runtime import storage

MAX_BYTES = 4 * 2**30  # of a user's, beyond which the programs that were not used for longest are removed
MIN_SECONDS = 0.5  # of compiling, from which on a program is kept


def keep(workdir: Path | None = None) -> None:
    """Has JAX keep programs: of one process in the user's cache, of several, or of a bucket's, in WORKDIR/jax_cache.

    A variable JAX_COMPILATION_CACHE_DIR goes before both.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    is_shared = workdir is not None and (jax.process_count() > 1 or "://" in str(workdir))
    own = None if is_shared else of_user()
    if own is None and workdir is None:
        return
    jax.config.update("jax_compilation_cache_max_size", -1 if own is None else MAX_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(own or storage.absolute(workdir / "jax_cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)


def of_user() -> LocalPath | None:
    """A folder for programs of this kind of processor: a home may be that of several machines. None: it has no room."""
    processor = LocalPath("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    kind = hashlib.sha256(flags.encode()).hexdigest()[:8]
    try:
        root = LocalPath(os.environ.get("XDG_CACHE_HOME") or LocalPath.home() / ".cache")
        folder = root / "tinymim_jax" / kind
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # read-only, or there is no home
        return None
    return folder if os.access(folder, os.W_OK) else None
