"""JAX_ENABLE_X64=1, as some shells have it for other programs, changes no result and no checkpoint."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the file that is converted is PyTorch's")

from tests import torch_files
from tinymim_jax.experiment import config
from tinymim_jax.weights import checkpoint

ROOT = Path(__file__).parents[1]


def command(*argv, wide):
    env = {**os.environ, "JAX_ENABLE_X64": "1" if wide else "0", "JAX_PLATFORMS": "cpu"}
    call = [sys.executable, "-m", "tinymim_jax", *map(str, argv)]
    done = subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def train(workdir, *argv, wide):
    return command("run", "--config=tests/tiny_chain.py", f"--workdir={workdir}", *argv, wide=wide)


def sums(stage):
    """{step: {item: sums of the arrays' bits}}, which tell dtypes apart, too."""
    logs = {step: stage / checkpoint.FOLDER / str(step) / "log" / "metadata" for step in checkpoint.steps(stage)}
    return {step: json.loads(file.read_text())[checkpoint.SUMS] for step, file in logs.items()}


@pytest.mark.slow
def test_the_same_numbers(tmp_path):
    train(tmp_path / "narrow", wide=False)
    train(tmp_path / "wide", wide=True)
    for name in ("mae", "distill", "finetune"):
        narrow, wide = tmp_path / "narrow" / name, tmp_path / "wide" / name
        assert sums(narrow) == sums(wide) and len(sums(wide)) > 1
        done = [json.loads((stage / "DONE").read_text()) for stage in (narrow, wide)]
        done[0]["metrics"].pop("first_step_s", None), done[1]["metrics"].pop("first_step_s", None)
        assert done[0] == done[1] and len(done[0]["metrics"]) > 1

    resumed = tmp_path / "narrow" / "finetune"  # begun without, gone on with
    whole = sums(resumed)
    (resumed / "DONE").unlink()
    shutil.rmtree(resumed / checkpoint.FOLDER / str(max(whole)))
    assert "resumed at step" in train(tmp_path / "narrow", "--stage=finetune", wide=True)
    assert sums(resumed) == whole
    assert not list((resumed / checkpoint.FOLDER).glob(f"*{checkpoint.DAMAGED}"))

    found = []
    torch_files.mae_full(
        tmp_path / "x.pth", config.ViT(24, 2, 3, image_size=16, patch_size=8), config.Decoder(16, 1, 2)
    )
    for wide in (False, True):
        out, converted = tmp_path / f"eval_{wide}", tmp_path / f"converted_{wide}"
        command("eval", tmp_path / "narrow" / "finetune", "--suite=probe", f"--out={out}", wide=wide)
        command("convert", tmp_path / "x.pth", converted, "--num_heads=3", "--decoder_heads=2", wide=wide)
        found.append((json.loads((out / "eval.json").read_text())["results"], sums(converted)))
    assert found[0] == found[1] and found[0][0]
