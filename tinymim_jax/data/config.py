"""A data set, and how its records become images."""

import dataclasses
from pathlib import PurePosixPath
from typing import Literal

from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.keys import SEEDS


@dataclasses.dataclass
class Data:
    """A data set, read and cropped on the host."""

    source: Literal["digits", "folder", "tfds", "array_record"]
    split: str = "train"  # digits; folder: a sub-folder ("": all); tfds: a split; array_record: a file prefix
    path: str = ""  # folder: the tree; array_record: the folder of shards; tfds: data_dir
    name: str = ""  # tfds: the builder's name
    num_examples: int | None = None  # the size, when known before the data is at hand
    per_class: int | None = None  # keep only this many images of each class
    subset_seed: int | None = ranged(0, **SEEDS)  # which ones; None: as run.seed, so that replicas differ in them
    val_fraction: float = ranged(0.1, at_least=0, at_most=1)  # folder: of a tree without splits, by a hash of each name
    val_seed: int = ranged(0, **SEEDS)  # of that hash
    image_size: int = ranged(224, at_least=1)
    transform: Literal["train", "eval"] = "train"  # random-resized-crop and flip | resize and centre crop
    crop_scale: tuple[float, float] = ranged((0.2, 1.0), above=0, at_most=1)  # train: area of the crop
    crop_ratio: tuple[float, float] = ranged((3 / 4, 4 / 3), above=0)  # train: aspect of the crop
    hflip: float = ranged(0.5, at_least=0, at_most=1)  # train: probability
    repeats: int = ranged(1, at_least=1)  # train: each image so often in a row; an epoch has 1 / repeats of the images
    fast_crop: bool = True  # train: JPEGs by libjpeg-turbo, as far and fine as a crop needs; False: PIL's exact pixels
    rand_augment: str = ""  # train: e.g. "rand-m9-mstd0.5-inc1"; "": none
    crop_pct: float = ranged(0.875, above=0, at_most=1)  # eval: the shorter side becomes image_size / crop_pct
    crop_mode: Literal["center", "squash"] = "center"  # eval: the longer side follows | becomes as short; then cropped
    corruption: str = ""  # eval: one of ImageNet-C's, e.g. "gaussian_noise", made on the crop; "": none
    severity: int = ranged(1, at_least=1, at_most=5)  # eval: of the corruption
    corruption_quality: int | None = ranged(None, at_least=1, at_most=95)  # eval: of a JPEG it goes through; None: none
    # PIL's, antialiased; train: bicubic or bilinear
    interpolation: Literal["bicubic", "bilinear", "lanczos", "hamming", "box", "nearest"] = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
    std: tuple[float, float, float] = ranged((0.229, 0.224, 0.225), above=0)
    on_bad_image: Literal["stop", "skip"] = "stop"  # skip: left out of the loss and counted
    resident: bool = False  # train: decoded once into the memory of every device, cropped and flipped there
    threads: int = ranged(2, at_least=1)  # batches read in parallel in each process
    workers: int = ranged(0, at_least=0)  # worker processes; 0: threads only
    prefetch: int = ranged(4, at_least=1)  # batches kept ready

    def title(self) -> str:
        """What it is called, without the folders that are of one machine only."""
        return self.name or PurePosixPath(self.path).name or self.source

    def check(self, where: str) -> None:
        """Raises InputError, naming fields by `where`, on values that do not fit together."""
        for field in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, field)
            if low > high:
                raise InputError(f"{where}.{field} is {(low, high)}; it must be (low, high)")
        if self.transform == "train" and self.interpolation not in ("bicubic", "bilinear"):
            raise InputError(f"{where}.interpolation {self.interpolation!r} is for evaluation; set bicubic or bilinear")
        if self.resident and self.rand_augment:
            raise InputError(f"{where}.rand_augment is made on the host: set it to '', or resident=False")
