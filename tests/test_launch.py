"""The launch scripts, as far as a machine without a scheduler can tell."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, environment
from tinymim_jax.__main__ import BAD
from tinymim_jax.runtime.cluster import Cluster, find
from tinymim_jax.runtime.preemption import INTERRUPTED, RUN_AGAIN

LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", ROOT / ".ci" / "run"]


def tool(name):
    """A program of the test extra, beside this Python."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return found or pytest.skip(f"needs {name}: pip install -e '.[test]'")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck(script):
    # SC1091: sourced files are checked by themselves.
    run = subprocess.run([tool("shellcheck"), "--exclude=SC1091", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


@pytest.fixture
def jobset():
    """launch/k8s/jobset.yaml."""
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((LAUNCH / "k8s" / "jobset.yaml").read_text())


def validate_job(spec):
    """Raises if Kubernetes would not take the job."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install -e '.[test]'")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def test_kubernetes(jobset, monkeypatch):
    """JobSet is no part of Kubernetes' own schemas; the job in it is."""
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    (workers,) = jobset["spec"]["replicatedJobs"]
    spec = workers["template"]["spec"]
    validate_job(spec)
    (container,) = spec["template"]["spec"]["containers"]
    env = {e["name"]: e["value"] for e in container["env"]}
    name = f"{jobset['metadata']['name']}-{workers['name']}-0-0.{jobset['metadata']['name']}"
    for variable, value in {**env, "JOB_COMPLETION_INDEX": "1"}.items():
        monkeypatch.setenv(variable, value)
    assert find() == Cluster(f"{name}:8476", spec["completions"], 1)
    config = container["args"][0].removeprefix("--config=").split(":")[0]
    assert (ROOT / config).is_file() and container["command"] == ["python", "-m", "tinymim_jax", "run"]


@pytest.mark.parametrize(
    "broken",
    [
        {"rule": []},
        {"rules": {"action": "FailJob"}},
        {"rules": [{"onExitCodes": {"operator": "In", "values": [2]}}]},
        {"rules": [{"action": "FailJob", "onExitCodes": {"values": [2]}}]},
        {"rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": ["2"]}}]},
        {"rules": [{"action": "FailJob", "onExitCode": {"operator": "In", "values": [2]}}]},
        {"rules": [{"action": "Count", "onPodConditions": [{"status": "True"}]}]},
        {"rules": [{"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": True}]}]},
    ],
)
def test_a_broken_pod_failure_policy_does_not_pass(broken, jobset):
    from kubernetes_validate import ValidationError

    (workers,) = jobset["spec"]["replicatedJobs"]
    with pytest.raises(ValidationError):
        validate_job({**workers["template"]["spec"], "podFailurePolicy": broken})


def pod_action(spec, status, is_disrupted):
    """What Kubernetes does about a failed pod: what its schema leaves open is asserted."""
    containers = [container["name"] for container in spec["template"]["spec"]["containers"]]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # else there can be no such policy
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule["action"] in ("Count", "FailIndex", "FailJob", "Ignore")
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        if codes := rule.get("onExitCodes"):
            assert codes["operator"] in ("In", "NotIn") and codes["containerName"] in containers
            assert sorted(set(codes["values"])) == codes["values"] and not (
                codes["operator"] == "In" and 0 in codes["values"]
            )
            fits = (status in codes["values"]) == (codes["operator"] == "In")
        else:
            fits = is_disrupted and {"type": "DisruptionTarget", "status": "True"} in rule["onPodConditions"]
        if fits:
            return rule["action"]
    return "Count"


