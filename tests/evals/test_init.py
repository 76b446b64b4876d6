import types

import jax
import pytest

from tinymim_jax import evals
from tinymim_jax.experiment import config
from tinymim_jax.experiment.config import Data
from tinymim_jax.runtime import sharding

DIGITS = Data("digits", split="test", image_size=8, transform="eval", crop_pct=1.0, per_class=2)
ONE = sharding.make_mesh(devices=jax.devices()[:1])


def test_each_kind_has_its_evaluator():
    assert type(evals.make_evaluator(config.Classification(DIGITS), ONE)) is evals.Classification
    assert type(evals.make_evaluator(config.Knn(DIGITS, DIGITS, k=(10,)), ONE)) is evals.Knn
    assert type(evals.make_evaluator(config.Logistic(DIGITS, DIGITS), ONE)) is evals.Logistic
    assert type(evals.make_evaluator(config.Corruptions(DIGITS), ONE)) is evals.Corruptions


def test_the_table_holds_every_kind_of_the_schema():
    assert set(evals.EVALS) == {kind.kind for kind in config.Eval.__args__}


def test_an_unknown_kind():
    with pytest.raises(
        ValueError, match="unknown eval 'linear'; choose one of classification, knn, logistic, corruptions"
    ):
        evals.make_evaluator(types.SimpleNamespace(kind="linear"), ONE)
