import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from etils.epath import Path
from PIL import Image

from tests.conftest import tiny_mae
from tests.processes import ROOT, environment, finish, free_port
from tinymim_jax.experiment.config import Config, Mesh
from tinymim_jax.planning import doctor
from tinymim_jax.runtime.workdir_lock import WorkdirLock


@pytest.fixture
def cfg():
    return Config("tiny", {"mae": tiny_mae()})


def fixes(findings):
    return [f"{f.what}: {f.fix}" for f in findings if f.fix]


def test_a_machine_that_is_well(cfg, tmp_path, capsys):
    assert doctor.report(cfg, tmp_path, {}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok   ") for line in lines)
    for part in (f"jax {jax.__version__}", "1 local devices (cpu), 1 in all", "process 0 of 1", "GB free at",
                 "mesh 1 x 1", "digits, split train: 40 images"):  # fmt: skip
        assert any(part in line for line in lines), part


def test_versions_out_of_range(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.9.1")
    bound = re.search(r'"(jax>=[^"]+)"', (ROOT / "setup.py").read_text())[1]
    assert fixes(doctor.versions()) == [f"jax 0.9.1: it was tried with 0.10 to 0.12: pip install '{bound}'"]
    monkeypatch.setattr(jax, "__version__", bound.split("<")[1] + ".0")
    assert len(fixes(doctor.versions())) == 1
    monkeypatch.setattr(jax, "__version__", "0.12.0.1")
    assert not fixes(doctor.versions())


def test_an_accelerator_that_is_not_used(monkeypatch):
    monkeypatch.setattr(type(Path("/")), "exists", lambda self: str(self) == "/dev/nvidia0")
    assert fixes(doctor.devices({})) == [
        "this machine has an NVIDIA GPU that jax does not use: pip install -e '.[cuda]'"
    ]
    assert fixes(doctor.devices({"JAX_PLATFORMS": "cpu"})) == [
        "this machine has an NVIDIA GPU that jax does not use: unset JAX_PLATFORMS=cpu"
    ]
    assert "CUDA_VISIBLE_DEVICES hides every GPU: unset it" in fixes(doctor.devices({"CUDA_VISIBLE_DEVICES": ""}))[1]


def test_traps_of_several_processes(monkeypatch):
    assert fixes(doctor.processes({"SLURM_NTASKS": "4"})) == [
        "Slurm gave 4 tasks, and this process is on its own: start with srun inside the job"
    ]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_device_count", lambda: 8)
    assert "one process for each GPU" in fixes(doctor.processes({"SLURM_NTASKS_PER_NODE": "8"}))[0]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(process_index=i // 8) for i in range(12)])
    found = fixes(doctor.processes({"https_proxy": "x"}))
    assert found == ["processes have different numbers of devices: give each the same",
                     "https_proxy is set: unset it if processes hang at the start"]  # fmt: skip


def test_too_little_room(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1500))
    (found,) = doctor.room(cfg, tmp_path / "not" / "there")
    assert found.fix == "make room, or choose another --workdir"
    assert found.what.startswith("0.0 MB free at ") and re.search(r"take up to [1-9]\d*\.\d MB$", found.what)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2.5e9))
    assert next(doctor.room(cfg, tmp_path)).what.startswith("2.5 GB free at ")
    assert not fixes(doctor.room(None, tmp_path))


def test_a_workdir_that_cannot_be_used(cfg, tmp_path, monkeypatch):
    with WorkdirLock(tmp_path):
        (found,) = fixes(doctor.room(cfg, tmp_path))
    assert f"in use by process {os.getpid()}" in found
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root, who may write everywhere
    assert fixes(doctor.room(cfg, tmp_path)) == [
        f"workdir {tmp_path}: {tmp_path} cannot be written to; choose another --workdir, or mend its rights or mount"
    ]


def test_images_of_several_sizes_for_the_devices_memory(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "IMAGES", 2)  # the first of each half
    for i, size in enumerate((8, 8, 9, 8)):
        (tmp_path / "train" / "one").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, 8)).save(tmp_path / "train" / "one" / f"{i}.png")
    data = cfg.stages["mae"].data = dataclasses.replace(
        cfg.stages["mae"].data, source="folder", path=str(tmp_path), per_class=None, resident=True
    )
    cfg.stages["mae"].evals = {}
    assert fixes(doctor.data(cfg)) == [
        f"folder {tmp_path}, split train: images differ in size: set data.resident=False, which needs one size"
    ]
    data.resident = False
    assert fixes(doctor.data(cfg)) == []


