import json
import os
import shutil
import signal
import statistics
from pathlib import Path

import pytest

from tests.conftest import tiny_chain
from tinymim_jax.commands.run import run_chain
from tinymim_jax.experiment.config import Compare
from tinymim_jax.experiment.validate import check
from tinymim_jax.planning import dry_run, preflight
from tinymim_jax.runtime import workdir_lock
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.training import chain as chain_lib
from tinymim_jax.training import evaluations, progress
from tinymim_jax.weights import checkpoint, handoff


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def compared(chain):
    chain.compare = {"table": Compare("knn/top1_k3", {"a": ("mae",)})}
    return check(chain)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A workdir and the results of the chain in it; to be read only."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run_chain(compared(tiny_chain()), workdir)


def test_a_chain_runs_in_order_and_is_not_run_twice(chain, whole, capsys):
    (workdir, results), chain = whole, compared(chain)
    assert list(results["stages"]) == ["mae", "distill", "finetune"]
    assert json.loads((workdir / "results.json").read_text()) == results
    assert 0 <= results["stages"]["finetune"]["val/top1"] <= 100
    assert results["compare"]["table"]["rows"]["a"]["values"] == [results["stages"]["mae"]["knn/top1_k3"]]
    before = snapshot(workdir)
    capsys.readouterr()
    assert run_chain(check(chain), workdir) == results
    assert snapshot(workdir) == before
    assert [line for line in capsys.readouterr().out.splitlines() if "finished, skipped" in line] == [
        f"{name}: finished, skipped" for name in results["stages"]
    ]

    # An edited config of a finished stage is refused, with the difference, before anything runs.
    chain.stages["mae"].optim.lr = 5e-4
    for call in (run_chain, dry_run.describe_chain):
        with pytest.raises(InputError, match=r"mae was run with another config \(optim\.lr: 0\.001 -> 0\.0005\)"):
            call(check(chain), workdir)
    assert snapshot(workdir) == before

    # Fields that only change speed may be edited.
    chain.stages["mae"].optim.lr, chain.stages["mae"].run.log_every = 1e-3, 7
    assert run_chain(check(chain), workdir) == results


def test_an_unfinished_stage_takes_the_advice_of_the_error_that_stopped_it(chain, tmp_path):
    chain.stages = {"mae": chain.stages["mae"]}
    chain.stages["mae"].optim.lr = 1e38
    with pytest.raises(InputError, match="lower optim.lr"):
        run_chain(check(chain), tmp_path)
    chain.stages["mae"].optim.lr = 1e-3
    assert run_chain(check(chain), tmp_path)["stages"]["mae"]["loss"] > 0


def test_an_unfinished_stage_with_a_checkpoint_may_change_little(chain, tmp_path, stop_at):
    stop_at(2)
    with pytest.raises(KeyboardInterrupt):
        run_chain(check(chain), tmp_path)
    chain.stages["mae"].optim.weight_decay = 0.1
    with pytest.raises(InputError, match=r"optim\.weight_decay: 0\.05 -> 0\.1"):
        run_chain(check(chain), tmp_path)
    chain.stages["mae"].optim.weight_decay, chain.stages["mae"].data.on_bad_image = 0.05, "skip"
    chain.stages["mae"].evals["knn"].bank.on_bad_image = "skip"
    assert "mae" in run_chain(check(chain), tmp_path, "mae")["stages"]


def test_checkpoints_of_nobody_knows_what(chain, tmp_path, stop_at, capsys):
    chain.stages = {"mae": chain.stages["mae"]}
    stop_at(2)
    with pytest.raises(KeyboardInterrupt):
        run_chain(check(chain), tmp_path)
    assert "begins anew" not in capsys.readouterr().out
    (tmp_path / "mae" / "stage.json").rename(tmp_path / "kept.json")
    with pytest.raises(InputError, match="mae has lost its stage.json"):
        run_chain(check(chain), tmp_path)
    (tmp_path / "kept.json").rename(tmp_path / "mae" / "stage.json")
    shutil.rmtree(tmp_path / "mae" / "checkpoints")
    assert run_chain(check(chain), tmp_path)["stages"]["mae"]["loss"] > 0
    assert "there is no checkpoint from before: begins anew" in capsys.readouterr().out


