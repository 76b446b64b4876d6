import json
import os
import shutil
import signal
import statistics
from pathlib import Path

import pytest

from tinymim_jax.experiment.config import Compare
from tinymim_jax.experiment.validate import check
from tinymim_jax.planning import dry_run
from tinymim_jax.runtime import workdir_lock
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.training import chain as chain_lib
from tinymim_jax.training import loop, progress
from tinymim_jax.weights import checkpoint, handoff


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def finished(chain, tmp_path):
    chain.compare = {"table": Compare("knn/top1_k3", {"a": ("mae",)})}
    return chain, tmp_path, chain_lib.run_chain(check(chain), tmp_path)


def test_a_chain_runs_in_order_and_is_not_run_twice(finished, capsys):
    chain, workdir, results = finished
    assert list(results["stages"]) == ["mae", "distill", "finetune"]
    assert json.loads((workdir / "results.json").read_text()) == results
    assert 0 <= results["stages"]["finetune"]["val/top1"] <= 100
    assert results["compare"]["table"]["rows"]["a"]["values"] == [results["stages"]["mae"]["knn/top1_k3"]]
    before = snapshot(workdir)
    capsys.readouterr()
    assert chain_lib.run_chain(check(chain), workdir) == results
    assert snapshot(workdir) == before
    assert [line for line in capsys.readouterr().out.splitlines() if "finished, skipped" in line] == [
        f"{name}: finished, skipped" for name in results["stages"]
    ]

    # An edited config of a finished stage is refused, with the difference, before anything runs.
    chain.stages["mae"].optim.lr = 5e-4
    for call in (chain_lib.run_chain, dry_run.describe_chain):
        with pytest.raises(InputError, match=r"mae was run with another config \(optim\.lr: 0\.001 -> 0\.0005\)"):
            call(check(chain), workdir)
    assert snapshot(workdir) == before

    # Fields that only change speed may be edited.
    chain.stages["mae"].optim.lr, chain.stages["mae"].run.log_every = 1e-3, 7
    assert chain_lib.run_chain(check(chain), workdir) == results


def test_an_unfinished_stage_takes_the_advice_of_the_error_that_stopped_it(chain, tmp_path):
    chain.stages = {"mae": chain.stages["mae"]}
    chain.stages["mae"].optim.lr = 1e38
    with pytest.raises(InputError, match="lower optim.lr"):
        chain_lib.run_chain(check(chain), tmp_path)
    chain.stages["mae"].optim.lr = 1e-3
    assert chain_lib.run_chain(check(chain), tmp_path)["stages"]["mae"]["loss"] > 0


def test_an_unfinished_stage_with_a_checkpoint_may_change_little(chain, tmp_path, stop_at):
    stop_at(2)
    with pytest.raises(KeyboardInterrupt):
        chain_lib.run_chain(check(chain), tmp_path)
    chain.stages["mae"].optim.weight_decay = 0.1
    with pytest.raises(InputError, match=r"optim\.weight_decay: 0\.05 -> 0\.1"):
        chain_lib.run_chain(check(chain), tmp_path)
    chain.stages["mae"].optim.weight_decay, chain.stages["mae"].data.on_bad_image = 0.05, "skip"
    assert "distill" in chain_lib.run_chain(check(chain), tmp_path)["stages"]


def test_checkpoints_of_nobody_knows_what(chain, tmp_path, stop_at, capsys):
    chain.stages = {"mae": chain.stages["mae"]}
    stop_at(2)
    with pytest.raises(KeyboardInterrupt):
        chain_lib.run_chain(check(chain), tmp_path)
    assert "begins anew" not in capsys.readouterr().out
    (tmp_path / "mae" / "stage.json").rename(tmp_path / "kept.json")
    with pytest.raises(InputError, match="mae has lost its stage.json"):
        chain_lib.run_chain(check(chain), tmp_path)
    (tmp_path / "kept.json").rename(tmp_path / "mae" / "stage.json")
    shutil.rmtree(tmp_path / "mae" / "checkpoints")
    assert chain_lib.run_chain(check(chain), tmp_path)["stages"]["mae"]["loss"] > 0
    assert "there is no checkpoint from before: begins anew" in capsys.readouterr().out


