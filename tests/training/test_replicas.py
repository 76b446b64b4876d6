"""Several seeds of a stage in one program: each ends like the single run with that seed."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

import tinymim_jax
from tests.conftest import TEST, tiny_classify, tiny_distill, tiny_mae
from tests.processes import log
from tinymim_jax.bridge import card
from tinymim_jax.experiment import stage_file
from tinymim_jax.experiment.config import Classification, Compare, Config, Init, Stage
from tinymim_jax.experiment.validate import check
from tinymim_jax.planning import dry_run, estimate
from tinymim_jax.report import curves, pictures, workdir
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.preemption import Interrupted
from tinymim_jax.training import chain, loop
from tinymim_jax.training.loop import run_stage
from tinymim_jax.training.setup import make_setup
from tinymim_jax.weights import checkpoint, handoff
from tinymim_jax.weights.parameters import flatten

REPLICAS = 3


def of(stage: Stage, **run) -> Stage:
    """`stage` in three replicas, seeds 4 to 6."""
    stage.optim.eps = 1e-4  # Adam divides what is rounding alone by its own size
    stage.run = dataclasses.replace(stage.run, steps=3, seed=4, replicas=REPLICAS, **run)
    return stage


def mae() -> Stage:
    return of(tiny_mae())


def distill(**run) -> Stage:
    stage = of(tiny_distill(), **run)
    stage.task.teacher.replica = 1
    return stage


def classify(**run) -> Stage:
    stage = of(tiny_classify("distill"), **run)
    stage.optim.ema = 0.5
    stage.evals = {"val": Classification(TEST, batch_size=16)}
    return stage


def resident() -> Stage:
    """As the digits' fine-tuning: own records, on the device, two steps in a call."""
    stage = mae()
    stage.evals, stage.run.steps, stage.run.steps_per_call = {}, 4, 2
    stage.data = dataclasses.replace(stage.data, resident=True, subset_seed=None, per_class=3)
    stage.run.checkpoint_every = stage.run.log_every = 2
    return stage


# name: stage; the name of a stage is in its keys, so that a single run has the same
STAGES = {
    "mae": mae,
    "distill": distill,
    "distill_shared": functools.partial(distill, data_seed=7),
    "finetune": classify,
    "finetune_shared": functools.partial(classify, data_seed=7),
    "resident": resident,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, mesh):
    """The folder of all stages, made when they are asked for: runs(name) -> folder of the stage."""
    workdir = tmp_path_factory.mktemp("replicas")

    def run(name):
        if not handoff.finished(workdir / name):
            stage = STAGES[name]()
            for init in (init for _, init in stage.inits()):
                run(init.stage)
            run_stage(stage, name, workdir, mesh)
        return workdir / name

    return run


def single(name: str, replica: int, folder, workdir, mesh) -> dict[str, float]:
    """The stage of one seed alone, fed by the same replicas."""
    stage = STAGES[name]()
    seed = stage.run.seed + replica
    stage.run.replicas, stage.run.seed = 1, seed
    for _, init in stage.inits():
        chosen = replica if init.replica is None else init.replica
        init.stage, init.path, init.replica = None, str(folder.parent / init.stage / f"replica_{chosen}"), None
    if stage.data.subset_seed is None:
        stage.data.subset_seed = seed
    return run_stage(stage, name, workdir, mesh)