def test_a_grid_and_data_that_do_not_fit(cfg, tmp_path):
    cfg.mesh = Mesh(fsdp=3)
    assert "does not fill 1 devices" in doctor.mesh(cfg).fix
    cfg.stages["mae"].data.source, cfg.stages["mae"].data.path = "folder", str(tmp_path / "gone")
    found = fixes(doctor.data(cfg))
    assert len(found) == 1 and "gone: no such folder" in found[0]


def test_what_a_run_would_stumble_over_is_said_once(cfg, tmp_path):
    cfg.stages["mae"].run.batch_size = 400
    (found,) = fixes(doctor.examine(cfg, tmp_path, {}))
    assert found.startswith("the stages of tiny: stage mae: batch_size 400 is more than the 40 images")
    cfg.stages["mae"].data.source, cfg.stages["mae"].data.path = "folder", str(tmp_path / "gone")
    (found,) = fixes(doctor.examine(cfg, tmp_path, {}))
    assert found.startswith("folder ") and "gone: no such folder" in found


CONFIG = """
import dataclasses
from tests.conftest import tiny_mae
from tinymim_jax.experiment.config import Config

def get_config(arg=""):
    stage = tiny_mae()
    stage.evals = {}
    stage.data = dataclasses.replace(stage.data, source="folder", path="images", per_class=None)
    stage.run.batch_size = 3
    return Config("tiny", {"mae": stage})
"""


def consult(homes, tmp_path, **env):
    """(exit status, stdout, stderr) of `doctor` in a process for each of the folders."""
    (tmp_path / "config.py").write_text(CONFIG)
    flags = [f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/work", f"--num_processes={len(homes)}"]
    argv = [sys.executable, "-m", "tinymim_jax", "doctor", *flags, f"--coordinator=127.0.0.1:{free_port()}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    variables = {**environment(), **env}
    return finish([subprocess.Popen([*argv, f"--process_id={i}"], cwd=home, env=variables, **pipes)
                   for i, home in enumerate(homes)], 200)  # fmt: skip


@pytest.mark.slow
def test_the_first_process_tells_what_the_others_must_mend(tmp_path):
    """Three processes on their own disks, of which two lack the data."""
    homes = [tmp_path / name for name in ("whole", "bare", "bare_too")]
    for home in homes:
        home.mkdir()
    (homes[0] / "images" / "train" / "cat").mkdir(parents=True)
    for i in range(4):
        picture = np.full((16, 16, 3), 60 * i, np.uint8)
        Image.fromarray(picture).save(homes[0] / "images" / "train" / "cat" / f"{i}.png")
    ended = consult(homes, tmp_path)
    assert [status for status, _, _ in ended] == [2, 2, 2], ended
    out = ended[0][1].splitlines()
    assert any(line.startswith("ok   folder images, split train: 4 images") for line in out)
    (line,) = [line for line in out if "FIX" in line]
    assert line.startswith(f"processes 1, 2 ({socket.gethostname()}): FIX  folder images, split train: images: no such")
    assert ended[0][2].splitlines()[-1] == "error: 1 of these need mending"
    for _, out, err in ended[1:]:
        assert (
            "ok  " not in out
            and err.splitlines()[-1] == "error: 1 of these need mending (as process 0 says, if not above)"
        )

    for home in homes[1:]:
        shutil.copytree(homes[0] / "images", home / "images")
    ended = consult(homes, tmp_path)
    assert [status for status, _, _ in ended] == [0, 0, 0] and "FIX" not in ended[0][1], ended


def test_findings_of_several_processes_are_grouped():
    findings = [doctor.Finding(f"thing {i}", "mend it") for i in range(2)]
    grouped = doctor._grouped([json.dumps(["h", [str(f) for f in found]]) for found in (findings, findings[:1])])
    assert grouped == {str(findings[0]): {0: "h", 1: "h"}, str(findings[1]): {0: "h"}}
    assert re.fullmatch(r"processes 0, 1, 2, 3, 4, 5, 6, 7 \.\.\. \(h\)", doctor._named(dict.fromkeys(range(9), "h")))
