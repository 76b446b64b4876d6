import dataclasses
import math
import os
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import measured
from tinymim_jax.data.sources import open_source
from tinymim_jax.evals.contract import Context
from tinymim_jax.evals.probes import Knn, Logistic, knn_predict, stack
from tinymim_jax.experiment.config import Data
from tinymim_jax.runtime import sharding
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import Outputs

QUERIES = Data("digits", split="test", image_size=8, transform="eval", crop_pct=1.0, per_class=6)
BANK = dataclasses.replace(QUERIES, split="train", per_class=15)
ONE = sharding.make_mesh(devices=jax.devices()[:1])
MATRIX = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)


def predict(variables, frozen, batch):
    """Five random projections of the image: a poor model, so that neighbours disagree."""
    grey = batch["image"][..., 0].reshape(len(batch["image"]), 64).astype(jnp.float32) - 80
    return Outputs(jnp.matmul(grey, variables["w"], precision="highest"))


def features(data):
    """The same by numpy in float64, straight from the records."""
    source = open_source(data)
    grey = np.stack([source[i]["image"][..., 0].ravel() for i in range(len(source))]).astype(np.float64) - 80
    return grey @ MATRIX.astype(np.float64), source.labels()


def vote(query, bank, bank_labels, k, temperature):
    """The class of one query by a plain loop (DINO, eval_knn.py)."""
    cosines = []
    for row in bank:
        dot = sum(a * b for a, b in zip(query, row, strict=True))
        cosines.append(dot / math.sqrt(sum(a * a for a in query)) / math.sqrt(sum(b * b for b in row)))
    nearest = sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]
    votes = {}
    for i in nearest:
        votes[bank_labels[i]] = votes.get(bank_labels[i], 0.0) + math.exp(cosines[i] / temperature)
    return max(votes, key=votes.get)


def evaluate(batch_size=16, queries=QUERIES, bank=BANK, **cfg):
    return measured(Knn(queries, bank, batch_size=batch_size, **cfg).build(Context(ONE, predict)), {"w": MATRIX}, {})


def test_knn_is_that_of_a_plain_loop():
    (queries, labels), (bank, bank_labels) = features(QUERIES), features(BANK)
    scores = set()
    for temperature in (0.07, 0.5):
        expected = {}
        for k in (1, 5, 20, 150):
            hits = sum(vote(q, bank, bank_labels, k, temperature) == y for q, y in zip(queries, labels, strict=True))
            expected[f"top1_k{k}"] = pytest.approx(100 * hits / 60)
            scores.add((k, hits))
        assert evaluate(k=(1, 5, 20, 150), temperature=temperature) == expected
    assert len(scores) > 4 and len({hits for _, hits in scores}) > 2  # k and temperature make a difference here


def test_the_temperature_is_that_of_dino():
    assert (Knn(QUERIES, BANK).temperature, Knn(QUERIES, BANK).k) == (0.07, (10, 20, 100, 200))


def test_the_batch_size_changes_nothing():
    scores = [evaluate(batch_size, k=(5,)) for batch_size in (1000, 7)]
    assert scores[0] == scores[1] and 0 < scores[0]["top1_k5"] < 100


def test_evaluating_twice_gives_the_same():
    evaluator = Knn(QUERIES, BANK, k=(1, 7)).build(Context(ONE, predict))
    assert measured(evaluator, {"w": MATRIX}, {}) == measured(evaluator, {"w": MATRIX}, {})


def test_an_image_is_its_own_neighbour():
    assert evaluate(queries=QUERIES, bank=QUERIES, k=(1,)) == {"top1_k1": 100.0}


def test_a_class_that_the_bank_lacks():
    """Its queries are wrong; the others are judged as usual."""

    def scalar(variables, frozen, batch):
        return Outputs(jnp.ones((len(batch["label"]), 2)))

    evaluator = Knn(QUERIES, dataclasses.replace(BANK, per_class=1), k=(1,)).build(Context(ONE, scalar))
    assert measured(evaluator, {}, {}) == {"top1_k1": 10.0}


def test_more_neighbours_than_the_bank_holds():
    with pytest.raises(InputError, match="knn: k 151 is not among the 150 images of the bank"):
        Knn(QUERIES, BANK, k=(10, 151)).build(Context(ONE, predict))
    Knn(QUERIES, BANK, k=(10, 150)).build(Context(ONE, predict))


