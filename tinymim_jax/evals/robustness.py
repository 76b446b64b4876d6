"""ImageNet-C: error under each corruption and severity, its plain mean, and AlexNet-normalised mCE."""

import dataclasses
import itertools
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import numpy as np

from tinymim_jax.data.config import Data
from tinymim_jax.data.corruptions import ALEXNET_ERROR
from tinymim_jax.evals import subsets
from tinymim_jax.evals.classification import Accuracy, Classification, scores
from tinymim_jax.evals.contract import Batch, Context, Eval, Evaluator, Result, Variables, needs_head
from tinymim_jax.models.contract import Encoder
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError


@dataclasses.dataclass
class Corruptions(Eval):
    """ImageNet-C: error over corruptions and severities, plain and as mCE, in percent."""

    data: Data  # clean images to corrupt, or where the stored ones are (`stored`)
    kind: Literal["corruptions"] = "corruptions"
    stored: bool = False  # folder: data.path/<corruption>/<severity>/<class>/*; tfds: data.name/<corruption>_<severity>
    published: bool = False  # made: resized and stored as ImageNet-C was; False: on the crops of `data`, uncompressed
    severities: tuple[int, ...] = ranged((1, 2, 3, 4, 5), at_least=1, at_most=5)
    batch_size: int = ranged(256, at_least=1)

    def build(self, context: Context) -> "CorruptionErrors":
        return CorruptionErrors(self, context)

    def check(self, where: str, model: Encoder, training: Data) -> None:
        super().check(where, model, training)
        needs_head(where, self.kind, model)
        if not self.severities:
            raise InputError(f"{where}: severities are empty; name some of 1 to 5")

    def opened(self) -> list[Data]:
        return [] if self.stored else [self.data]

    def same_classes(self, training: Data | None) -> list[tuple[Data, Data]]:
        return [] if training is None or self.stored else [(training, self.data)]


class CorruptionErrors(Evaluator):
    """{"<corruption>" and "<corruption>_<severity>": top-1 error, "mean_error"}, in percent; of ImageNet "mce", too."""

    def __init__(self, cfg: Corruptions, context: Context):
        """Raises InputError if stored corruptions are missing, or the library that makes them is."""
        if cfg.stored:
            check_stored(cfg)
        made = {key: corrupted(cfg, *key) for key in itertools.product(ALEXNET_ERROR, cfg.severities)}
        each = {key: Accuracy(Classification(data, batch_size=cfg.batch_size), context) for key, data in made.items()}
        self.passes = {key: accuracy.passes["data"] for key, accuracy in each.items()}
        self.accuracy = next(iter(each.values()))  # of one kind for all
        odd = [key for key, accuracy in each.items() if accuracy.classes != self.accuracy.classes]
        if odd:
            name, severity = odd[0]
            raise InputError(f"{name}, severity {severity}, has other classes than the others; complete the copy")

    def update(self, variables: Variables, frozen: Any, others: Any, batch: Batch) -> dict[str, Any]:
        return self.accuracy.update(variables, frozen, others, batch)

    def finish(self, found: Mapping[Hashable, list[dict[str, Any]]]) -> Result:
        summary = summarise({key: 100 - scores(counts)["top1"] for key, counts in found.items()})
        if not subsets.is_imagenet(self.accuracy.classes, self.accuracy.passes["data"].data.name):
            del summary["mce"]  # AlexNet's errors are of those classes
        return Result(summary)


def corrupted(cfg: Corruptions, name: str, severity: int) -> Data:
    """The data of one corruption and severity: stored, or made from the clean images."""
    if not cfg.stored:
        # robustness, ImageNet-C/create_c/make_imagenet_c.py.
        published = {"interpolation": "bilinear", "crop_pct": 0.875, "corruption_quality": 85} if cfg.published else {}
        return dataclasses.replace(cfg.data, corruption=name, severity=severity, **published)
    # The stored images are cropped already (robustness, ImageNet-C/test.py).
    if cfg.data.source == "tfds":
        return dataclasses.replace(cfg.data, name=f"{cfg.data.name}/{name}_{severity}", crop_pct=1.0)
    return dataclasses.replace(cfg.data, path=f"{cfg.data.path}/{name}", split=str(severity), crop_pct=1.0)


def check_stored(cfg: Corruptions) -> None:
    """Raises InputError naming the folders that are missing."""
    if cfg.data.source != "folder":
        return
    root = storage.path(cfg.data.path)
    missing = [f"{n}/{s}" for n in ALEXNET_ERROR for s in cfg.severities if not (root / n / str(s)).is_dir()]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise InputError(f"{root}: there is no {', '.join(missing[:5])}{more}; complete the copy of ImageNet-C")


def summarise(errors: dict[tuple[str, int], float]) -> dict[str, float]:
    """Errors in percent by (corruption, severity) -> these, each corruption's mean, their mean, and mCE.

    mCE is the mean over corruptions of the error over that of AlexNet on ImageNet, in percent.
    """
    names = dict.fromkeys(name for name, _ in errors)
    means = {name: float(np.mean([e for (n, _), e in errors.items() if n == name])) for name in names}
    mce = float(np.mean([error / ALEXNET_ERROR[name] for name, error in means.items()]))
    single = {f"{name}_{severity}": error for (name, severity), error in errors.items()}
    return {**means, "mean_error": float(np.mean(list(means.values()))), "mce": mce, **single}