def that_count(model):
    """The weights but for biases of keys, which softmax cancels: what moves them is rounding."""
    flat = {key: np.asarray(value) for key, value in flatten(model).items()}
    return {key: value[[0, 2]] if key.endswith("/qkv/bias") else value for key, value in flat.items()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "distill")) for name in STAGES]
)
def test_a_replica_ends_like_the_single_run_with_its_seed(name, runs, mesh, tmp_path):
    folder = runs(name)
    seen = []
    for replica in (0, 2):
        alone = single(name, replica, folder, tmp_path / str(replica), mesh)
        own = folder / f"replica_{replica}"
        theirs, ours = (that_count(checkpoint.read_model(f)) for f in (tmp_path / str(replica) / name, own))
        assert theirs.keys() == ours.keys()
        for key, value in theirs.items():
            np.testing.assert_allclose(ours[key], value, rtol=0, atol=1e-5 * np.abs(value).max() + 1e-9, err_msg=key)
        metrics = json.loads((own / "DONE").read_text())["metrics"]
        assert {"loss", "grad_norm", *(key for key in alone if "/" in key)} <= metrics.keys() <= alone.keys()
        assert metrics == {key: pytest.approx(alone[key], rel=1e-4) for key in metrics}
        seen.append(metrics["loss"])
    assert seen[0] != seen[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune", "resident"])
def test_an_interruption_changes_no_bit(name, runs, mesh, tmp_path, stop_at):
    folder = runs(name)
    stage = STAGES[name]()
    if stage.init:
        stage.init.stage, stage.init.path = None, str(folder.parent / "distill")
    stop_at(2)
    with pytest.raises(Interrupted, match=f"step 2 of {stage.run.steps}"):
        run_stage(stage, name, tmp_path, mesh)
    assert handoff.replicas(tmp_path / name) == []
    results = run_stage(stage, name, tmp_path, mesh)
    assert results == json.loads((folder / "DONE").read_text())["metrics"]
    for other in ("", *handoff.replicas(folder)):
        a, b = (checkpoint.read_model(f / name / other) for f in (folder.parent, tmp_path))
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert log(folder) == log(tmp_path / name)


def test_metrics_are_those_of_each_replica_and_their_mean(runs):
    folder = runs("finetune")
    metrics = json.loads((folder / "DONE").read_text())["metrics"]
    for name in ("val/top1", "loss"):
        each = [metrics[f"replica{replica}/{name}"] for replica in range(REPLICAS)]
        assert metrics[name] == pytest.approx(np.mean(each), rel=1e-6)
    lines = log(folder)
    assert {"replica0/loss", "replica2/grad_norm", "lr"} <= lines[0].keys() and "replica0/lr" not in lines[0]
    assert any("replica1/val/top1" in line for line in lines)


def test_the_folder_of_a_replica_is_that_of_a_finished_stage(runs):
    folder = runs("mae")
    _, variables = tinymim_jax.load(folder / "replica_1")
    own, whole = (checkpoint.read_model(f)["params"]["encoder"] for f in (folder / "replica_1", folder))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[1]), own, whole)
    np.testing.assert_array_equal(variables["params"]["cls_token"], own["cls_token"])
    stage = stage_file.read_stage(folder / "replica_1")
    assert (stage.run.replicas, stage.run.seed) == (1, 5)
    assert stage_file.read_untrained(folder / "replica_1") == stage_file.read_untrained(folder)
    with pytest.raises(InputError, match=r"mae has 3 replicas; choose one, e\.g\. .*replica_0"):
        tinymim_jax.load(folder)


def test_a_table_counts_each_replica(runs):
    folder = runs("finetune")
    table = Compare("val/top1", {"three": ("finetune",)})
    cfg = Config("tiny", {"finetune": classify()}, compare={"T": table})
    (row,) = chain.collect(cfg, folder.parent)["compare"]["T"]["rows"].values()
    metrics = json.loads((folder / "DONE").read_text())["metrics"]
    assert row["values"] == [metrics[f"replica{replica}/val/top1"] for replica in range(REPLICAS)]
    assert row["mean"] == pytest.approx(metrics["val/top1"]) and row["stderr"] is not None


