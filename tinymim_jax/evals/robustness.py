"""ImageNet-C: error under each corruption and severity, its plain mean, and AlexNet-normalised mCE."""

import dataclasses
from collections.abc import Generator

import jax
import numpy as np

from tinymim_jax.data import corruptions
from tinymim_jax.data.corruptions import ALEXNET_ERROR
from tinymim_jax.evals.classification import Classification
from tinymim_jax.evals.contract import Finish, Predict
from tinymim_jax.experiment import config
from tinymim_jax.experiment.config import Data
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import Frozen, Variables


class Corruptions:
    """{"<corruption>" and "<corruption>_<severity>": top-1 error, "mean_error", "mce"}, in percent."""

    def __init__(self, cfg: config.Corruptions, mesh: jax.sharding.Mesh):
        """Raises InputError if stored corruptions are missing, or the library that makes them is."""
        self.evaluators = {}
        if cfg.stored:
            check_stored(cfg)
        for name in ALEXNET_ERROR:
            for severity in cfg.severities:
                data = corrupted(cfg, name, severity)
                self.evaluators[name, severity] = Classification(
                    config.Classification(data, batch_size=cfg.batch_size), mesh
                )

    @property
    def num_batches(self) -> int:
        return sum(evaluator.num_batches for evaluator in self.evaluators.values())

    def __call__(self, predict: Predict, variables: Variables, frozen: Frozen) -> Generator[None, None, Finish]:
        """One pass over the data for each corruption and severity."""
        finish = {}
        for key, evaluator in self.evaluators.items():
            finish[key] = yield from evaluator(predict, variables, frozen)
        return lambda: summarise({key: 100 - finish[key]()["top1"] for key in finish})


def corrupted(cfg: config.Corruptions, name: str, severity: int) -> Data:
    """The data of one corruption and severity: stored, or made from the clean images."""
    if not cfg.stored:
        corruptions.check(name)
        return dataclasses.replace(cfg.data, corruption=name, severity=severity)
    # The stored images are cropped already (robustness, ImageNet-C/test.py).
    if cfg.data.source == "tfds":
        return dataclasses.replace(cfg.data, name=f"{cfg.data.name}/{name}_{severity}", crop_pct=1.0)
    return dataclasses.replace(cfg.data, path=f"{cfg.data.path}/{name}", split=str(severity), crop_pct=1.0)


def check_stored(cfg: config.Corruptions) -> None:
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

    mCE is the mean over corruptions of the error over that of AlexNet on ImageNet, in percent: of a model of another
    data set it is a number to compare with nothing but itself.
    """
    names = dict.fromkeys(name for name, _ in errors)
    means = {name: float(np.mean([e for (n, _), e in errors.items() if n == name])) for name in names}
    mce = float(np.mean([error / ALEXNET_ERROR[name] for name, error in means.items()]))
    single = {f"{name}_{severity}": error for (name, severity), error in errors.items()}
    return {**means, "mean_error": float(np.mean(list(means.values()))), "mce": mce, **single}
