import jax
import numpy as np
import pytest

from tests.conftest import measured
from tinymim_jax.data.corruptions import ALEXNET_ERROR
from tinymim_jax.evals import robustness
from tinymim_jax.evals.contract import Context
from tinymim_jax.evals.robustness import Corruptions
from tinymim_jax.experiment.config import Data
from tinymim_jax.runtime import sharding
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import Outputs

ONE = sharding.make_mesh(devices=jax.devices()[:1])
DIGITS = Data("digits", split="test", image_size=32, transform="eval", crop_pct=1.0, per_class=1)


def test_mce_by_hand():
    """Two corruptions, two severities: means, then the mean of the means, then each over AlexNet's."""
    errors = {("fog", 1): 20.0, ("fog", 5): 60.0, ("frost", 1): 50.0, ("frost", 5): 70.0}
    summary = robustness.summarise(errors)
    assert (summary["fog"], summary["frost"], summary["mean_error"]) == (40.0, 60.0, 50.0)
    assert summary["mce"] == pytest.approx((40 / 0.819324 + 60 / 0.826572) / 2)


def test_errors_are_looked_up_by_name():
    errors = {("jpeg_compression", 1): 50.0, ("brightness", 1): 10.0}
    swapped = dict(reversed(errors.items()))
    assert robustness.summarise(errors)["mce"] == pytest.approx(robustness.summarise(swapped)["mce"])


def test_alexnet_has_an_mce_of_100():
    errors = {(name, s): 100 * e for name, e in ALEXNET_ERROR.items() for s in range(1, 6)}
    assert robustness.summarise(errors)["mce"] == pytest.approx(100)


def test_made_corruptions_are_counted_over_all_images():
    pytest.importorskip("imagecorruptions", reason="corruptions are made by imagecorruptions-imaug, extra [robust]")
    predict = lambda variables, frozen, batch: Outputs(None, jax.nn.one_hot(batch["label"] * 0, 10))  # noqa: E731
    evaluator = Corruptions(DIGITS, severities=(1, 5), batch_size=4).build(Context(ONE, predict))
    results = measured(evaluator, {}, {})
    assert len(results) == 15 * 2 + 15 + 1 and "mce" not in results  # which is of ImageNet's classes
    assert results["mean_error"] == pytest.approx(90) and results["snow_5"] == pytest.approx(
        90
    )  # one class of ten is right


def test_each_corruption_and_severity_is_made():
    cfg = Corruptions(DIGITS)
    found = [robustness.corrupted(cfg, name, severity) for name in ALEXNET_ERROR for severity in cfg.severities]
    assert [(d.corruption, d.severity) for d in found] == [(n, s) for n in ALEXNET_ERROR for s in range(1, 6)]
    assert all(d.source == "digits" and d.split == "test" for d in found)


def stored(root, names=ALEXNET_ERROR, severities=(1, 2)):
    from PIL import Image

    for name in names:
        for severity in severities:
            folder = root / name / str(severity) / "a"
            folder.mkdir(parents=True)
            value = 10 * list(ALEXNET_ERROR).index(name) + severity
            Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(folder / "0.png")
            (folder.parent / "b").mkdir()
            Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).save(folder.parent / "b" / "0.png")
    return Corruptions(
        Data("folder", path=str(root), image_size=8, transform="eval"), stored=True, severities=severities
    )


def test_stored_corruptions_are_read_from_their_folders(tmp_path):
    cfg = stored(tmp_path)
    assert robustness.corrupted(cfg, "fog", 2).crop_pct == 1.0  # they are cropped already

    def predict(variables, frozen, batch):
        """Wrong in class a where the pixels are those of fog at severity 2, and always right in class b."""
        pixel = batch["image"][:, 0, 0, 0].astype(int)
        wrong = pixel == 10 * list(ALEXNET_ERROR).index("fog") + 2
        return Outputs(None, jax.nn.one_hot(jax.numpy.where(pixel == 255, 1, wrong), 2))

    results = measured(cfg.build(Context(ONE, predict)), {}, {})
    assert {name: results[name] for name in ("fog_1", "fog_2", "fog", "frost_2")} == {
        "fog_1": 0.0, "fog_2": 50.0, "fog": 25.0, "frost_2": 0.0
    }  # fmt: skip


def test_missing_corruptions_are_named(tmp_path):
    cfg = stored(tmp_path, names=[n for n in ALEXNET_ERROR if n != "frost"])
    with pytest.raises(InputError, match="there is no frost/1, frost/2; complete the copy of ImageNet-C"):
        cfg.build(Context(ONE, None))


def test_tfds_names_each_corruption():
    cfg = Corruptions(Data("tfds", name="imagenet2012_corrupted", split="validation"), stored=True)
    assert robustness.corrupted(cfg, "glass_blur", 4).name == "imagenet2012_corrupted/glass_blur_4"


def test_mce_is_of_imagenet_s_classes_alone():
    from tinymim_jax.evals import subsets

    wnids = tuple(subsets.imagenet_wnids())
    assert subsets.is_imagenet(wnids, "") and subsets.is_imagenet(None, "imagenet2012_corrupted/fog_1")
    for classes in (wnids[:999], wnids[::-1], tuple(map(str, range(1000))), ("a", "b")):
        assert not subsets.is_imagenet(classes, "imagenet2012")
    assert not subsets.is_imagenet(None, "") and not subsets.is_imagenet(None, "cifar10")
