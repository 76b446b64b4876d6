"""`prepare`: a data set, made ready for training."""

import os

from tinymim_jax.commands.flags import new_flags, parse_positional
from tinymim_jax.experiment.config import Data
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError

USAGE = """python -m tinymim_jax prepare SRC DST [--short_side=N] [--splits=NAME,NAME] ...
python -m tinymim_jax prepare --verify DST

  SRC  an ImageFolder tree (SRC/<split>/<class>/*), pairs:TREE of images and masks, tfds:NAME (as `tfds build`
       prepares it), digits, scenes, or a folder of array_record shards
  DST  a folder, for ArrayRecord shards in shuffled order and <split>.json with their checksums; the whole ones in it
       stay: a run that was stopped or killed goes on
"""

SPLITS = {"tfds": "train,validation", "digits": "train,test", "scenes": "train,test"}  # of other sources, train,val


def main(argv: list[str]) -> None:
    """Runs the command with its arguments; raises InputError on bad ones."""
    values = new_flags(
        short_side=(int, None, "pixels that the shorter side of larger images becomes (default: all stay as they are)"),
        quality=(range(1, 101), 95, "of the JPEGs that this makes; colours are not subsampled"),
        splits=(list, None, "NAME,NAME (default: train,val; tfds: train,validation; digits, scenes: train,test)"),
        data_dir=(str, "", "where tfds has the data (default: ~/tensorflow_datasets)"),
        images_per_shard=(int, 4096, "at most"),
        workers=(int, os.cpu_count() or 1, "processes"),
        on_bad_image=(("stop", "skip"), "stop", "skip: leave out what cannot be read, and list it in <split>.json"),
        verify=(bool, False, "compare the shards in DST with their checksums"),
    )
    only_verify = "--verify" in argv
    *source, folder = parse_positional(values, argv, ["DST"] if only_verify else ["SRC", "DST"], USAGE)

    from tinymim_jax.data import manifest, prepare

    if only_verify:
        print("\n".join(manifest.verify(folder)))
        return
    first = describe(str(source[0]), values.data_dir)
    names = values.splits or SPLITS.get(first["source"], "train,val").split(",")
    settings = manifest.Settings(values.short_side, values.quality, values.images_per_shard)
    splits = [Data(split=name, **first) for name in names]
    prepare.prepare(splits, folder, settings, values.workers, values.on_bad_image)
    print(f"wrote {folder}; train on it with data=array_record:{folder} after a config's colon")


def describe(source: str, data_dir: str) -> dict[str, str]:
    """The fields of `Data` for what a user names; raises InputError if there is no such thing."""
    if source.startswith("tfds:"):
        return {"source": "tfds", "name": source.removeprefix("tfds:"), "path": data_dir}
    if source.startswith("pairs:"):
        return {"source": "pairs", "path": str(storage.absolute(storage.path(source.removeprefix("pairs:"))))}
    path = storage.absolute(storage.path(source))
    if path.is_dir():
        kind = "array_record" if storage.children(path, "*.array_record*") else "folder"
        return {"source": kind, "path": str(path)}
    if source in ("digits", "scenes"):
        return {"source": source}
    raise InputError(
        f"{source}: no such folder; name an ImageFolder tree, pairs:TREE, a folder of shards, or tfds:NAME"
    )
