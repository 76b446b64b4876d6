import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import TEST, tiny_distill, tiny_mae
from tests.processes import log
from tinymim_jax.experiment import stage_file
from tinymim_jax.experiment.config import Cka, Init, RelationAgreement
from tinymim_jax.runtime import metric_log
from tinymim_jax.runtime.errors import InputError, Unavailable
from tinymim_jax.runtime.preemption import Interrupted
from tinymim_jax.training import evaluations, loop, start
from tinymim_jax.training import step as step_lib
from tinymim_jax.training.loop import run_stage
from tinymim_jax.weights import checkpoint, handoff


def run_chain_of(chain, workdir, mesh, names):
    return {name: run_stage(chain.stages[name], name, workdir, mesh) for name in names}


def assert_same_tree(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def stage():
    """MAE, with nothing to evaluate."""
    stage = tiny_mae()
    stage.evals = {}
    return stage


STOPS = {"mae": (1, 3), "distill": (2,), "finetune": (3,)}  # of one stage twice; at a step that is saved anyway


@pytest.mark.slow
def test_an_interrupted_chain_ends_like_an_uninterrupted_one(chain, mesh, tmp_path, stop_at):
    chain.stages["finetune"].optim.ema = 0.9
    chain.stages["mae"].run.eval_every = 1
    whole = run_chain_of(chain, tmp_path / "whole", mesh, STOPS)
    for name, stops in STOPS.items():
        for step in stops:
            stop_at(step)
            with pytest.raises(Interrupted, match=f"step {step} of 4"):
                run_stage(chain.stages[name], name, tmp_path / "cut", mesh)
            assert not handoff.finished(tmp_path / "cut" / name)
            assert checkpoint.steps(tmp_path / "cut" / name)[-1] == step
        assert run_stage(chain.stages[name], name, tmp_path / "cut", mesh) == whole[name]
        folders = [tmp_path / side / name for side in ("whole", "cut")]
        assert_same_tree(*[checkpoint.read_model(folder) for folder in folders])
        assert len({(folder / "DONE").read_text() for folder in folders}) == 1
        logs = [log(folder) for folder in folders]
        assert logs[0] == logs[1]


def test_a_stage_writes_what_the_design_says(chain, mesh, tmp_path):
    results = run_stage(chain.stages["mae"], "mae", tmp_path, mesh)
    folder = tmp_path / "mae"
    logs = {"metrics.jsonl", "metrics.csv", "tensorboard"}
    assert {p.name for p in folder.iterdir()} == {"stage.json", "checkpoints", "DONE", *logs}
    assert json.loads((folder / "DONE").read_text()) == {"step": 4, "metrics": results}
    assert stage_file.read_stage(folder) == chain.stages["mae"]
    assert stage_file.read_untrained(folder) == ["encoder/pos_embed", "pretext/decoder/pos_embed"]
    logged = [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "lr" in line]
    assert [line["step"] for line in logged] == [3, 4]
    assert {"loss", "lr", "epoch", "grad_norm", "images_per_s", "data_wait"} <= set(logged[0])
    assert checkpoint.steps(folder) == [2, 4]


def test_own_checkpoint_comes_before_init(chain, mesh, tmp_path, capsys, stop_at, finished):
    stage = chain.stages["finetune"]
    stage.init.stage, stage.init.path = None, str(finished / "distill")
    capsys.readouterr()
    stop_at(2)
    with pytest.raises(Interrupted):
        run_stage(stage, "finetune", tmp_path, mesh)
    assert "init from" in capsys.readouterr().out
    run_stage(stage, "finetune", tmp_path, mesh)
    out = capsys.readouterr().out
    assert "resumed at step 2 of 4" in out and "init from" not in out


def test_a_missing_source_is_an_error_not_scratch(chain, mesh, tmp_path):
    with pytest.raises(InputError, match="distill has no finished stage: run that stage first"):
        run_stage(chain.stages["finetune"], "finetune", tmp_path, mesh)
    assert list(tmp_path.iterdir()) == []


def test_the_teacher_is_rebuilt_from_its_own_folder_and_not_saved(finished, mesh):
    loaded = start.load(tiny_distill(), "distill", finished, mesh)
    teacher = handoff.read_variables(finished / "mae")["params"]["encoder"]
    frozen = loaded.frozen["teacher"]["encoder"]
    assert set(frozen) == {"block1", "block2", "cls_token", "pos_embed", "patch_embed"}
    assert_same_tree(frozen, {key: teacher[key] for key in frozen})
    saved = checkpoint.read_model(finished / "distill")["params"]["encoder"]
    assert saved["patch_embed"]["kernel"].shape[-1] == 12  # the student's


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(stage, mesh, tmp_path, stop_at):
    stop_at(2)
    with pytest.raises(Interrupted):
        run_stage(stage, "mae", tmp_path, mesh)
    good = checkpoint.read_model(tmp_path / "mae")
    stage.run.checkpoint_every = 1
    stage.optim.lr = 1e38
    with pytest.raises(
        InputError, match=r"stage mae: the \w+ is not finite at step 3 .*; what was saved before is kept"
    ):
        run_stage(stage, "mae", tmp_path, mesh)
    assert checkpoint.steps(tmp_path / "mae") == [2]
    assert_same_tree(checkpoint.read_model(tmp_path / "mae"), good)
    assert not handoff.finished(tmp_path / "mae")
    (line,) = map(json.loads, (tmp_path / "mae" / "bad_steps.jsonl").read_text().splitlines())
    assert (line["step"], len(line["records"])) == (3, 8) and line["records"][0].startswith("image ")


def poison(monkeypatch, at):
    """The loss of the steps `at` is not a number."""
    from tinymim_jax.tasks.mae import MaeTask

    loss = MaeTask.loss

    def poisoned(self, params, model_state, frozen, batch, rngs, *, train):
        value, aux = loss(self, params, model_state, frozen, batch, rngs, train=train)
        factor = jnp.where(jnp.isin(batch["index"][0], at), jnp.nan, 1.0)
        metrics = {name: m.replace(sum=m.sum * factor) for name, m in aux.metrics.items()}
        return value * factor, aux.replace(metrics=metrics)

    monkeypatch.setattr(MaeTask, "loss", poisoned)


def test_an_update_that_is_not_finite_is_left_out(stage, mesh, tmp_path, monkeypatch, capfd):
    loaded = start.load(stage, "mae", tmp_path, mesh)
    bad = int(loaded.rows.numbers(1)[1][0])  # the first image of step 2
    target = start.begin(loaded, tmp_path).state
    poison(monkeypatch, jnp.array([bad]))
    stage.run.on_nan, stage.run.checkpoint_every, stage.run.keep, stage.run.log_every = "skip", 1, 4, 1
    results = run_stage(stage, "mae", tmp_path, mesh)
    assert results["skipped"] == 1 and np.isfinite(results["loss"])
    assert "the loss is not finite at step 2 (its images: " in capfd.readouterr().err
    line = json.loads((tmp_path / "mae" / "bad_steps.jsonl").read_text())
    assert line["not_finite"] == "loss" and line["records"][0] == loaded.rows.source.describe(bad)

    def params(step):
        shapes = jax.eval_shape(lambda: target)
        items, _ = checkpoint.restore(tmp_path / "mae", step, step_lib.to_items(shapes))
        assert int(items["optim"]["step"]) == step
        return items["model"]["params"]

    rates = {line["step"]: line["lr"] for line in log(tmp_path / "mae") if "lr" in line}
    expected = {1: 0, 3: 1, 4: 2}  # how many updates were made before
    assert rates == {step: pytest.approx(float(loaded.setup.schedule(count))) for step, count in expected.items()}
    assert_same_tree(params(1), params(2))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), params(2), params(3))
    assert any(jax.tree.leaves(changed))


