"""`FOLDER/<split>.json`: what made a split's ArrayRecord shards, how many records they hold, and their checksums."""

import concurrent.futures
import dataclasses
import json
import os
import re
from typing import Any

from etils.epath import Path

from tinymim_jax.data.config import Data
from tinymim_jax.data.sources import IDENTITY, Source
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.codec import differences, to_dict
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.progress_bar import Bar, bar

FORMAT = 1

Shard = dict[str, Any]  # records, bytes, sha256 and, if images were left out, skipped: what was wrong with each


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the bytes of shards depend on, beside their source."""

    short_side: int | None = None  # pixels, of larger images; None: every image as it is
    quality: int = 95  # of the JPEGs that are made, whose colours are not subsampled
    images_per_shard: int = 4096
    seed: int = 0  # of the order


@dataclasses.dataclass
class Manifest:
    """The contents of the file."""

    split: str
    source: dict[str, Any]  # the fields of `Data` that choose the images
    images: int
    classes: list[str] | None  # names, where they are known; []: there are none
    settings: dict[str, Any]
    num_shards: int
    shards: dict[str, Shard] = dataclasses.field(default_factory=dict)  # the whole ones, by file name
    format: int = FORMAT

    def name(self, shard: int) -> str:
        """The file of shard number `shard`."""
        return f"{self.split}-{shard:05d}-of-{self.num_shards:05d}.array_record"

    def missing(self) -> list[int]:
        """The numbers of shards that are not there yet."""
        return [shard for shard in range(self.num_shards) if self.name(shard) not in self.shards]

    def bar(self, done: int = 0) -> Bar:
        """Counts the images of the split, `done` of which are."""
        return bar(self.split, self.images, "img", initial=done)

    def images_done(self) -> int:
        """Packed or left out."""
        return sum(shard["records"] + len(shard.get("skipped", ())) for shard in self.shards.values())

    def summary(self) -> str:
        """One line: how much, and how much was left out."""
        shards = self.shards.values()
        records, size = (sum(shard[key] for shard in shards) for key in ("records", "bytes"))
        skipped = self.images_done() - records
        left_out = f"; {skipped} that cannot be read left out, listed in {self.split}.json" if skipped else ""
        return f"{self.split}: {records} images in {len(shards)} shards, {size / 1e9:.3f} GB{left_out}"

    def save(self, folder: Path) -> None:
        """Writes the file anew, at one blow."""
        content = dataclasses.asdict(self) | {"shards": dict(sorted(self.shards.items()))}
        partial = folder / f".{self.split}.json.partial"
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, folder / f"{self.split}.json")


def new(data: Data, source: Source, settings: Settings) -> Manifest:
    """Of no shards yet; raises InputError if the split's name cannot be that of files."""
    if not re.fullmatch(r"[\w+-]+", data.split):
        raise InputError(f"split {data.split!r} cannot name files; choose one of letters, digits, _, + and -")
    chosen = {field: value for field, value in to_dict(data).items() if field in IDENTITY}
    identity = {f: value for f, value in chosen.items() if f == "split" or value != getattr(Data, f, None)}
    return Manifest(
        split=data.split,
        source=identity,
        images=len(source),
        classes=None if source.classes is None else list(source.classes),
        settings=to_dict(settings),
        num_shards=-(-len(source) // settings.images_per_shard),
    )


def read(file: Path) -> Manifest:
    """Raises InputError if it is something else."""
    try:
        content = json.loads(file.read_text())
        if content["format"] == FORMAT and isinstance(content["shards"], dict):
            return Manifest(**content)
    except (KeyError, TypeError, ValueError):
        pass
    raise InputError(f"{file}: no manifest of shards that this version prepares; name another folder")


def take_over(folder: Path, manifest: Manifest) -> None:
    """Enters the whole shards of an earlier run; raises InputError if `folder` holds any that are in the way."""
    file = folder / f"{manifest.split}.json"
    if file.exists():
        known = read(file)
        changes = differences(*(dataclasses.asdict(one) | {"shards": None} for one in (known, manifest)))
        if changes:
            raise InputError(
                f"{file}: its shards were made otherwise ({'; '.join(changes)[:300]}); repeat what made them, name"
                " another folder, or delete them and this file"
            )
        for name, shard in known.shards.items():
            path = folder / name
            if path.exists() and os.path.getsize(path) == shard["bytes"]:
                manifest.shards[name] = shard
    own = {manifest.name(shard) for shard in range(manifest.num_shards)}
    for path in storage.children(folder, "*.array_record*"):
        if path.name not in own and overlap(re.sub(r"-\d{5}-of-\d{5}\.array_record$", "", path.name), manifest.split):
            raise InputError(
                f"{path}: would be read along with split {manifest.split!r}, or the other way; name another folder"
            )


def overlap(split: str, other: str) -> bool:
    """Whether `data.split` of one, a prefix of file names, is one of the other's, too."""
    return split.startswith(other) or other.startswith(split)


def verify(folder: Path) -> list[str]:
    """A line for each split of `folder`; raises InputError that names the first shard that is not as it was written."""
    manifests = [read(file) for file in storage.children(folder, "*.json")]
    if not manifests:
        raise InputError(f"{folder}: holds no prepared shards; name the folder that `prepare` wrote")
    for manifest in manifests:
        if manifest.missing():
            raise InputError(
                f"{folder}: {len(manifest.missing())} of the {manifest.num_shards} shards of split"
                f" {manifest.split!r} have not been made; run prepare again"
            )
        with concurrent.futures.ThreadPoolExecutor() as pool, manifest.bar() as shown:
            futures = [pool.submit(_check, folder / name, shard) for name, shard in manifest.shards.items()]
            for future, shard in zip(futures, manifest.shards.values(), strict=True):
                future.result()
                shown.update(shard["records"])
    return [f"{manifest.summary()}: as written" for manifest in manifests]


def _check(file: Path, shard: Shard) -> None:
    if not file.exists() or storage.sha256(file) != shard["sha256"]:
        what = "is not as it was written" if file.exists() else "is missing"
        raise InputError(f"{file}: {what}; delete it and run prepare again, which makes it anew")
