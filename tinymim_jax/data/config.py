"""A data set, and how its records become images."""

import dataclasses
from pathlib import PurePosixPath
from typing import Literal

from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.keys import SEEDS


@dataclasses.dataclass
class Masks:
    """The class of each pixel, in a mask beside each image; 255 in one is of no class, and counts nowhere.

    Images are resized bilinearly and masks to the nearest pixel, both as OpenCV does it, without antialias.
    """

    num_classes: int = ranged(at_least=1, at_most=254)  # behind what the next two fields do
    zero_is_ignored: bool = False  # 0 in files means 255, and other values are one too high (ADE20K)
    ignored: tuple[int, ...] = ranged((), at_least=0, at_most=255)  # other values in files that mean 255
    scale: tuple[int, int] = ranged((2048, 512), at_least=1)  # pixels that longer and shorter sides are to fit into
    ratio: tuple[float, float] = ranged((0.5, 2.0), above=0)  # train: `scale` is multiplied by a number drawn from it
    max_share: float = ranged(0.75, above=0, at_most=1)  # train: of one class; up to 10 crops more are drawn; 1: none
    photometric: bool = True  # train: colours are distorted, on the device
    squash: bool = False  # eval: image_size a side, whatever the aspect was, instead of `scale`
    stride: int | None = ranged(None, at_least=1)  # eval: pixels between windows; None: two thirds of image_size

    def window_stride(self, image_size: int) -> int:
        """Pixels from one sliding window to the next."""
        return self.stride or max(1, int(image_size * 2 / 3))

    def check(self, where: str, image_size: int) -> None:
        """Raises InputError, naming fields by `where`, on values that do not fit together."""
        if self.scale[0] < self.scale[1]:
            raise InputError(f"{where}.scale is {self.scale}; it must be (longer side, shorter side)")
        if self.ratio[0] > self.ratio[1]:
            raise InputError(f"{where}.ratio is {self.ratio}; it must be (low, high)")
        if self.scale[1] * self.ratio[0] < 1:
            raise InputError(f"{where}: scale {self.scale} times ratio {self.ratio[0]} is no pixel; raise either")
        if self.stride is not None and self.stride > image_size:
            raise InputError(f"{where}.stride {self.stride} leaves out pixels; make it at most image_size {image_size}")


UNMASKED = ("digits", "folder")  # sources whose records have no mask


@dataclasses.dataclass
class Data:
    """A data set, read and cropped on the host."""

    source: Literal["digits", "folder", "tfds", "array_record", "pairs", "scenes"]
    # digits, scenes; folder, pairs: a sub-folder ("": all); tfds: a split; array_record: a file prefix
    split: str = "train"
    path: str = ""  # folder, pairs: the tree; array_record: the folder of shards; tfds: data_dir
    name: str = ""  # tfds: the builder's name
    num_examples: int | None = None  # the size, when known before the data is at hand
    per_class: int | None = ranged(None, at_least=1)  # keep only this many images of each class
    subset_seed: int | None = ranged(0, **SEEDS)  # which ones; None: as run.seed, so that replicas differ in them
    val_fraction: float = ranged(0.1, at_least=0, at_most=1)  # folder, pairs: of a tree without splits, by a hash
    val_seed: int = ranged(0, **SEEDS)  # of that hash of each name
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
    masks: Masks | None = None  # of each pixel's class, for tasks that read them; images are then cropped as it says
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
        if self.masks is not None:
            self._check_masks(where)

    def _check_masks(self, where: str) -> None:
        self.masks.check(f"{where}.masks", self.image_size)
        if self.source in UNMASKED:
            raise InputError(
                f"{where}.masks: source {self.source!r} has none; choose pairs, scenes, tfds or array_record"
            )
        unmade = {"rand_augment": "", "corruption": "", "per_class": None}
        for field, default in unmade.items():
            if getattr(self, field) != default:
                raise InputError(f"{where}.{field} is not made of images with masks; set it to {default!r}")