def test_a_mistake_in_a_later_stage_is_found_before_the_first_runs(chain, tmp_path):
    chain.stages["distill"].task.teacher.block = 9
    with pytest.raises(InputError, match="stage distill: task.teacher.block 9 is beyond the teacher's 3 blocks"):
        chain_lib.run_chain(check(chain), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_one_stage_needs_its_sources(chain, tmp_path):
    with pytest.raises(InputError, match="stage distill: takes weights from .*mae, which has no finished stage"):
        chain_lib.run_chain(chain, tmp_path, only="distill")
    assert not (tmp_path / "distill").exists()
    results = chain_lib.run_chain(chain, tmp_path, only="mae")
    assert list(results["stages"]) == ["mae"]
    with pytest.raises(InputError, match=r"--stage=x: no such stage; choose one of mae, distill, finetune"):
        chain_lib.run_chain(chain, tmp_path, only="x")


def test_one_stage_is_not_kept_from_running_by_another(chain, tmp_path):
    chain.stages["distill"].task.teacher.block = 9
    chain_lib.run_chain(check(chain), tmp_path, only="mae")
    with pytest.raises(InputError, match="stage distill: task.teacher.block 9"):
        chain_lib.run_chain(check(chain), tmp_path, only="finetune")


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
        chain_lib.run_chain(chain, tmp_path / "work")


def test_a_run_that_has_lost_its_workdir_writes_no_checkpoint(chain, tmp_path, monkeypatch):
    """Suspended for so long that another run has taken over, which the beat has not seen yet."""
    add = progress.Progress.add

    def suspended(self, step, metrics):
        add(self, step, metrics)
        if step == 3:
            owner = {"host": "elsewhere", "pid": 7, "born": "0", "token": "t"}
            (tmp_path / workdir_lock.FILE).write_text(json.dumps(owner))

    monkeypatch.setattr(progress.Progress, "add", suspended)
    with pytest.raises(InputError, match=r"another run \(process 7 on elsewhere\) has taken over .*; this one stops"):
        chain_lib.run_chain(check(chain), tmp_path, "mae")
    assert checkpoint.steps(tmp_path / "mae") == [2] and (tmp_path / workdir_lock.FILE).exists()


def test_a_run_that_loses_its_workdir_while_it_is_evaluated_does_not_finish_the_stage(chain, tmp_path, monkeypatch):
    def measure(*args, measure=loop.measure):
        (tmp_path / workdir_lock.FILE).unlink()
        return measure(*args)

    monkeypatch.setattr(loop, "measure", measure)
    with pytest.raises(InputError, match=r"run.lock is gone: another run has taken over .*; this one stops"):
        chain_lib.run_chain(check(chain), tmp_path, "mae")
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

    monkeypatch.setattr(chain_lib, "check_ready", interrupted)
    with pytest.raises(KeyboardInterrupt, match="before anything ran; run the same command"):
        chain_lib.run_chain(chain, tmp_path)
    assert not (tmp_path / "mae").exists()


def test_ctrl_c_in_the_second_stage_changes_no_result(finished, tmp_path_factory, stop_at):
    chain, _, results = finished
    workdir = tmp_path_factory.mktemp("cut")
    chain_lib.run_chain(chain, workdir, only="mae")
    stop_at(2)
    with pytest.raises(KeyboardInterrupt, match="stage distill stopped at step 2 of 4"):
        chain_lib.run_chain(chain, workdir)
    assert chain_lib.run_chain(chain, workdir) == results


def test_a_teacher_from_another_workdir(chain, tmp_path):
    chain_lib.run_chain(chain, tmp_path / "a", only="mae")
    del chain.stages["mae"], chain.stages["finetune"]
    init = chain.stages["distill"].task.teacher.init
    init.stage, init.path = None, str(tmp_path / "a" / "mae")
    assert "block 2 of 3" in dry_run.describe_chain(chain, tmp_path / "b")
    assert chain_lib.run_chain(chain, tmp_path / "b")["stages"]["distill"]["loss"] > 0
    init.path = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match="nowhere does not exist; run that stage first"):
        chain_lib.run_chain(chain, tmp_path / "c")
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
        chain_lib.run_chain(chain, Path("/proc/gone"))
