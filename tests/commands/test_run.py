"""`run` as a user types it: what it does, and one line with exit status 2 for each kind of bad input."""

import json
import re
import subprocess
import sys

import pytest

from tests.processes import ROOT, environment
from tinymim_jax.__main__ import main

CONFIG = """
from tests.conftest import tiny_classify, tiny_distill, tiny_mae
from tinymim_jax.experiment.config import Config

def get_config(arg=""):
    return Config("tiny", {"mae": tiny_mae(), "distill": tiny_distill(), "finetune": tiny_classify()})
"""


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    import jax

    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    yield path
    jax.config.update("jax_compilation_cache_dir", None)


def test_a_run_from_start_to_end(config_file, tmp_path, capsys):
    argv = ["run", f"--config={config_file}", "--workdir=work"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "val/top1" in out and "wrote work/report/loss_mae.png" in out
    results = json.loads((tmp_path / "work" / "results.json").read_text())
    assert list(results["stages"]) == ["mae", "distill", "finetune"]
    assert main(argv) == 0
    assert capsys.readouterr().out.count("finished, skipped") == 3
    assert main(["report", "work"]) == 0
    assert "wrote work/report/distill_distill.png" in capsys.readouterr().out


@pytest.mark.slow
def test_a_program_is_compiled_once_and_found_by_the_next_process(tmp_path):
    own = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT")  # of the tests
    env = {name: value for name, value in environment().items() if not name.startswith(own)}
    env["XDG_CACHE_HOME"], steps = str(tmp_path / "cache"), []
    for name in ("first", "second"):
        argv = [
            sys.executable,
            "-m",
            "tinymim_jax",
            "run",
            "--config=configs/digits/chain.py",
            "--stage=mae_t",
            "--try_steps=10",
        ]
        command = [*argv, f"--workdir={tmp_path / name}"]
        subprocess.run(command, env=env, cwd=ROOT, check=True, capture_output=True)
        steps.append([path.name for path in tmp_path.glob("cache/tinymim_jax/*/jit_step*-cache")])
    assert len(steps[0]) == 1 and steps[1] == steps[0]


def test_a_dry_run_touches_nothing_and_names_its_default_workdir(config_file, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert main(["run", f"--config={config_file}", "--dry_run", "--config.stages.mae.run.batch_size=20"]) == 0
    assert "mae: MAE pre-training, 4 steps of 20 images" in capsys.readouterr().out
    assert [p for p in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(p)] == before


def test_a_first_try_is_an_experiment_of_its_own(config_file, tmp_path, capsys):
    argv = ["run", f"--config={config_file}", "--try_steps=2", f"{STAGE}.mae.optim.warmup_epochs=1"]
    assert main([*argv, "--dry_run"]) == 0
    assert capsys.readouterr().out.count(", 2 steps of 8 images") == 3
    assert main([*argv, "--stage=mae"]) == 0
    log = (tmp_path / "runs" / "tiny_try" / "mae" / "metrics.jsonl").read_text()
    assert {json.loads(line)["step"] for line in log.splitlines()} == {1, 2}
    assert main([*argv[:2], "--workdir=runs/tiny_try"]) == 2
    assert "belongs to the experiment 'tiny_try'" in capsys.readouterr().err


def test_an_interruption_says_how_to_go_on(config_file, capsys, stop_at):
    stop_at(1)
    assert main(["run", f"--config={config_file}", "--workdir=work"]) == 130
    assert "interrupted: stage mae stopped at step 1 of 4; run the same command to go on" in capsys.readouterr().err


STAGE = "--config.stages"
BAD = {
    "no config": ([], r"--config=FILE is needed"),
    "no such file": (["--config=nofile.py"], "there is no file nofile.py"),
    "unknown flag": (["{config}", "--wrkdir=x"], "wrkdir"),
    "stray argument": (["{config}", "train"], "unexpected argument 'train'"),
    "unknown field": (["{config}", f"{STAGE}.mae.optim.learning_rate=1"], "there is no 'learning_rate'; choose one of lr"),
    "unknown stage in a field": (["{config}", f"{STAGE}.nope.optim.lr=1"], "there is no 'nope'; choose one of mae"),
    "wrong type": (["{config}", f"{STAGE}.mae.optim.lr=fast"], "'fast' is not a number"),
    "unknown choice": (["{config}", f"{STAGE}.mae.model.dtype=int8"], "choose one of 'float32', 'bfloat16'"),
    "unknown --stage": (["{config}", "--stage=x"], "no such stage; choose one of mae, distill, finetune"),
    "missing stage": (["{config}", "--stage=distill"], "takes weights from work/mae, which has no finished stage: run that stage first"),
    "missing checkpoint": (
        ["{config}", f"{STAGE}.distill.task.teacher.stage=none", f"{STAGE}.distill.task.teacher.path=gone", "--stage=distill"],
        "gone does not exist; run that stage first, or name the folder of a stage",
    ),
    "head mismatch": (
        ["{config}", "--dry_run", f"{STAGE}.distill.model.last_block_heads=3"],
        "the student's block 2 has 3 heads, the teacher's block 2 has 6; give that block of the student 6 (model.last_block_heads)",
    ),
    "width mismatch": (["{config}", "--dry_run", f"{STAGE}.finetune.model.width=24"], "the two models differ in size"),
    "heads do not divide": (["{config}", f"{STAGE}.mae.model.num_heads=5"], "width 24 is not a multiple of num_heads 5"),
    "empty data folder": (
        ["{config}", f"{STAGE}.mae.data.source=folder", f"{STAGE}.mae.data.path=empty", f"{STAGE}.mae.data.per_class=none"],
        "a folder without images",
    ),
    "class without images": (
        ["{config}", f"{STAGE}.mae.data.source=folder", f"{STAGE}.mae.data.path=hollow", f"{STAGE}.mae.data.per_class=none"],
        "a folder without images",
    ),
    "stage for a workdir": (["{config}", "--workdir=stage"], "--workdir=stage is the folder of a stage; give the folder above"),
    "file for a workdir": (["{config}", "--workdir=config.py/x"], "config.py is a file; name a folder"),
    "missing evaluation data": (
        ["{config}", f"{STAGE}.finetune.evals.val.data.source=folder", f"{STAGE}.finetune.evals.val.data.path=gone"],
        "stage finetune: gone: no such folder",
    ),
    "data without a path": (
        ["{config}", f"{STAGE}.mae.data.source=folder", f"{STAGE}.mae.data.per_class=none"], "data.path is empty",
    ),
    "more classes than the head": (["{config}", f"{STAGE}.finetune.model.num_classes=9"], "data has 10 classes"),
    "patch does not divide": (["{config}", f"{STAGE}.mae.model.patch_size=5"], "image_size 16 is not a multiple of patch_size 5"),
    "accumulation does not divide": (["{config}", f"{STAGE}.mae.optim.accum_steps=3"], "not a multiple of accum_steps 3"),
    "batch larger than data": (["{config}", f"{STAGE}.mae.run.batch_size=64"], "batch_size 64 is more than the 40 images"),
    "target block beyond depth": (
        ["{config}", "--dry_run", f"{STAGE}.distill.task.targets.relation.teacher_block=4"],
        "teacher_block 4 is beyond the teacher's 3 blocks",
    ),
    "student block beyond depth": (["{config}", f"{STAGE}.distill.task.targets.relation.student_block=3"], "beyond the student's 2 blocks"),
    "freezes nothing": (["{config}", f"{STAGE}.mae.optim.freeze=('encoder/blok.*',)"], "matches no parameter"),
    "bad RandAugment": (["{config}", f"{STAGE}.mae.data.rand_augment=foo"], "data.rand_augment"),
    "loss is not finite": (["{config}", f"{STAGE}.mae.optim.lr=1e38"], "is not finite at step 2 (its images: work/mae/bad_steps.jsonl); what was saved before is kept"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_status_2(case, config_file, tmp_path, capsys):
    argv, message = BAD[case]
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "hollow" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "stage.json").write_text("{}")
    assert main(["run", "--workdir=work", *[a.replace("{config}", f"--config={config_file}") for a in argv]]) == 2
    err = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line and "img/s" not in line and "s/img" not in line and not line.endswith(": compiling")
    ]
    assert len(err) == 1 and err[0].startswith("error: ") and message in err[0], err
    half_written = [
        p for p in (tmp_path / "work").rglob("*") if p.name in ("DONE", "results.json") or "partial" in p.name
    ]
    assert half_written == []
    if case != "loss is not finite":
        assert not [p for p in (tmp_path / "work").rglob("*") if p.is_file()]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\udcff"])
def test_a_damaged_note_of_whose_folder_it_is(text, config_file, tmp_path, capsys):
    note = tmp_path / "work" / "chain.json"
    note.parent.mkdir()
    note.write_bytes(text.encode(errors="surrogateescape"))
    assert main(["run", "--workdir=work", f"--config={config_file}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "error: work/chain.json is damaged: it does not say whose folder this is; delete it if that is 'tiny', or choose"
        " another --workdir"
    )
    assert list(note.parent.iterdir()) == [note]


def test_a_batch_that_the_devices_do_not_share_equally(config_file):
    import os
    import subprocess
    import sys
    from pathlib import Path

    root = Path(__file__).parent.parent.parent
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=3", "PYTHONPATH": str(root)}
    argv = [sys.executable, "-m", "tinymim_jax", "run", f"--config={config_file}", "--workdir=work"]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "error: stage mae: batch_size 8 is not a multiple of the 3 devices; use 6\n",
    )


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_with_worker_processes(config_file, tmp_path):
    """A terminal sends SIGINT to the whole process group, workers too."""
    import os
    import signal
    import subprocess
    import sys
    import time
    from pathlib import Path

    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent), "PYTHONUNBUFFERED": "1"}
    flags = [f"{STAGE}.mae.run.steps=100000", f"{STAGE}.mae.run.log_every=1", f"{STAGE}.mae.data.workers=1"]
    argv = [sys.executable, "-m", "tinymim_jax", "run", f"--config={config_file}", "--workdir=work", *flags]
    run = subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    log = tmp_path / "work" / "mae" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (log.exists() and log.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(run.pid, signal.SIGINT)
    err = run.communicate(timeout=120)[1].decode()
    assert run.returncode == 130, err
    stopped = re.search(r"interrupted: stage mae stopped at step (\d+) of 100000", err)
    assert stopped and "Traceback" not in err, err
    assert (tmp_path / "work" / "mae" / "checkpoints" / stopped[1]).is_dir()