def test_replicas_start_from_those_of_their_source(runs, tmp_path):
    """By the name of a stage, and from another workdir; `test_a_replica_ends_like...` says from which of its replicas."""
    folder = runs("distill")
    cfg = Config("tiny", {"mae": mae(), "distill": distill(), "finetune": classify()})
    assert dry_run.describe_chain(check(cfg), folder.parent).count("status: finished") >= 2
    apart = Config("tiny", {"finetune": classify()})
    apart.stages["finetune"].init = dataclasses.replace(classify().init, stage=None, path=str(folder))
    assert "status: would start" in dry_run.describe_chain(check(apart), tmp_path)
    apart.stages["finetune"].run.replicas = 1
    with pytest.raises(InputError, match=r"distill has 3 replicas; choose one"):
        dry_run.describe_chain(check(apart), tmp_path)
    apart.stages["finetune"].init.replica = 2
    assert "status: would start" in dry_run.describe_chain(check(apart), tmp_path)


def test_which_replica_must_be_said_where_they_do_not_pair():
    cfg = Config("tiny", {"mae": mae(), "distill": distill()})
    cfg.stages["distill"].task.teacher.replica = None
    with pytest.raises(InputError, match=r"teacher is a stage of 3 replicas: choose one with .*teacher\.replica"):
        check(cfg)
    cfg.stages["distill"].task.teacher.replica = 3
    with pytest.raises(InputError, match=r"teacher\.replica is 3, and its stage has 3"):
        check(cfg)


def test_a_replica_whose_loss_is_not_finite_stops_the_run(mesh, tmp_path):
    stage = mae()
    stage.optim.lr = 1e38
    with pytest.raises(InputError, match=r"stage mae: the \w+ of replica \d is not finite at step 2"):
        run_stage(stage, "mae", tmp_path, mesh)
    line = json.loads((tmp_path / "mae" / "bad_steps.jsonl").read_text())
    assert len(line["records"]) == REPLICAS * stage.run.batch_size


def test_pictures_are_of_the_first_replica_and_curves_of_all(runs):
    folder = runs("mae")
    assert len(pictures.panels_of(mae(), "mae", folder.parent).rows) == 3
    chart = next(chart for chart in curves.curves([workdir.read(folder.parent)]) if chart.key == "loss_mae")
    assert sorted(line.is_thin for line in chart.series) == [False] + [True] * REPLICAS


@pytest.mark.slow
def test_an_evaluation_of_replicas_that_was_due_when_the_run_was_killed_is_made_up_for(mesh, tmp_path, monkeypatch):
    """Their losses are logged by names with a slash, too, and are no evaluation."""
    stage = of(tiny_mae(), eval_every=2, log_every=1, checkpoint_every=2)

    def killed(*_):
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(loop.Evaluations, "begin", killed)
        run_stage(stage, "mae", tmp_path, mesh)
    run_stage(stage, "mae", tmp_path, mesh)
    assert any("replica2/knn/top1_k3" in line for line in log(tmp_path / "mae") if line["step"] == 2)


@pytest.mark.slow
def test_a_replica_knows_what_it_was_made_from(runs):
    runs("finetune")
    text = card.provenance(runs("finetune") / "replica_1")
    assert [line.split(":")[0].strip() for line in text] == ["- replica_1", "- replica_1", "- replica_1"]
    assert not any(card.GONE in line for line in text)


@pytest.mark.slow
def test_the_step_of_resident_replicas_is_compiled_for_a_plan(mesh):
    stage = resident()
    found = estimate.forecast(make_setup(stage, "resident", {}, 30), mesh)
    assert found["model_flops"] == REPLICAS * stage.run.batch_size * tiny_flops(stage)


def tiny_flops(stage: Stage) -> float:
    return make_setup(stage, "resident", {}, 30).task.flops_per_image()


def test_a_replica_that_is_not_there(runs, tmp_path):
    folder = runs("mae")
    with pytest.raises(InputError, match="has 3 replicas, and so no replica 3"):
        handoff.source_folder(Init(path=str(folder), replica=3), tmp_path)
    with pytest.raises(InputError, match="has no replicas, and so no replica 0"):
        handoff.source_folder(Init(path=str(folder / "replica_1"), replica=0), tmp_path)
