import jax
import pytest
from etils.epath import Path

from tests.conftest import tiny_mae
from tinymim_jax import doctor
from tinymim_jax.config import Config, Mesh


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
    found = fixes(doctor.versions())
    assert any("pip install 'jax>=0.10,<0.12'" in line for line in found)
    assert any("pip install jaxlib==0.9.1" in line for line in found)


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
    monkeypatch.setattr(jax, "device_count", lambda: 12)
    found = fixes(doctor.processes({"https_proxy": "x"}))
    assert found == ["processes have different numbers of devices: give each the same",
                     "https_proxy is set: unset it if processes hang at the start"]  # fmt: skip


def test_too_little_room(cfg, tmp_path, monkeypatch):
    import shutil
    import types

    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    assert "make room, or choose another --workdir" in doctor.disk(cfg, tmp_path / "not" / "there").fix
    assert not doctor.disk(None, tmp_path).fix


def test_a_grid_and_data_that_do_not_fit(cfg, tmp_path):
    cfg.mesh = Mesh(fsdp=3)
    assert "does not fill 1 devices" in doctor.mesh(cfg).fix
    cfg.stages["mae"].data.source, cfg.stages["mae"].data.path = "folder", str(tmp_path / "gone")
    found = fixes(doctor.data(cfg))
    assert len(found) == 1 and "gone/train: no such folder" in found[0]
