"""`prepare`: a data set, made ready for training."""

import os

from absl import flags

from tinymim_jax.commands.flags import new_flags, parse_positional
from tinymim_jax.experiment.config import Data
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError

USAGE = """python -m tinymim_jax prepare SRC DST [--short_side=N] [--splits=NAME,NAME] ...
python -m tinymim_jax prepare --verify DST

  SRC                       an ImageFolder tree (SRC/<split>/<class>/*), tfds:NAME (as `tfds build` prepares it),
                            digits, or a folder of array_record shards
  DST                       a folder, for ArrayRecord shards in shuffled order and <split>.json with their checksums;
                            the whole ones in it stay: a run that was stopped or killed goes on
  --short_side=N            make the shorter side of larger images N pixels (default: copy all as they are)
  --quality=Q               of the JPEGs that this makes (default: 95; colours are not subsampled)
  --splits=NAME,NAME        (default: train,val; tfds: train,validation; digits: train,test)
  --data_dir=DIR            where tfds has the data (default: ~/tensorflow_datasets)
  --images_per_shard=N      at most (default: 4096)
  --workers=N               processes (default: one a core)
  --on_bad_image=stop|skip  skip: leave out what cannot be read, and list it in <split>.json (default: stop)
  --verify                  compare the shards in DST with their checksums"""

SPLITS = {"folder": "train,val", "array_record": "train,val", "tfds": "train,validation", "digits": "train,test"}


def main(argv: list[str]) -> None:
    """Runs the command with its arguments; raises InputError on bad ones."""
    values = new_flags(USAGE)
    flags.DEFINE_integer("short_side", None, "pixels", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("quality", 95, "of JPEGs", lower_bound=1, upper_bound=100, flag_values=values)
    flags.DEFINE_list("splits", None, "what to pack", flag_values=values)
    flags.DEFINE_string("data_dir", "", "of tfds", flag_values=values)
    flags.DEFINE_integer("images_per_shard", 4096, "at most", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("workers", os.cpu_count() or 1, "processes", lower_bound=1, flag_values=values)
    flags.DEFINE_enum("on_bad_image", "stop", ["stop", "skip"], "what to do", flag_values=values)
    flags.DEFINE_bool("verify", False, "only compare checksums", flag_values=values)
    only_verify = "--verify" in argv
    *source, folder = parse_positional(values, argv, ["DST"] if only_verify else ["SRC", "DST"])

    from tinymim_jax.data import manifest, prepare

    if only_verify:
        print("\n".join(manifest.verify(folder)))
        return
    first = describe(str(source[0]), values.data_dir)
    names = values.splits or SPLITS[first["source"]].split(",")
    settings = manifest.Settings(values.short_side, values.quality, values.images_per_shard)
    splits = [Data(split=name, **first) for name in names]
    prepare.prepare(splits, folder, settings, values.workers, values.on_bad_image)
    print(f"wrote {folder}; train on it with data=array_record:{folder} after a config's colon")


def describe(source: str, data_dir: str) -> dict[str, str]:
    """The fields of `Data` for what a user names; raises InputError if there is no such thing."""
    if source.startswith("tfds:"):
        return {"source": "tfds", "name": source.removeprefix("tfds:"), "path": data_dir}
    path = storage.absolute(storage.path(source))
    if path.is_dir():
        kind = "array_record" if any(path.glob("*.array_record*")) else "folder"
        return {"source": kind, "path": str(path)}
    if source == "digits":
        return {"source": "digits"}
    raise InputError(f"{source}: no such folder; name an ImageFolder tree, a folder of shards, or tfds:NAME")