def set_action(policy, reason):
    """What JobSet does about a failed job; its fields as v1alpha2 has them."""
    assert set(policy) <= {"maxRestarts", "restartStrategy", "rules"}
    for rule in policy["rules"]:
        assert set(rule) <= {
            "name",
            "action",
            "onJobFailureReasons",
            "onJobFailureMessagePatterns",
            "targetReplicatedJobs",
        }
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        assert rule["action"] in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
        reasons = rule["onJobFailureReasons"]
        assert set(reasons) <= {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded",
                                "PodFailurePolicy"}  # fmt: skip
        if reason in reasons:
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("status", "is_disrupted", "action"),
    [
        (BAD, False, "FailJobSet"),
        (BAD, True, "RestartJobSet"),
        (RUN_AGAIN, False, "RestartJobSet"),
        (RUN_AGAIN, True, "RestartJobSet"),
        (137, True, "RestartJobSet"),
        (1, False, "RestartJobSet"),
        (INTERRUPTED, False, "RestartJobSet"),
    ],
)
def test_kubernetes_starts_again_what_a_new_start_can_mend(status, is_disrupted, action, jobset):
    (workers,) = jobset["spec"]["replicatedJobs"]
    spec = workers["template"]["spec"]
    assert spec["backoffLimit"] == 0  # a pod that counts fails the job: all must start again
    reasons = {"FailJob": "PodFailurePolicy", "Count": "BackoffLimitExceeded"}
    reason = reasons[pod_action(spec, status, is_disrupted)]
    assert set_action(jobset["spec"]["failurePolicy"], reason) == action


FAKE_SRUN = """#!/usr/bin/env bash
# Two tasks on this host, as srun would start them.
shift
for i in 0 1; do
  SLURM_JOB_ID=$PORT_JOB SLURM_STEP_ID=0 SLURM_NTASKS=2 SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS_PER_NODE=2 \\
    SLURM_STEP_NODELIST=127.0.0.1 "$@" > "$LOGS/$i" 2>&1 &
  pids[i]=$!
done
status=0
for i in 0 1; do wait "${pids[i]}" || status=$?; done
exit $status
"""


def installed(venv, extras, programs):
    """An environment that env.sh has nothing to install into."""
    (venv / "bin").mkdir(parents=True)
    stamp = ["bash", "-c", f"cat setup.py <(echo {extras}) | cksum | cut -d' ' -f1"]
    setup = subprocess.run(stamp, cwd=ROOT, capture_output=True, text=True)
    (venv / f"installed-{setup.stdout.strip()}").touch()
    (venv / "bin" / "activate").write_text(f"export PATH={programs}:$PATH\n")


