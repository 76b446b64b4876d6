"""Every command of README and docs/ is typed as it stands there, on small stand-ins for what a user has.

Stand-ins: trees of a few images, a run of the demo whose stages have two steps, a ViT-L with random weights. Runs that are
not of the demo get --dry_run; benchmarks measure the demo's models.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import torch_files
from tinymim_jax.__main__ import COMMANDS
from tinymim_jax.experiment import recipes

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
STAGES = ("mae_l", "distill_b", "distill_s", "distill_t", "mae_t", "finetune_scratch", "finetune_mae", "finetune_chain")
SHORT = [
    f"--config.stages.{stage}.{field}"
    for stage in STAGES
    for field in ("run.epochs=none", "run.steps=2", "run.steps_per_call=1", "optim.warmup_epochs=0")
]
SHORT += [f"--config.stages.{stage}.run.replicas=2" for stage in STAGES if stage.startswith("finetune")]
# What stands in for what is not here; a folder for each kind of data set.
STAND_INS = {
    "PATH/cifar10": "cifar10",
    "=PATH": "=images",
    "/data/imagenet": "images",
    "/data/packed": "packed",
    "FOLDER": "images/test/c0",
    "runs/cifar10_short/finetune_chain_0": "runs/digits/finetune_chain/replica_0",
    "runs/other": "runs/digits",
    "$stage": "mae_t",
    "--per_class=50": "--per_class=2",
}
# Commands whose sources are not here say so in one line.
MISSING = {
    "configs/cifar10/first_blocks.py": "runs/cifar10_short/distill_t",
    "tables.py:row=": "converted/deit",
    "mae_lite.py:row=d2_mae": "mae_b.pth",
    "runs/scenes/pretrained": "runs/scenes/pretrained/replica_0",
    "upernet.py:size=b,init=": "runs/imagenet/distill_b",
    "convert exported/upernet": "exported/upernet",
}
# What has a test of its own: the launch scripts, several processes, a pod's topology, the profile.
ELSEWHERE = (
    "bash ",
    "--coordinator=",
    "--topology=",
    "tests.profile_step",
    "tests.profile_segment",
    "tests.profile_cka",
    "for ",
    "done",
    "source ",
    "pip ",
)


def commands():
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                line = line.split("  #")[0].split(" # ")[0].strip()
                if line and "..." not in line and not any(part in line for part in ELSEWHERE):
                    yield pytest.param(line, id=f"{page.stem}: {line[:90]}")


def call(here, *arguments, statuses=(0,)):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=here, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode in statuses, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    here = tmp_path_factory.mktemp("docs")
    (here / "configs").symlink_to(ROOT / "configs")
    random = np.random.default_rng(0)
    trees = [("images/train", 4), ("images/val", 2), ("images/test", 2), ("cifar10/train", 500), ("cifar10/test", 2)]
    for split, count in trees:
        for label in range(10):
            folder = here / split / f"c{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(random.integers(0, 255, (40, 48, 3), np.uint8)).save(folder / f"{i}.jpg")
    Image.fromarray(random.integers(0, 255, (16, 16, 3), np.uint8)).save(here / "digit.png")
    call(here, "tinymim_jax", "run", "--config=configs/digits/chain.py", "--workdir=runs/digits", *SHORT)
    torch_files.mae_encoder(here / "mae_pretrain_vit_large.pth", recipes.vit("large"))
    return here


def test_no_command_is_undocumented():
    said = "".join(page.read_text() for page in PAGES)
    assert [name for name in COMMANDS if f"tinymim_jax {name}" not in said] == []


@pytest.mark.slow
@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_documentation(line, here):
    words = shlex.split(line)
    words = words[words.index("-m") + 1 :]
    for what, stand_in in STAND_INS.items():
        words = [word.replace(what, stand_in) for word in words]
    missing = next((path for part, path in MISSING.items() if part in line), None)
    if words[1] == "run":
        is_short = "--config=configs/digits/chain.py" in words and "--dry_run" not in words
        words += SHORT if is_short else ["--dry_run"]
    elif words[1:3] == ["bench", "loader"]:
        words += ["--config.stages.finetune_t.data.num_examples=none"]
    elif words[1] == "bench":
        words = [*of_the_demo(words), "--rounds=1"]
    elif words[1] in ("convert", "export"):
        shutil.rmtree(here / words[3], ignore_errors=True)  # of another page
    said = call(here, *words, statuses=(2,) if missing else (0, 2) if words[1] == "doctor" else (0,))
    if missing:
        assert len(said.splitlines()) == 1 and missing in said, said


def of_the_demo(words):
    """A benchmark with the demo's models, or the small study's, instead of ImageNet's."""
    words = [re.sub(r"imagenet/(study\.py:table=\d+)", r"cifar10/\1,short", word) for word in words]
    words = [re.sub(r"--config=configs/imagenet/\w+\.py", "--config=configs/digits/chain.py", word) for word in words]
    return [word.replace("finetune_t", "finetune_chain") for word in words if ".init=" not in word]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_of_the_documentation(page, here, monkeypatch):
    monkeypatch.chdir(here)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(block, names)
        for expression, shape in re.findall(r"^(\w[\w.\[\]]*)\.shape  # (\([\d, ]+\))", block, re.MULTILINE):
            assert str(eval(f"{expression}.shape", names)) == shape
