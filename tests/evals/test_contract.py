import dataclasses
import types
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import TEST, tiny_chain, tiny_classify
from tinymim_jax import evals
from tinymim_jax.data.device_augment import normalize, to_float
from tinymim_jax.evals.contract import Batches, Context, Eval, Measurement, Result, scalars
from tinymim_jax.experiment import config
from tinymim_jax.experiment.config import Data, Init
from tinymim_jax.planning import preflight
from tinymim_jax.runtime import sharding
from tinymim_jax.runtime.errors import InputError, Unavailable
from tinymim_jax.training.loop import run_stage

DIGITS = Data("digits", split="test", image_size=8, transform="eval", crop_pct=1.0, per_class=3)
ONE = sharding.make_mesh(devices=jax.devices()[:1])


def rows(batches):
    host = [jax.device_get(batch) for batch in batches]
    return {key: np.concatenate([batch[key] for batch in host]) for key in host[0]}


@pytest.mark.parametrize("batch_size", [1, 7, 30, 64])
def test_each_example_once_and_again(batch_size):
    batches = Batches(DIGITS, batch_size, ONE)
    found, again = rows(batches), rows(batches)
    assert len(found["label"]) == len(batches) * batch_size == -(-30 // batch_size) * batch_size
    assert found["is_valid"].sum() == 30
    np.testing.assert_array_equal(found["index"][found["is_valid"]], np.arange(30))
    np.testing.assert_array_equal(np.bincount(found["label"][found["is_valid"]]), [3] * 10)
    for key in found:
        np.testing.assert_array_equal(found[key], again[key])


def test_a_batch_is_rounded_up_to_the_devices():
    sizes = [Batches(DIGITS, n, types.SimpleNamespace(size=4)).args["batch_size"] for n in (1, 4, 5, 10, 256)]
    assert sizes == [4, 4, 8, 12, 256]


def test_data_is_opened_at_once():
    with pytest.raises(InputError, match=r"data\.split"):
        Batches(Data("digits", split="typo"), 8, ONE)


class Sums:
    """Of the labels of two passes, with how often `update` was traced."""

    others = {}  # noqa: RUF012

    def __init__(self):
        self.passes = {
            "few": Batches(DIGITS, 8, ONE),
            "fewer": Batches(dataclasses.replace(DIGITS, per_class=1), 8, ONE),
        }
        self.traced = 0

    def update(self, variables, frozen, others, batch):
        self.traced += 1
        assert isinstance(batch["label"], jax.core.Tracer)
        labels = jnp.where(batch["is_valid"], batch["label"], 0)
        return {"sum": jnp.sum(labels) * variables["w"] + frozen["b"]}

    def finish(self, found):
        assert all(type(one["sum"]) is np.ndarray or np.isscalar(one["sum"]) for one in found["few"])
        each = {name: np.array([one["sum"] for one in batches]) for name, batches in found.items()}
        return Result({name: float(values.sum()) for name, values in each.items()}, each)


def test_update_is_compiled_once_and_its_last_batch_is_padded():
    """30 and 10 images in batches of 8."""
    evaluator = Sums()
    measurement = Measurement({"a": evaluator})
    for weight in (1.0, 2.0):
        results = measurement.run({"w": jnp.float32(weight)}, {"b": jnp.float32(0)}, "sums")()
        assert scalars(results) == {"a/few": 3 * 45 * weight, "a/fewer": 45 * weight}
        assert [len(values) for values in results["a"].arrays.values()] == [4, 2]
    assert evaluator.traced == 1


def test_check_is_called_after_each_batch_and_may_end_it():
    seen = []
    Measurement({"a": Sums(), "b": Sums()}).run({"w": 1}, {"b": 0}, "sums", lambda: seen.append(1))
    assert len(seen) == 2 * (4 + 2)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Measurement({"a": Sums()}).run({"w": 1}, {"b": 0}, "sums", stop)


def test_an_error_names_its_eval():
    broken, later = Sums(), Sums()
    broken.update = lambda *_: (_ for _ in ()).throw(InputError("3.jpg: cannot be decoded"))
    with pytest.raises(InputError, match=r"^eval knn: 3\.jpg: cannot be decoded$"):
        Measurement({"knn": broken}).run({"w": 1}, {"b": 0}, "x")
    later.finish = lambda _: (_ for _ in ()).throw(Unavailable("no votes"))
    finish = Measurement({"knn": later}).run({"w": 1}, {"b": 0}, "x")
    with pytest.raises(Unavailable, match="^eval knn: no votes$"):
        finish()


def test_each_kind_of_the_schema_has_its_evaluator():
    assert set(evals.EVALS) == {kind.kind for kind in config.Eval.__args__}
    context = Context(ONE, lambda *_: None)
    for cfg in (
        config.Classification(DIGITS),
        config.Knn(DIGITS, DIGITS, k=(10,)),
        config.Logistic(DIGITS, DIGITS),
    ):
        evaluator = cfg.build(context)
        assert set(evaluator.passes) == set(cfg.sets())
        assert evals.EVALS[cfg.kind] is type(cfg)


@dataclasses.dataclass
class Distance(Eval):
    """How far features are from those of another checkpoint: an eval that names one, and finds arrays."""

    data: Data
    model: Init
    kind: Literal["distance"] = "distance"
    batch_size: int = 16

    def build(self, context):
        return Distances(self, context)


class Distances:
    def __init__(self, cfg, context):
        self.predict, self.other = context.predict, context.others["model"].model
        self.others = {"model": context.others["model"].variables}
        self.data, self.passes = cfg.data, {"data": Batches(cfg.data, cfg.batch_size, context.mesh)}

    def update(self, variables, frozen, others, batch):
        images = normalize(to_float(batch["image"]), self.data.mean, self.data.std)
        theirs = self.other.outputs(others["model"], images).features
        ours = self.predict(variables, frozen, batch).features
        return jnp.linalg.norm(ours - theirs, axis=1), batch["is_valid"]

    def finish(self, found):
        distances = np.concatenate([values[is_valid] for values, is_valid in found["data"]])
        return Result({"mean": float(distances.mean())}, {"distances": distances})


def test_an_eval_that_names_another_checkpoint(finished, mesh, tmp_path):
    """It is found among the stage's sources, looked at before anything runs, read for it, and its arrays stored."""
    chain = tiny_chain()
    stage = tiny_classify(None)
    stage.run.steps = 0
    stage.evals = {"far": Distance(TEST, Init(path=str(finished / "distill")))}
    assert [(where, init.path) for where, init in stage.inits()] == [("evals.far.model", str(finished / "distill"))]
    chain.stages = {"tuned": stage}
    preflight.check_ready(chain, ["tuned"], tmp_path, mesh)
    results = run_stage(stage, "tuned", tmp_path, mesh)
    with np.load(tmp_path / "tuned" / "evals" / "far.npz") as arrays:
        assert arrays["distances"].shape == (40,) and arrays["distances"].mean() == pytest.approx(results["far/mean"])
    assert results["far/mean"] > 0

    stage.evals["far"].model.path = str(finished / "gone")
    with pytest.raises(InputError, match="stage tuned: takes weights from .*gone, which has no finished stage"):
        preflight.check_ready(chain, ["tuned"], tmp_path, mesh)
