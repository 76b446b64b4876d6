"""`features`: what a model makes of each image of a folder."""

import io

import numpy as np

from tinymim_jax.commands.flags import FOLDER_FLAGS, new_flags, output, parse_positional
from tinymim_jax.runtime import storage

USAGE = """python -m tinymim_jax features CHECKPOINT FOLDER --out=FILE.npz|.parquet [--block=N] [--pool=cls|mean] ...

  CHECKPOINT  the folder of a finished stage or replica, or a converted checkpoint
  FOLDER      images, in any sub-folders
  --out       `names` in FOLDER and `features` [images, width] in float32: numpy's arrays, or columns (needs pyarrow)
"""


def main(argv: list[str]) -> None:
    """Runs the command with its arguments; raises InputError on bad ones."""
    values = new_flags(
        block=(int, None, "whose output is taken, before any norm (default: the end, or what probes read)"),
        pool=(("cls", "mean"), None, "of the first token, or the mean of the patches (default: what probes read)"),
        **FOLDER_FLAGS,
    )
    checkpoint, folder = parse_positional(values, argv, ["CHECKPOINT", "FOLDER"], USAGE)
    out = output(values.out, FORMATS)

    import tinymim_jax
    from tinymim_jax.runtime.metric_log import write_whole

    encode, model = FORMATS[out.suffix], tinymim_jax.load(checkpoint)
    encode([], np.zeros((0, 1), np.float32))  # what it needs is there
    storage.check_writable(out.parent)
    options = {"batch_size": values.batch_size, "on_bad_image": values.on_bad_image}
    names, features = model.features(folder, values.block, values.pool, **options)
    write_whole(out, encode(names, features))
    print(f"wrote {out}: {len(names)} images, {features.shape[1]} features each")


def npz(names: list[str], features: np.ndarray) -> bytes:
    """A file of numpy's arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, names=np.array(names), features=features)
    return buffer.getvalue()


def parquet(names: list[str], features: np.ndarray) -> bytes:
    """A file of two columns; raises InputError if its package is missing."""
    from tinymim_jax.bridge.files import need

    pyarrow, writer = (need(name, "parquet", "--out=FILE.parquet") for name in ("pyarrow", "pyarrow.parquet"))
    rows = pyarrow.FixedSizeListArray.from_arrays(features.ravel(), features.shape[1])
    text = [name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in names]
    sink = pyarrow.BufferOutputStream()
    writer.write_table(pyarrow.table({"names": text, "features": rows}), sink)
    return sink.getvalue().to_pybytes()


FORMATS = {".npz": npz, ".parquet": parquet}
