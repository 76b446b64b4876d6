import json

import pytest

from tests.conftest import measured
from tinymim_jax import chain as chain_lib
from tinymim_jax import evaluate
from tinymim_jax.config import InputError
from tinymim_jax.evaluate import Sets


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    from tests.conftest import tiny_classify, tiny_distill, tiny_mae
    from tinymim_jax.config import Config

    folder = tmp_path_factory.mktemp("evaluate")
    stages = {"mae": tiny_mae(), "distill": tiny_distill(), "finetune": tiny_classify()}
    chain_lib.run_chain(Config("tiny", stages), folder)
    return folder


def test_the_clean_score_is_the_stage_s_own(workdir, mesh):
    report = evaluate.evaluate(workdir / "finetune", "imagenet", Sets(), mesh)
    own = json.loads((workdir / "finetune" / "DONE").read_text())["metrics"]
    assert report["results"]["imagenet/top1"] == own["val/top1"]
    assert report["results"]["imagenet/images"] == 40


@pytest.mark.parametrize("name", ["mae", "distill"])
def test_a_model_without_a_head_is_probed(workdir, mesh, name):
    report = evaluate.evaluate(workdir / name, "all", Sets(), mesh)
    assert set(report["results"]) == {"knn/top1_k10", "knn/top1_k20", "logistic/top1"}
    assert 0 <= report["results"]["logistic/top1"] <= 100


def test_probes_see_the_features_of_the_online_evaluator(workdir, mesh):
    own = json.loads((workdir / "mae" / "DONE").read_text())["metrics"]["knn/top1_k3"]
    clean, bank = evaluate.data_sets(workdir / "mae", evaluate.handoff.read_model(workdir / "mae"), Sets())
    knn = evaluate.make_evaluator(evaluate.Knn(clean, bank, k=(3,)), mesh)
    model = evaluate.handoff.read_model(workdir / "mae")
    predict = evaluate.make_predict(workdir / "mae", model, clean, mesh)
    assert measured(knn, predict, evaluate.handoff.read_variables(workdir / "mae"), {})["top1_k3"] == own


@pytest.mark.parametrize("suite", ["imagenet", "robust"])
def test_a_head_is_needed(workdir, mesh, suite):
    with pytest.raises(InputError, match=f"--suite={suite} needs a model with a head"):
        evaluate.evaluate(workdir / "distill", suite, Sets(), mesh)


def test_an_unknown_suite(workdir, mesh):
    with pytest.raises(InputError, match="--suite=x: unknown; choose one of imagenet, robust, probe, all"):
        evaluate.evaluate(workdir / "finetune", "x", Sets(), mesh)


def test_the_table_has_the_paper_beside_it(tmp_path):
    results = {"imagenet/top1": 75.0, "imagenet/images": 50000.0, "corruptions/fog_1": 3.0, "corruptions/fog": 4.0}
    report = {"checkpoint": "x", "model": {}, "results": results, "paper": evaluate.PAPER[192]}
    table = evaluate.table(report)
    assert "| imagenet/top1 | 75.00 | 75.8 |" in table and "| corruptions/fog | 4.00 |  |" in table
    assert "fog_1" not in table and "images" not in table
    assert [p.name for p in evaluate.write(report, tmp_path / "out")] == ["eval.json", "eval.md"]
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == report