@pytest.mark.slow
def test_updates_are_left_out_up_to_a_bound(stage, mesh, tmp_path, monkeypatch):
    poison(monkeypatch, jnp.arange(40))
    stage.run.on_nan, stage.run.max_skipped = "skip", 2
    with pytest.raises(InputError, match=r"at step 3 .*, after 2 such updates were left out \(run\.max_skipped\)"):
        run_stage(stage, "mae", tmp_path, mesh)
    assert not handoff.finished(tmp_path / "mae")


@pytest.mark.slow
def test_steps_in_one_call_are_those_one_by_one(chain, mesh, tmp_path, stop_at):
    """Stopped between calls, and with a last call that is short."""
    stage = chain.stages["mae"]
    stage.run.steps, stage.run.log_every, stage.run.eval_every = 5, 2, 2
    one = run_stage(stage, "mae", tmp_path / "one", mesh)
    stage.run.steps_per_call = 2
    whole = run_stage(stage, "mae", tmp_path / "whole", mesh)
    assert whole == {key: pytest.approx(value, rel=1e-4) for key, value in one.items()}
    stop_at(2)
    with pytest.raises(Interrupted, match="step 2 of 5"):
        run_stage(stage, "mae", tmp_path / "cut", mesh)
    assert run_stage(stage, "mae", tmp_path / "cut", mesh) == whole
    logs = [log(tmp_path / side / "mae") for side in ("one", "whole", "cut")]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]] and logs[1] == logs[2]


