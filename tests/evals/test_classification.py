import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from tests.conftest import measured
from tinymim_jax.evals.classification import Classification, count_correct, per_class, restricted
from tinymim_jax.evals.contract import Context, Measurement
from tinymim_jax.experiment.config import Data
from tinymim_jax.runtime import sharding
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import Outputs

DIGITS = Data("digits", split="test", image_size=8, transform="eval", crop_pct=1.0)
ONE = sharding.make_mesh(devices=jax.devices()[:1])
COUNTS = np.bincount(load_digits().target[1297:1797])  # of each class among the 500


def always(scores):
    """A predict whose logits are the same for every image."""
    scores = jnp.asarray(scores, jnp.float32)

    def predict(variables, frozen, batch):
        n = len(batch["label"])
        return Outputs(jnp.zeros((n, 1)), jnp.broadcast_to(scores, (n, len(scores))))

    return predict


def evaluate(predict, batch_size=64, data=DIGITS):
    return measured(Classification(data, batch_size=batch_size).build(Context(ONE, predict)), {}, {})


@pytest.mark.parametrize("batch_size", [64, 500, 512, 33])
@pytest.mark.parametrize("best", [0, 3])
def test_a_constant_model_scores_the_share_of_its_class(batch_size, best):
    """500 images in batches that do not divide them; what fills up the last one has label 0."""
    order = [best, 9, 8, 7, 6, *(c for c in (0, 1, 2, 3, 4, 5) if c != best)]
    scores = np.zeros(10)
    scores[order] = np.linspace(5, -5, 10)
    assert evaluate(always(scores), batch_size) == {
        "top1": pytest.approx(100 * COUNTS[best] / 500, rel=1e-12),
        "top5": pytest.approx(100 * COUNTS[order[:5]].sum() / 500, rel=1e-12),
        "images": 500.0,
    }


def test_a_perfect_and_an_inverted_model():
    def right(variables, frozen, batch):
        return Outputs(None, jax.nn.one_hot(batch["label"], 10))

    def wrong(variables, frozen, batch):
        return Outputs(None, -jax.nn.one_hot(batch["label"], 10))

    assert evaluate(right) == {"top1": 100.0, "top5": 100.0, "images": 500.0}
    assert evaluate(wrong) == {"top1": 0.0, "top5": 0.0, "images": 500.0}


def test_fewer_than_five_classes(tmp_path):
    """Three classes: the best five are all there are."""
    from PIL import Image

    for name, n in (("a", 4), ("b", 2), ("c", 1)):
        (tmp_path / "val" / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (8, 8)).save(tmp_path / "val" / name / f"{i}.png")
    data = Data("folder", path=str(tmp_path), split="val", image_size=8, transform="eval", crop_pct=1.0)
    scores = evaluate(always([0.0, 2.0, 1.0]), 4, data)
    assert scores == {"top1": pytest.approx(100 * 2 / 7), "top5": 100.0, "images": 7.0}


def test_evaluating_twice_gives_the_same():
    def predict(variables, frozen, batch):
        pixels = batch["image"].reshape(len(batch["image"]), -1).astype(jnp.float32)
        return Outputs(pixels, pixels[:, :10] - variables["w"] + frozen["b"])

    evaluator = Classification(DIGITS, batch_size=96).build(Context(ONE, predict))
    first = measured(evaluator, {"w": 1.0}, {"b": 2.0})
    assert first == measured(evaluator, {"w": 1.0}, {"b": 2.0}) and first["images"] == 500.0


def test_a_model_without_a_head_is_bad_input():
    def predict(variables, frozen, batch):
        return Outputs(jnp.zeros((len(batch["label"]), 3)))

    with pytest.raises(InputError, match=r"needs a model with a head; set model\.num_classes"):
        evaluate(predict)


def test_data_that_is_random_is_bad_input():
    with pytest.raises(InputError, match=r"data\.transform"):
        evaluate(always(range(10)), data=dataclasses.replace(DIGITS, transform="train"))


def test_bad_images_are_not_counted(tmp_path):
    from PIL import Image

    (tmp_path / "val" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "a" / "0.png")
    (tmp_path / "val" / "a" / "1.png").write_bytes(b"not an image")
    data = Data("folder", path=str(tmp_path), split="val", image_size=8, transform="eval", on_bad_image="skip")
    assert evaluate(always([1.0]), 2, data) == {"top1": 100.0, "top5": 100.0, "images": 1.0}