def test_a_mistake_in_a_later_stage_is_found_before_the_first_runs(chain, tmp_path):
    chain.stages["distill"].task.targets["relation"].teacher_block = 9
    with pytest.raises(
        InputError, match="stage distill: task.targets.relation: teacher_block 9 is beyond the teacher's 3 blocks"
    ):
        run_chain(check(chain), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_one_stage_needs_its_sources(chain, tmp_path):
    with pytest.raises(InputError, match="stage distill: takes weights from .*mae, which has no finished stage"):
        run_chain(chain, tmp_path, only="distill")
    assert not (tmp_path / "distill").exists()
    results = run_chain(chain, tmp_path, only="mae")
    assert list(results["stages"]) == ["mae"]
    with pytest.raises(InputError, match=r"--stage=x: no such stage; choose one of mae, distill, finetune"):
        run_chain(chain, tmp_path, only="x")


def test_one_stage_is_not_kept_from_running_by_another(chain, tmp_path):
    chain.stages["distill"].task.targets["relation"].teacher_block = 9
    chain.stages["mae"].run.steps, chain.stages["mae"].evals = 0, {}
    run_chain(check(chain), tmp_path, only="mae")
    with pytest.raises(InputError, match="stage distill: task.targets.relation: teacher_block 9"):
        run_chain(check(chain), tmp_path, only="finetune")


def test_classes_must_have_the_same_names(chain, tmp_path):
    import numpy as np
    from PIL import Image

    for split, classes in (("train", "ab"), ("test", "ac")):
        for name in classes:
            (tmp_path / "tree" / split / name).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "tree" / split / name / f"{i}.png")
    stage = chain.stages["mae"]
    for data in (stage.data, stage.evals["knn"].data, stage.evals["knn"].bank):
        data.source, data.path = "folder", str(tmp_path / "tree")
    with pytest.raises(
        InputError, match=r"stage mae: data: .*tree/train and .*tree/test differ in their classes \(b\)"
    ):
        run_chain(chain, tmp_path / "work")


def test_a_run_that_has_lost_its_workdir_writes_no_checkpoint(chain, tmp_path, monkeypatch):
    """Suspended for so long that another run has taken over, which the beat has not seen yet."""
    add = progress.Progress.add

    def suspended(self, step, metrics, waited):
        add(self, step, metrics, waited)
        if step == 3:
            owner = {"host": "elsewhere", "pid": 7, "born": "0", "token": "t"}
            (tmp_path / workdir_lock.FILE).write_text(json.dumps(owner))

    monkeypatch.setattr(progress.Progress, "add", suspended)
    with pytest.raises(InputError, match=r"another run \(process 7 on elsewhere\) has taken over .*; this one stops"):
        run_chain(check(chain), tmp_path, "mae")
    assert checkpoint.steps(tmp_path / "mae") == [2] and (tmp_path / workdir_lock.FILE).exists()


def test_a_run_that_loses_its_workdir_while_it_is_evaluated_does_not_finish_the_stage(chain, tmp_path, monkeypatch):
    def run(*args, run=evaluations.Measurement.run):
        (tmp_path / workdir_lock.FILE).unlink()
        return run(*args)

    monkeypatch.setattr(evaluations.Measurement, "run", run)
    with pytest.raises(InputError, match=r"run.lock is gone: another run has taken over .*; this one stops"):
        run_chain(check(chain), tmp_path, "mae")
    assert not handoff.finished(tmp_path / "mae") and not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("content", ["", "xx", "{}", '{"metrics": 3}'])
def test_a_damaged_done(content, chain, tmp_path):
    (tmp_path / "mae").mkdir()
    (tmp_path / "mae" / "DONE").write_text(content)
    with pytest.raises(InputError, match=r"mae/DONE is damaged; delete it, and the stage goes on"):
        chain_lib.collect(check(chain), tmp_path)


def test_ctrl_c_before_the_first_stage(chain, tmp_path, monkeypatch):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(preflight, "check_ready", interrupted)
    with pytest.raises(KeyboardInterrupt, match="before anything ran; run the same command"):
        run_chain(chain, tmp_path)
    assert not (tmp_path / "mae").exists()


def test_ctrl_c_in_the_second_stage_changes_no_result(chain, whole, tmp_path, stop_at):
    (workdir, results), chain = whole, compared(chain)
    shutil.copytree(workdir / "mae", tmp_path / "mae")
    stop_at(2)
    with pytest.raises(KeyboardInterrupt, match="stage distill stopped at step 2 of 4"):
        run_chain(chain, tmp_path)
    assert run_chain(chain, tmp_path) == results


def test_a_teacher_from_another_workdir(chain, whole, tmp_path):
    del chain.stages["mae"], chain.stages["finetune"]
    init = chain.stages["distill"].task.teacher
    init.stage, init.path = None, str(whole[0] / "mae")
    assert "block 2 of 3" in dry_run.describe_chain(chain, tmp_path / "b")
    alone = run_chain(chain, tmp_path / "b")["stages"]["distill"]
    assert alone == whole[1]["stages"]["distill"]
    init.path = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match="nowhere does not exist; run that stage first"):
        run_chain(chain, tmp_path / "c")
    assert not (tmp_path / "c").exists() or not handoff.finished(tmp_path / "c" / "distill")


def test_a_summary_is_a_mean_and_its_standard_error():
    values = [80.0, 84.0, 88.0]
    assert chain_lib.summary(values) == {
        "mean": 84.0,
        "stderr": pytest.approx(statistics.stdev(values) / 3**0.5),
        "values": values,
    }
    assert chain_lib.summary([1.0])["stderr"] is None


def test_a_workdir_that_cannot_be_written_to(chain):
    with pytest.raises(InputError, match=r"/proc/gone cannot be written to \(.+\); choose another folder"):
        run_chain(chain, Path("/proc/gone"))