def damage(folder, step, item="model"):
    """One bit of the largest file of a checkpoint."""
    path = max((folder / checkpoint.FOLDER / str(step) / item).rglob("*"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_passed_over(chain, mesh, tmp_path, stop_at, capsys):
    stage = chain.stages["mae"]
    whole = run_stage(stage, "mae", tmp_path / "whole", mesh)
    stop_at(3)
    with pytest.raises(Interrupted):
        run_stage(stage, "mae", tmp_path / "cut", mesh)
    folder = tmp_path / "cut" / "mae"
    assert checkpoint.steps(folder) == [2, 3]
    damage(folder, 3)
    assert run_stage(stage, "mae", tmp_path / "cut", mesh) == whole
    out = capsys.readouterr().out
    assert "the checkpoint of step 3 is damaged" in out and "resumed at step 2 of 4" in out
    assert_same_tree(*[checkpoint.read_model(tmp_path / side / "mae") for side in ("whole", "cut")])

    damage(folder, 4)  # of a finished stage: whoever reads it says so
    with pytest.raises(InputError, match="mae: the checkpoint of step 4 is damaged"):
        run_stage(chain.stages["distill"], "distill", tmp_path / "cut", mesh)


def test_a_store_that_fails_is_no_damage(stage, mesh, tmp_path, stop_at, monkeypatch):
    stop_at(3)
    with pytest.raises(Interrupted):
        run_stage(stage, "mae", tmp_path, mesh)
    before = checkpoint.steps(tmp_path / "mae")

    def restore(*_, **__):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointHandler, "restore", restore)
    with pytest.raises(Unavailable, match=r"step 3 could not be read \(Stale file handle\); mend the storage"):
        run_stage(stage, "mae", tmp_path, mesh)
    assert checkpoint.steps(tmp_path / "mae") == before


def test_without_a_whole_checkpoint_the_user_decides(stage, mesh, tmp_path, stop_at):
    stop_at(1)
    with pytest.raises(Interrupted):
        run_stage(stage, "mae", tmp_path, mesh)
    damage(tmp_path / "mae", 1)
    with pytest.raises(InputError, match="step 1 is damaged .* there is no older one; delete .*mae to run the stage"):
        run_stage(stage, "mae", tmp_path, mesh)
    assert checkpoint.steps(tmp_path / "mae") == [1]


@pytest.mark.slow
def test_labels_beyond_the_head_stop_the_run(chain, mesh, tmp_path):
    stage = chain.stages["finetune"]
    stage.init, stage.model.num_classes = None, 4
    with pytest.raises(InputError, match=r"step 1 has labels that model\.num_classes leaves no output for"):
        run_stage(stage, "finetune", tmp_path, mesh)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(stage, mesh, tmp_path):
    first = run_stage(stage, "mae", tmp_path / "a", mesh)
    assert run_stage(stage, "mae", tmp_path / "b", mesh) == first
    assert run_stage(stage, "another", tmp_path / "b", mesh)["loss"] != first["loss"]
    stage.run.seed = 1
    assert run_stage(stage, "mae", tmp_path / "c", mesh)["loss"] != first["loss"]


def test_zero_steps_evaluate_the_initial_weights(chain, mesh, tmp_path):
    stage = chain.stages["mae"]
    stage.run.steps = 0
    results = run_stage(stage, "mae", tmp_path, mesh)
    assert set(results) == {"knn/top1_k3"}
    assert handoff.read_variables(tmp_path / "mae")["params"]["encoder"]["cls_token"].shape == (1, 1, 24)


def test_evaluation_during_training(chain, mesh, tmp_path):
    stage = chain.stages["mae"]
    stage.run.eval_every = 2
    run_stage(stage, "mae", tmp_path, mesh)
    lines = [json.loads(line) for line in (tmp_path / "mae" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "knn/top1_k3" in line] == [2, 4]


def test_what_a_finished_stage_has_measured_is_in_its_log_before_it_is_done(chain, mesh, tmp_path, monkeypatch):
    seen = []

    def write_json(path, value):
        if path.name == "DONE":
            seen.extend(log(tmp_path / "mae"))
        metric_log.write_json(path, value)

    monkeypatch.setattr(loop, "write_json", write_json)
    results = run_stage(chain.stages["mae"], "mae", tmp_path, mesh)
    evaluated = {key: value for key, value in results.items() if "/" in key}
    assert evaluated and {"step": 4, **evaluated} in seen


def test_a_resident_data_set_resumes_like_the_uninterrupted_run(stage, mesh, tmp_path, stop_at):
    stage.data.resident = True
    run_stage(stage, "mae", tmp_path / "whole", mesh)
    stop_at(1)
    with pytest.raises(Interrupted, match="step 1 of 4"):
        run_stage(stage, "mae", tmp_path / "cut", mesh)
    run_stage(stage, "mae", tmp_path / "cut", mesh)
    folders = [tmp_path / side / "mae" for side in ("whole", "cut")]
    assert_same_tree(*[checkpoint.read_model(folder) for folder in folders])
    assert log(folders[0]) == log(folders[1])


def test_an_evaluation_that_was_due_when_the_run_was_killed_is_made_up_for(chain, mesh, tmp_path, monkeypatch):
    """Killed right after the checkpoint of a step that is evaluated."""
    stage = chain.stages["mae"]
    stage.run.eval_every = 2
    run_stage(stage, "mae", tmp_path / "whole", mesh)

    def killed(*_):
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(loop.Evaluations, "begin", killed)
        run_stage(stage, "mae", tmp_path / "cut", mesh)
    assert checkpoint.steps(tmp_path / "cut" / "mae") == [2]
    run_stage(stage, "mae", tmp_path / "cut", mesh)
    assert [line["step"] for line in log(tmp_path / "cut" / "mae")] == [2, 3, 4, 4]
    logs = [log(tmp_path / side / "mae") for side in ("whole", "cut")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(("which", "step"), [(0, 2), (1, 4)])
def test_an_evaluation_during_which_a_run_stops_is_made_again(which, step, chain, mesh, tmp_path, monkeypatch):
    """The one of step 2, and that of the end."""
    stage = chain.stages["mae"]
    stage.run.eval_every = 2
    whole = run_stage(stage, "mae", tmp_path / "whole", mesh)
    run, calls = evaluations.Measurement.run, itertools.count()

    def interrupted(self, variables, frozen, title, check):
        if next(calls) == which:
            os.kill(os.getpid(), signal.SIGINT)
        return run(self, variables, frozen, title, check)

    monkeypatch.setattr(evaluations.Measurement, "run", interrupted)
    with pytest.raises(Interrupted, match="stage mae stopped (at step 2 of 4|while it was evaluated)"):
        run_stage(stage, "mae", tmp_path / "cut", mesh)
    assert checkpoint.steps(tmp_path / "cut" / "mae")[-1] == step
    assert not any("/" in name for line in log(tmp_path / "cut" / "mae") if line["step"] == step for name in line)
    assert run_stage(stage, "mae", tmp_path / "cut", mesh) == whole
    assert log(tmp_path / "whole" / "mae") == log(tmp_path / "cut" / "mae")


def test_a_state_that_is_not_finite_is_not_saved_when_a_stop_comes_during_an_evaluation(
    stage, mesh, tmp_path, monkeypatch
):
    """Before the loss is logged; a run that went on from it could only fail again."""
    stage.evals = tiny_mae().evals
    stage.run.eval_every, stage.run.log_every, stage.run.checkpoint_every = 2, 4, 4
    stage.optim.lr = 1e38

    def interrupted(*_):
        raise loop.Stopped

    monkeypatch.setattr(evaluations.Measurement, "run", interrupted)
    with pytest.raises(InputError, match="is not finite at step 2"):
        run_stage(stage, "mae", tmp_path, mesh)
    assert checkpoint.steps(tmp_path / "mae") == []


def test_analyses_read_another_stage_while_one_trains(finished, tmp_path, mesh):
    shutil.copytree(finished / "mae", tmp_path / "mae")
    stage = tiny_distill()
    stage.run.eval_every, teacher = 2, Init("mae")
    relation = RelationAgreement(data=TEST, teacher=teacher, teacher_block=2, student_block=2, images=8)
    stage.evals = {"heads": relation, "likeness": Cka(TEST, other=teacher, images=8)}
    ended = run_stage(stage, "distill", tmp_path, mesh)
    measured = [line for line in log(tmp_path / "distill") if "heads/kl_qk_head6" in line]
    assert [line["step"] for line in measured] == [2, 4]
    assert measured[0]["heads/kl_qk"] != measured[1]["heads/kl_qk"] == ended["heads/kl_qk"]
    with np.load(tmp_path / "distill" / "evals" / "likeness.npz") as arrays:
        assert arrays["cka"].shape == (3, 4)


def test_there_is_one_loop_and_one_place_that_takes_gradients():
    package = Path(loop.__file__).parent.parent
    files = [p for p in sorted(package.rglob("*.py")) if p.parent.name != "bench"]
    found = {
        word: [p.name for p in files if re.search(word, p.read_text())]
        for word in (r"StepTraceAnnotation", r"jax\.(value_and_)?grad\(")
    }
    assert found == {r"StepTraceAnnotation": ["loop.py"], r"jax\.(value_and_)?grad\(": ["step.py"]}


FOUR_DEVICES = """
import sys
from pathlib import Path
import jax
from tests.conftest import TEST, tiny_distill, tiny_mae
from tinymim_jax.runtime import sharding
from tinymim_jax.training import start
from tinymim_jax.training.loop import run_stage

sharding.FSDP_MIN_SIZE = 64
mesh = sharding.make_mesh(data=-1, fsdp=2)
assert mesh.shape == {"data": 2, "fsdp": 2}
stage = tiny_distill()
stage.task.teacher.stage, stage.task.teacher.path = None, sys.argv[2]
stage.optim.accum_steps = 2
run_stage(stage, "distill", Path(sys.argv[1]), mesh)
loaded = start.load(stage, "distill", Path(sys.argv[1]), mesh)
state = start.begin(loaded, Path(sys.argv[1])).state
for tree in (state.params, state.opt_state, loaded.frozen):
    assert any(not x.is_fully_replicated for x in jax.tree.leaves(tree))
"""


@pytest.mark.slow
def test_four_devices_with_split_parameters_train_like_one(mesh, tmp_path, finished):
    stage = tiny_distill()
    stage.task.teacher.stage, stage.task.teacher.path = None, str(finished / "mae")
    stage.optim.accum_steps = 2
    run_stage(stage, "distill", tmp_path / "one", mesh)
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", FOUR_DEVICES, str(tmp_path / "four"), str(finished / "mae")]
    subprocess.run(command, env=env, check=True)
    one, four = [log(tmp_path / side / "distill") for side in ("one", "four")]
    for a, b in zip(one, four, strict=True):
        assert {key: pytest.approx(value, rel=1e-3) for key, value in a.items()} == b
