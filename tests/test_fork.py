"""What CONTRIBUTING.md shows: a fork's task, encoder, target and evaluator, each one file and one entry in a dict."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORK = Path(__file__).parent / "fork"
# File, its room, the dict there, and the class.
ADDED = {
    "rotation": ("tasks", "TASKS", "Rotation"),
    "two_widths": ("models", "MODELS", "TwoWidths"),
    "mean_token": ("tasks/targets", "TARGETS", "MeanToken"),
    "feature_norm": ("evals", "EVALS", "FeatureNorm"),
}


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    root = tmp_path_factory.mktemp("fork")
    shutil.copytree(ROOT / "tinymim_jax", root / "tinymim_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name, (room, kinds, cls) in ADDED.items():
        shutil.copy(FORK / f"{name}.py", root / "tinymim_jax" / room / f"{name}.py")
        registry = root / "tinymim_jax" / room / "__init__.py"
        text = registry.read_text()
        assert text.count(f"{kinds} = {{") == 1
        imported = f"from tinymim_jax.{room.replace('/', '.')}.{name} import {cls}\n"
        registry.write_text(imported + text.replace(f"{kinds} = {{", f'{kinds} = {{"{name}": {cls}, '))
    shutil.copy(FORK / "fork_chain.py", root / "fork_chain.py")
    return root


def call(fork, *arguments, status=0):
    env = {**os.environ, "PYTHONPATH": str(fork), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tinymim_jax", *arguments]
    done = subprocess.run(command, cwd=fork, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def ran(fork):
    said = call(fork, "run", "--config=fork_chain.py", "--workdir=w")
    return fork, said


@pytest.mark.slow
def test_it_trains_hands_over_and_draws(ran):
    fork, said = ran
    for stage in ("rotation", "finetuned", "labelled", "small", "head"):
        assert json.loads((fork / "w" / stage / "DONE").read_text())["step"] == 4
    assert "skipped: encoder/norm, pretext" in said
    assert (fork / "w" / "report" / "rotation_rotation.png").is_file()
    assert (fork / "w" / "report" / "small_distill.png").is_file()
    metrics = json.loads((fork / "w" / "rotation" / "DONE").read_text())["metrics"]
    assert {"accuracy", "knn/top1_k3"} <= set(metrics)
    metrics = json.loads((fork / "w" / "small" / "DONE").read_text())["metrics"]
    assert metrics["mean_smooth_l1"] > 0 and metrics["norm/norm"] > 0


@pytest.mark.slow
def test_it_goes_on(ran):
    fork, _ = ran
    folder = fork / "w" / "rotation"
    before = (folder / "DONE").read_text()
    (folder / "DONE").unlink()
    shutil.rmtree(folder / "checkpoints" / "4")
    assert "resumed at step 2 of 4" in call(fork, "run", "--config=fork_chain.py", "--workdir=w", "--stage=rotation")
    assert json.loads((folder / "DONE").read_text()) == json.loads(before)


@pytest.mark.slow
def test_it_is_inspected_exported_and_measured(ran):
    fork, _ = ran
    assert "rotation prediction" in call(fork, "inspect", "w/finetuned")
    assert "rotation prediction" in call(fork, "inspect", "w/rotation")
    small = call(fork, "inspect", "w/small")
    assert "TwoWidths, 4 blocks of width 8 and 16" in small and "block 3" in small
    for form in ("timm", "hf"):
        call(fork, "export", "w/finetuned", f"out_{form}", f"--format={form}")
        assert "rotation prediction" in (fork / f"out_{form}" / "README.md").read_text()
    call(fork, "export", "w/rotation", "out_rotation", "--format=timm")
    said = call(fork, "export", "w/head", "out_head", "--format=timm", status=2)
    assert said.startswith("error: ") and "two_widths" in said and len(said.splitlines()) == 1
    assert json.loads((fork / "w" / "results.json").read_text())["stages"].keys() >= {"head"}
    call(fork, "eval", "w/head", "--suite=probe", "--out=e")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["rotation", "small", "head"])
def test_its_steps_are_benchmarked(ran, stage):
    fork, _ = ran
    said = call(fork, "bench", "step", "--config=fork_chain.py", f"--stage={stage}", "--rounds=1")
    found, _ = json.JSONDecoder().raw_decode(said[said.index("{") :])
    assert found["model_flops"] > 0 and found["images_per_s"] > 0


def test_an_encoder_that_cannot_be_masked_is_refused(fork):
    (fork / "masked.py").write_text(
        (FORK / "fork_chain.py").read_text()
        + "\n\ndef get_config(arg=''):\n"
        + "    return Config('m', {'m': short(recipes.mae(TwoWidths(8), TRAIN))})\n"
    )
    said = call(fork, "run", "--config=masked.py", "--workdir=m", status=2)
    assert (
        said.strip()
        == "error: stages.m.task: the encoder 'two_widths' cannot be masked, so it has no masked auto-encoding"
    )
