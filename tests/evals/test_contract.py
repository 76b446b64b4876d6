import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tinymim_jax.evals.contract import Batches, make_predict, together
from tinymim_jax.experiment.config import Data
from tinymim_jax.runtime import sharding
from tinymim_jax.runtime.errors import InputError, Unavailable
from tinymim_jax.tasks.contract import Outputs

DIGITS = Data("digits", split="test", image_size=8, transform="eval", crop_pct=1.0, per_class=3)
ONE = sharding.make_mesh(devices=jax.devices()[:1])


def rows(batches):
    host = [jax.device_get(batch) for batch in batches]
    return {key: np.concatenate([batch[key] for batch in host]) for key in host[0]}


@pytest.mark.parametrize("batch_size", [1, 7, 30, 64])
def test_each_example_once(batch_size):
    batches = Batches(DIGITS, batch_size, ONE)
    found = rows(batches)
    assert len(found["label"]) == -(-30 // batch_size) * batch_size
    assert found["is_valid"].sum() == 30
    np.testing.assert_array_equal(found["index"][found["is_valid"]], np.arange(30))
    np.testing.assert_array_equal(np.bincount(found["label"][found["is_valid"]]), [3] * 10)


def test_again_and_again():
    batches = Batches(DIGITS, 8, ONE)
    first, second = rows(batches), rows(batches)
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


def test_a_batch_is_rounded_up_to_the_devices():
    sizes = [Batches(DIGITS, n, types.SimpleNamespace(size=4)).args["batch_size"] for n in (1, 4, 5, 10, 256)]
    assert sizes == [4, 4, 8, 12, 256]


def test_data_is_opened_at_once():
    with pytest.raises(InputError, match=r"data\.split"):
        Batches(Data("digits", split="typo"), 8, ONE)


def test_an_error_names_its_eval():
    def broken(predict, variables, frozen):
        yield
        raise InputError("3.jpg: cannot be decoded")

    running = together({"knn": broken}, None, {}, {})
    next(running)
    with pytest.raises(InputError, match=r"^eval knn: 3\.jpg: cannot be decoded$"):
        next(running)

    def broken_later(predict, variables, frozen):
        yield
        return lambda: (_ for _ in ()).throw(Unavailable("no votes"))

    running = together({"knn": broken_later}, None, {}, {})
    next(running)
    with pytest.raises(StopIteration) as end:
        next(running)
    with pytest.raises(Unavailable, match="^eval knn: no votes$"):
        end.value.value()


def test_predict_is_the_tasks_compiled_and_whole_everywhere():
    traced = []

    class Doubling:
        def predict(self, variables, frozen, batch):
            traced.append(1)
            return Outputs(batch["x"] * variables["w"] + frozen["b"])

    predict = make_predict(Doubling(), ONE)
    for _ in range(2):
        out = predict({"w": jnp.float32(2)}, {"b": jnp.float32(1)}, sharding.put_batch({"x": np.arange(4.0)}, ONE))
    np.testing.assert_array_equal(out.features, [1, 3, 5, 7])
    assert out.logits is None and len(traced) == 1
    assert out.features.sharding.spec == PartitionSpec() and out.features.is_fully_replicated