def test_count_correct():
    logits = jnp.array(
        [
            [9, 1, 2, 3, 4, 5, 6],  # best five: 0 6 5 4 3
            [0, 6, 5, 4, 3, 2, 1],  # 1 2 3 4 5
            [0, 1, 2, 3, 4, 5, 6],  # 6 5 4 3 2
            [0, 1, 2, 3, 4, 5, 6],
        ],
        jnp.float32,
    )
    labels, is_valid = jnp.array([0, 5, 1, 6]), jnp.array([True, True, True, False])
    counts = count_correct(logits, labels, is_valid)
    assert [float(x) for x in (counts["top1"].sum, counts["top1"].count)] == [1.0, 3.0]
    assert [float(x) for x in (counts["top5"].sum, counts["top5"].count)] == [2.0, 3.0]


def test_a_subset_is_the_best_of_its_own_columns():
    """The model prefers a class that the subset has not; among the 200, it is right for one label."""
    from tinymim_jax.evals import subsets

    columns = subsets.columns("imagenet_a")
    scores = np.zeros(1000)
    scores[0], scores[columns[7]] = 9.0, 5.0  # 0 is not of ImageNet-A
    found, _ = restricted(jnp.asarray(scores)[None], jnp.zeros(1, int), (columns, None))
    assert int(jnp.argmax(found)) == columns[7] and int(jnp.isfinite(found).sum()) == 200


def test_a_subset_s_labels_are_columns(tmp_path):
    from PIL import Image

    from tinymim_jax.evals import subsets

    wnids, columns = subsets.imagenet_wnids(), subsets.columns("imagenet_a")
    for i in (0, 7):
        folder = tmp_path / "a" / wnids[columns[i]]
        folder.mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "x.png")
    data = Data("folder", path=str(tmp_path), split="a", image_size=8, transform="eval")
    scores = np.zeros(1000)
    scores[0], scores[columns[7]] = 9.0, 5.0
    evaluator = Classification(data, subset="imagenet_a").build(Context(ONE, always(scores)))
    result = measured(evaluator, {}, {})
    assert (result["top1"], result["images"]) == (50.0, 2)


def test_labels_beyond_the_head():
    with pytest.raises(InputError, match="has 10 classes and the model 4; use data with the classes"):
        evaluate(always([1, 2, 3, 4]))


@pytest.mark.parametrize("classes", [0, 7])
def test_accuracy_by_class_and_confusion_are_scikit_learn_s(classes):
    from sklearn.metrics import confusion_matrix, recall_score

    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 5, 200), rng.integers(0, 6, 200)
    pairs = np.stack([labels, predicted])
    pairs[0, ::7] = -1  # of no image
    seen = pairs[0] >= 0
    found = per_class(pairs, classes)
    count = max(classes, 6)
    np.testing.assert_array_equal(
        found["confusion"], confusion_matrix(labels[seen], predicted[seen], labels=range(count))
    )
    recall = recall_score(labels[seen], predicted[seen], labels=range(5), average=None)
    np.testing.assert_allclose(found["per_class"][:5], 100 * recall)
    assert np.isnan(found["per_class"][5:]).all() and len(found["per_class"]) == count
    assert list(per_class(np.array([[0], [1000]]), 0)) == ["per_class"]  # a table of so many classes is too large


def test_arrays_count_each_image_once_and_name_the_classes():
    predict = lambda variables, frozen, batch: Outputs(None, jax.nn.one_hot(batch["label"] // 2, 10))  # noqa: E731
    evaluator = Classification(DIGITS, batch_size=64).build(Context(ONE, predict))
    arrays = Measurement({"x": evaluator}).run({}, {}, "x")()["x"].arrays
    expected = np.zeros((10, 10), int)
    expected[np.arange(10), np.arange(10) // 2] = COUNTS
    np.testing.assert_array_equal(arrays["confusion"], expected)
    np.testing.assert_array_equal(arrays["per_class"], [100.0, *[0.0] * 9])
    assert arrays["classes"].tolist() == list("0123456789")