@pytest.mark.slow
def test_slurm_with_two_tasks_on_this_host(tmp_path):
    """The batch script itself, with a srun that starts two processes here; stopped, it is put back into the queue."""
    installed(tmp_path / "venv", "cuda", Path(sys.executable).parent)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text(FAKE_SRUN)
    (tools / "scontrol").write_text('#!/bin/sh\necho "$@" > "$LOGS/scontrol"\n')
    for path in tools.iterdir():
        path.chmod(0o755)
    logs, workdir = tmp_path / "logs", tmp_path / "work"
    logs.mkdir()
    env = {**environment(), "PATH": f"{tools}:{os.environ['PATH']}", "VENV": str(tmp_path / "venv"), "LOGS": str(logs)}
    env |= {"PORT_JOB": str(os.getpid()), "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "77"}
    arguments = [f"--config={ROOT / 'tests/tiny_chain.py'}:steps=4", f"--workdir={workdir}", "--stage=mae"]
    run = subprocess.run(["bash", LAUNCH / "slurm.sbatch", *arguments], env=env, capture_output=True, timeout=300)
    assert run.returncode == 0, (logs / "0").read_text()[-2000:]
    assert (workdir / "mae" / "DONE").is_file() and not (logs / "scontrol").exists()
    assert "mae: 4 steps" in (logs / "0").read_text() and "mae: 4 steps" not in (logs / "1").read_text()

    (tools / "srun").write_text("#!/bin/sh\nexit 75\n")
    run = subprocess.run(["bash", LAUNCH / "slurm.sbatch", *arguments], env=env, capture_output=True, timeout=60)
    assert run.returncode == 75 and (logs / "scontrol").read_text() == "requeue 77\n"


def test_the_batch_script_asks_for_a_process_a_gpu_and_for_time_to_save():
    text = (LAUNCH / "slurm.sbatch").read_text()
    asked = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", text))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] and asked["gpus-per-task"] == "1"
    assert asked["signal"] == "TERM@120"


def tpu_pod(folder, verb, gcloud):
    """What launch/tpu_pod.sh has a gcloud write into its log, the script `gcloud`."""
    (folder / "gcloud").write_text(gcloud)
    (folder / "gcloud").chmod(0o755)
    own = {"PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(folder / "log"), "NAME": "mim", "ZONE": "z"}
    command = ["bash", LAUNCH / "tpu_pod.sh", *verb]
    run = subprocess.run(command, env={**os.environ, **own}, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return (folder / "log").read_text()


@pytest.mark.parametrize(
    ("verb", "parts"),
    [
        (["create", "v4-64"], ["create mim --zone=z --accelerator-type=v4-64 --version=tpu-ubuntu2204-base"]),
        (["install"], ["scp /tmp/tinymim_jax.tar.gz mim: --zone=z --worker=all", "EXTRAS=tpu bash launch/env.sh"]),
        (["run", "--config=a b.py"], ["ssh mim --zone=z --worker=all --command=EXTRAS=tpu nohup bash -c", "run.log"]),
        (["log"], ["--worker=0 --command=tail"]),
        (["delete"], ["delete mim --zone=z"]),
    ],
)
def test_tpu_pod_calls_gcloud(verb, parts, tmp_path):
    calls = tpu_pod(tmp_path, verb, '#!/bin/sh\nprintf "%s\\n" "$*" >> "$LOG"\n')
    assert calls.startswith("compute tpus tpu-vm ") and all(part in calls for part in parts)


def test_tpu_pod_runs_its_command_until_it_is_done(tmp_path):
    """The command that is sent to the workers, here: twice stopped, then done; quoting survives."""
    keep = 'for a; do case $a in --command=*) printf %s "${a#--command=}" > "$LOG";; esac; done'
    command = tpu_pod(tmp_path, ["run", "--config=a b.py"], f"#!/bin/bash\n{keep}\n")
    home = tmp_path / "home"
    (home / "tinymim" / "launch").mkdir(parents=True)
    (home / "tinymim" / "launch" / "env.sh").write_text("export PATH=$HOME:$PATH\n")
    (home / "python").write_text(
        '#!/bin/bash\necho "$4" >> "$HOME/calls"\n[[ $(wc -l < "$HOME/calls") -lt 3 ]] && exit 75\nexit 0\n'
    )
    (home / "python").chmod(0o755)
    subprocess.run(
        ["bash", "-c", f"{command}\nwait"], env={**os.environ, "HOME": str(home)}, cwd=home, check=True, timeout=60
    )
    assert (home / "calls").read_text() == "--config=a b.py\n" * 3


FAKE_PYTHON = """#!/usr/bin/env bash
[[ $1 == -c ]] && echo "$BACKEND" && exit 0
echo "$@" >> "$CALLS"
[[ $* == *finetune_b* ]] && exit 2
echo '{}'
"""


def fake_python(folder):
    """A folder for PATH, with a Python that notes in $CALLS what it is asked for, and fails at finetune_b."""
    folder.mkdir()
    (folder / "python").write_text(FAKE_PYTHON)
    (folder / "python").chmod(0o755)
    return folder


def test_benchmarks_are_made_once(tmp_path):
    """One that fails leaves no file behind."""
    from tinymim_jax.commands.bench import VERBS

    programs, out, calls = fake_python(tmp_path / "bin"), tmp_path / "out", tmp_path / "calls"
    installed(tmp_path / "venv", "x", programs)
    own = {"VENV": tmp_path / "venv", "EXTRAS": "x", "CALLS": calls, "BACKEND": "gpu"}
    own |= {"STAGES": "distill_b finetune_b", "BATCHES": "2 4"}
    env = {**os.environ, **{name: str(value) for name, value in own.items()}}
    for _ in range(2):
        command = ["bash", LAUNCH / "bench.sh", out, "--rounds=1"]
        done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count("finetune_b-2-xla.json: not measured") == 1
    made = {path.name for path in out.iterdir()}
    steps = {f"step-distill_b-{batch}-{kind}.json" for batch in (2, 4) for kind in ("xla", "cudnn", "pallas")}
    steps |= {f"step-distill_b-2-again-{again}.json" for again in (2, 3)}
    assert made == {
        *steps,
        *(f"relation-{kind}.json" for kind in ("xla", "pallas", "rows-64", "rows-256", "rows-1025")),
    }
    lines = calls.read_text().splitlines()
    assert sum("distill_b" in line for line in lines) == 13 and sum("finetune_b" in line for line in lines) == 12
    assert all(line.split()[:3] == ["-m", "tinymim_jax", "bench"] and line.split()[3] in VERBS for line in lines)
    steps = [line for line in lines if "bench step" in line]
    assert all("--vs=torch" in line and line.endswith("--rounds=1") for line in steps)
    assert (
        sum("attention=cudnn" in line for line in steps) == 14 and sum("kernel=pallas" in line for line in steps) == 2
    )


FAKE_DATE = """#!/usr/bin/env bash
seconds=$(cat "$CLOCK" 2> /dev/null || echo 0)
echo $((seconds + 100)) | tee "$CLOCK"
"""


def test_the_quick_benchmarks_end_in_time_and_go_on(tmp_path):
    """A clock that moves by 100 s at each look: five measurements fit, the next call makes the others."""
    programs, out, calls = fake_python(tmp_path / "bin"), tmp_path / "out", tmp_path / "calls"
    (programs / "date").write_text(FAKE_DATE)
    (programs / "date").chmod(0o755)
    own = {"READY": "1", "CALLS": str(calls), "CLOCK": str(tmp_path / "clock"), "BACKEND": "gpu"}
    env = {**os.environ, **own, "PATH": f"{programs}:{os.environ['PATH']}"}
    command = ["bash", LAUNCH / "bench.sh", "--quick", out]
    first = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    asked = [line.split() for line in calls.read_text().splitlines()]
    assert first.returncode == 1 and first.stderr.count("not measured, the time is over") == 5
    assert [words[3] for words in asked] == ["step"] * 5 + ["table"]
    assert ["--vs=torch" in words for words in asked[:5]] == [True, False, False, True, False]
    (tmp_path / "clock").unlink()
    second = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    asked = [line.split() for line in calls.read_text().splitlines()[6:]]
    assert [words[3] for words in asked] == ["step"] * 3 + ["relation"] * 2 + ["table"] and second.stderr == ""
    assert [words[5] for words in asked[1:3]] == ["--stage=distill_t", "--stage=mae_l"]


@pytest.mark.slow
def test_the_quick_benchmarks_rehearsed(tmp_path):
    own = {"READY": "1", "CONFIG": "configs/digits/chain.py", "BATCHES": "8 16", "JAX_PLATFORMS": "cpu"}
    env = {**os.environ, **own, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", LAUNCH / "bench.sh", "--quick", tmp_path / "out", "--rounds=1"]
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + 6 + 2 + 4 and "| step-distill_b-8-pallas | 8 |" in done.stdout


def test_the_benchmarks_of_a_cpu(tmp_path):
    """What BENCHMARKS.md claims of one: each once, with PyTorch in turn where it has the step."""
    programs, out, calls = fake_python(tmp_path / "bin"), tmp_path / "out", tmp_path / "calls"
    own = {"READY": "1", "CALLS": str(calls), "BACKEND": "cpu", "STAGES": "mae_l:8 distill_b:4", "DATA": "images"}
    env = {**os.environ, **own, "PATH": f"{programs}:{os.environ['PATH']}"}
    subprocess.run(["bash", LAUNCH / "bench.sh", "--cpu", out, "--rounds=1"], env=env, check=True, capture_output=True)
    steps = ["mae_l-8", "distill_b-4", "distill_b-8-cached", "digits-distill_t", "relation_b-8", "relation_masked_b-8"]
    others = ["beside-relation_b-8", "relation-distill_b-2", "segment-base-2", "loader-finetune_t", "loader-mae_l"]
    assert {path.stem for path in out.iterdir()} == {*(f"step-{name}" for name in steps), *others}
    lines = calls.read_text().splitlines()
    assert len(lines) == 13 and lines[-1] == f"-m tinymim_jax bench table {out}"
    assert lines[2] == lines[3] and sum("--vs=torch" in line for line in lines) == 2  # fills the cache, reads it
    assert sum(line.startswith("-m tests.profile_segment --rounds") for line in lines) == 1
    assert all("dtype=float32" in line for line in lines if "imagenet" in line and "loader" not in line)
    subprocess.run(["bash", LAUNCH / "bench.sh", "--cpu", out], env=env, check=True, capture_output=True)
    assert calls.read_text().splitlines()[13:] == lines[-1:]


@pytest.mark.slow
def test_the_benchmarks_of_a_cpu_rehearsed(tmp_path):
    own = {"READY": "1", "CONFIG": "configs/digits/chain.py", "STAGES": "distill_t:8 mae_l:4", "TOKENS": "17"}
    own |= {"STUDY": "configs/cifar10/study.py:short,table", "SEGMENT": "--size=tiny --pixels=64"}
    env = {**os.environ, **own, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", LAUNCH / "bench.sh", "--cpu", tmp_path / "out", "--rounds=1"]
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("| ")]) == 4 * 2 + 6 + 3
    first, cached = (
        json.loads((tmp_path / "out" / f"step-{name}.json").read_text()) for name in ("mae_l-4", "distill_b-8-cached")
    )
    assert first["torch_eager"]["ratio"] > 0 and first["command"].startswith("python -m tinymim_jax bench step ")
    assert 0 < cached["first_step_s"] < 60


def test_benchmarks_of_a_small_model_on_a_tpu(tmp_path):
    programs, calls = fake_python(tmp_path / "bin"), tmp_path / "calls"
    own = {"READY": "1", "CALLS": str(calls), "BACKEND": "tpu", "STAGES": "distill_t", "BATCHES": "2"}
    env = {**os.environ, **own, "PATH": f"{programs}:{os.environ['PATH']}"}
    subprocess.run(["bash", LAUNCH / "bench.sh", tmp_path / "out"], env=env, check=True, capture_output=True)
    lines = calls.read_text().splitlines()
    assert sum("steps_per_call=10" in line for line in lines) == 3
    assert not any("cudnn" in line for line in lines) and len(lines) == len(set(lines)) + 2  # scanned, three times


def test_a_benchmark_that_its_limit_cuts_off(tmp_path):
    programs = fake_python(tmp_path / "bin")
    (programs / "timeout").write_text("#!/bin/sh\nexit 124\n")
    (programs / "timeout").chmod(0o755)
    own = {"READY": "1", "CALLS": str(tmp_path / "calls"), "BACKEND": "tpu", "STAGES": "mae_l", "BATCHES": "2"}
    env = {**os.environ, **own, "PATH": f"{programs}:{os.environ['PATH']}", "LIMIT": "5"}
    command = ["bash", LAUNCH / "bench.sh", tmp_path / "out"]
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 1 and not list((tmp_path / "out").iterdir())
    assert "step-mae_l-2-xla.json: not measured within 5 seconds; set LIMIT to more" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--rounds=1"], [__file__]])
def test_benchmarks_need_a_folder(arguments):
    command = ["bash", LAUNCH / "bench.sh", *arguments]
    done = subprocess.run(command, env={**os.environ, "READY": "1"}, check=False, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: name a folder for the results first")


def test_benchmarks_need_an_accelerator(tmp_path):
    env = {
        **os.environ,
        "READY": "1",
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = ["bash", LAUNCH / "bench.sh", tmp_path / "out"]
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    assert not (tmp_path / "out").exists()
    assert done.returncode == 2 and done.stderr.startswith("error: jax sees no accelerator here")