def test_features_are_of_unit_length_and_only_of_the_valid():
    evaluator = Knn(QUERIES, BANK, k=(1,), batch_size=16).build(Context(ONE, predict))
    update = jax.jit(evaluator.update)
    found, labels = stack([jax.device_get(update({"w": MATRIX}, {}, {}, batch)) for batch in evaluator.passes["data"]])
    expected, expected_labels = features(QUERIES)
    assert found.shape == (60, 5) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
    np.testing.assert_array_equal(labels, expected_labels)


def unit(*degrees):
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_votes_by_hand():
    """One neighbour at 0 degrees against two at 30: exp(1/T) against 2 exp(.866/T), equal at T = 0.193."""
    bank, labels = unit(0, 30, -30, 180), np.array([2, 0, 0, 1])

    def predicted(k, temperature):
        return knn_predict(unit(0), bank, labels, (k,), temperature, 3)[k].tolist()

    assert predicted(3, 0.07) == [2] and predicted(3, 0.18) == [2]
    assert predicted(3, 0.21) == [0] and predicted(3, 10.0) == [0]
    assert predicted(1, 10.0) == [2]
    assert knn_predict(unit(0, 170, 25), bank, labels, (1,), 0.07, 3)[1].tolist() == [2, 1, 0]


def test_a_low_temperature_does_not_overflow():
    """exp(1 / 0.01) is beyond float32; the nearest neighbour still outweighs the others."""
    bank, labels = unit(10, 3, -10), np.array([0, 1, 0])
    assert knn_predict(unit(0), bank, labels, (3,), 0.01, 2)[3].tolist() == [1]
    assert knn_predict(unit(0), bank, labels, (3,), 0.001, 2)[3].tolist() == [1]


TWO_PROCESSES = """
    import sys
    import jax

    jax.distributed.initialize("127.0.0.1:" + sys.argv[1], 2, int(sys.argv[2]))
    from tests.conftest import measured
    from tinymim_jax.evals.contract import Context
    from tinymim_jax.experiment.config import Classification, Data, Knn
    from tinymim_jax.runtime import sharding
    from tinymim_jax.tasks.contract import Outputs

    def predict(variables, frozen, batch):
        return Outputs(batch["image"].reshape(len(batch["image"]), -1) / 255, jax.nn.one_hot(batch["label"], 10))

    data = Data("digits", split="test", image_size=8, transform="eval", crop_pct=1.0, per_class=3)
    context = Context(sharding.make_mesh(), predict)
    for cfg in (Classification(data, batch_size=8), Knn(data, data, k=(1,), batch_size=8)):
        # In one piece: Gloo prints to the same stream.
        sys.stdout.write("\\nRESULT " + str(measured(cfg.build(context), {}, {})) + "\\n")
        sys.stdout.flush()
"""


@pytest.mark.slow
def test_in_two_processes_each_reads_its_own_rows_and_both_know_the_result():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(TWO_PROCESSES), port]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    running = [subprocess.Popen([*command, str(i)], **pipes) for i in range(2)]
    try:
        ended = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    for out, err in ended:
        assert [line for line in out.splitlines() if line.startswith("RESULT")] == [
            "RESULT {'top1': 100.0, 'top5': 100.0, 'images': 30.0}",
            "RESULT {'top1_k1': 100.0}",
        ], err[-1500:]


def test_logistic_regression_is_scikit_learn_s_on_standardised_unit_features():
    from sklearn.linear_model import LogisticRegression

    (queries, labels), (bank, bank_labels) = features(QUERIES), features(BANK)
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    mean, std = bank.mean(axis=0), bank.std(axis=0)
    model = LogisticRegression(C=0.5, max_iter=1000).fit((bank - mean) / std, bank_labels)
    expected = 100 * (model.predict((queries - mean) / std) == labels).mean()
    evaluator = Logistic(QUERIES, BANK, c=0.5).build(Context(ONE, predict))
    found = measured(evaluator, {"w": MATRIX}, {})["top1"]
    assert found == pytest.approx(expected, abs=2) and 20 < found < 100
