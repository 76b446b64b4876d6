"""A real Slurm of one node, and a real Open MPI, where they are installed: apt install slurm-wlm munge openmpi-bin."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest
from etils.epath import Path

from tests.processes import ROOT, command, difference, environment, free_port, run
from tests.test_launch import LAUNCH, installed
from tinymim_jax.weights import checkpoint

pytestmark = pytest.mark.slow

CONF = """\
ClusterName=tinymim
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={d_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
KillWait=60
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of its commands; its daemons run as long as the tests of this module."""
    programs = ("munged", "slurmctld", "slurmd", "srun", "sbatch")
    path = f"{os.environ['PATH']}:/usr/sbin"
    if missing := [name for name in programs if not shutil.which(name, path=path)]:
        pytest.skip(f"needs {', '.join(missing)}: apt install slurm-wlm munge")
    if os.getuid():
        pytest.skip("needs root, who starts Slurm's daemons")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o600)
    ports = {"ctld_port": free_port(), "d_port": free_port()}
    (folder / "slurm.conf").write_text(CONF.format(host=socket.gethostname().split(".")[0], folder=folder, **ports))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    env = {**environment(), "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    files = [
        f"--{kind}-file={folder / name}"
        for kind, name in (("key", "key"), ("log", "log"), ("pid", "pid"), ("seed", "seed"))
    ]
    munged = subprocess.Popen(
        ["munged", "--foreground", "--force", f"--socket={folder / 'munge.sock'}", *files], env=env
    )
    daemons = [munged]
    try:
        wait(lambda: (folder / "munge.sock").exists())
        for name in ("slurmctld", "slurmd"):
            log = (folder / f"{name}.out").open("w")
            daemons.append(subprocess.Popen([name, "-D", "-c"], env=env, stdout=log, stderr=log))
        wait(lambda: "idle" in subprocess.run(["sinfo", "-h"], env=env, capture_output=True, text=True).stdout)
        yield env
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(20)
            daemon.kill()


def wait(condition, seconds=120):
    """Returns once `condition` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.5)


def state(job, env):
    done = subprocess.run(["scontrol", "show", "job", "-o", job], env=env, capture_output=True, text=True, check=True)
    return dict(item.split("=", 1) for item in done.stdout.split() if "=" in item)


def has_begun(workdir):
    metrics = workdir / "mae" / "metrics.jsonl"
    return metrics.exists() and bool(metrics.read_text())


def limit(job, minutes, env):
    """Gives the job another time limit, counted from its start."""
    subprocess.run(["scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}"], env=env, check=True)


def submit(env, tmp_path, arguments, *options):
    """launch/slurm.sbatch for two tasks on this node, as a user submits it; its number and its log."""
    if not (tmp_path / "venv").exists():
        installed(tmp_path / "venv", "cuda", os.path.dirname(sys.executable))
    own = {**env, "VENV": str(tmp_path / "venv")}
    asked = ["--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=1", f"--output={tmp_path / 'log'}", *options]
    done = subprocess.run(
        ["sbatch", "--parsable", *asked, LAUNCH / "slurm.sbatch", *arguments],
        env=own, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), tmp_path / "log"


def test_a_job_is_stopped_before_its_time_is_over_and_ends_like_an_undisturbed_one(slurm, tmp_path):
    options, flags = "steps=2000,every=1000", ["--stage=mae"]
    arguments = command(tmp_path / "work", options, *flags)[4:]
    job, log = submit(slurm, tmp_path, arguments, "--time=30")
    wait(lambda: has_begun(tmp_path / "work") or state(job, slurm)["JobState"] in ENDED, 300)
    hours, minutes, _ = map(int, state(job, slurm)["RunTime"].split(":"))
    limit(job, 60 * hours + minutes + 2, slurm)  # --signal is for the last two minutes, which these are
    wait(lambda: "interrupted: " in log.read_text() or state(job, slurm)["JobState"] in ENDED, 300)
    limit(job, 30, slurm)
    wait(lambda: state(job, slurm)["JobState"] in ENDED, 1200)
    text = log.read_text()
    found = state(job, slurm)
    assert found["JobState"] == "COMPLETED" and int(found["Restarts"]) >= 1, (found, text[-2000:])
    assert re.search(r"interrupted: stage mae stopped at step \d+ of 2000", text)
    assert re.search(r"resumed at step \d+ of 2000", text)
    for status, _, error in run(tmp_path / "whole", options, 2, 1, *flags):
        assert status == 0, error
    assert difference(tmp_path / "work" / "mae", tmp_path / "whole" / "mae") == 0


@pytest.mark.parametrize("asked", [["--ntasks=2"], ["--ntasks=2", "--ntasks-per-node=2"]])
def test_srun_with_and_without_tasks_per_node(asked, slurm, tmp_path):
    arguments = command(tmp_path, "steps=4", "--stage=mae")
    done = subprocess.run(
        ["srun", *asked, *arguments], env=slurm, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mae: 4 steps") == 1  # one run of two processes, not two runs
    assert json.loads((tmp_path / "mae" / "DONE").read_text())["step"] == 4


def test_doctor_in_an_allocation(slurm, tmp_path):
    arguments = [sys.executable, "-m", "tinymim_jax", "doctor", f"--config={ROOT / 'tests/tiny_chain.py'}"]
    done = subprocess.run(
        ["salloc", "--ntasks=2", "srun", *arguments], env=slurm, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 local devices (cpu), 2 in all" in done.stdout and "process 0 of 2" in done.stdout


def test_a_job_that_is_cancelled_saves_and_can_go_on(slurm, tmp_path):
    options, flags = "steps=100000,every=1000", ["--stage=mae"]
    arguments = command(tmp_path / "work", options, *flags)[4:]
    job, log = submit(slurm, tmp_path, arguments, "--time=10")
    wait(lambda: has_begun(tmp_path / "work") or state(job, slurm)["JobState"] in ENDED, 300)
    assert state(job, slurm)["JobState"] == "RUNNING", log.read_text()
    subprocess.run(["scancel", job], env=slurm, check=True)
    # Slurm calls it cancelled before its processes have ended, and ends srun, which would write what they say, at once.
    wait(lambda: checkpoint.steps(Path(tmp_path / "work" / "mae")), 100)
    (step,) = checkpoint.steps(Path(tmp_path / "work" / "mae"))
    assert step < 1000
    wait(lambda: subprocess.run(["squeue", "-h"], env=slurm, capture_output=True, text=True).stdout == "", 100)
    again, log = submit(slurm, tmp_path, arguments, "--time=10")
    wait(
        lambda: f"resumed at step {step} of 100000" in log.read_text() or state(again, slurm)["JobState"] in ENDED, 300
    )
    assert state(again, slurm)["JobState"] == "RUNNING", log.read_text()
    subprocess.run(["scancel", again], env=slurm, check=True)


def test_open_mpi(tmp_path):
    if not shutil.which("mpirun"):
        pytest.skip("needs mpirun: apt install openmpi-bin")
    env = {**environment(), "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    arguments = ["mpirun", "-n", "2", "--oversubscribe", *command(tmp_path, "steps=4", "--stage=mae")]
    done = subprocess.run(arguments, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mae: 4 steps") == 1
    assert json.loads((tmp_path / "mae" / "DONE").read_text())["step"] == 4
