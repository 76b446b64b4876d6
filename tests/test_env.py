"""launch/env.sh and .ci/run, with Pythons that only say what they are asked for."""

import os
import re
import shutil
import subprocess

import pytest

from tests.processes import ROOT

FAKE_VERSION = """#!/usr/bin/env bash
# A Python {version} whose pip notes what it installs, and fails if its exit status is not 0.
case "$1 $2" in
  "-c "*ensurepip*) exit {unsupported} ;;
  "-c "*) echo {version} ;;
  "-m venv")
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    printf '#!/bin/sh\\necho "{version} $*" >> "$CALLS"\\nexit {pip}\\n' > "$3/bin/pip"
    chmod +x "$3/bin/pip"
    touch "$3/bin/activate" ;;
  *) echo "Python {version}" ;;
esac
"""
SHIM = "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n"


@pytest.fixture
def env_sh(tmp_path):
    """Runs env.sh with the given Pythons, {name: script}, and no others; returns (run, what pip was called with)."""

    def call(pythons, **variables):
        tools = tmp_path / "tools"
        shutil.rmtree(tools, ignore_errors=True)
        tools.mkdir()
        for name in ("bash", "cat", "chmod", "cksum", "cp", "cut", "dirname", "mkdir", "rm", "touch"):
            (tools / name).symlink_to(shutil.which(name))
        for name, script in pythons.items():
            (tools / name).write_text(script)
            (tools / name).chmod(0o755)
        calls = tmp_path / "calls"
        calls.write_text("")
        env = {"PATH": str(tools), "TCMALLOC": "none", "VENV": str(tmp_path / "venv"), "CALLS": str(calls), **variables}
        command = ["bash", "-c", f"source {ROOT}/launch/env.sh && echo ${{LD_PRELOAD:-}} ${{TCMALLOC_RELEASE_RATE:-}}"]
        run = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
        return run, calls.read_text().splitlines()

    return call


def fake_version(version, unsupported=0, pip=0):
    return FAKE_VERSION.format(version=version, unsupported=unsupported, pip=pip)


def test_the_newest_python_that_works_is_taken(env_sh, tmp_path):
    """A shim that does not run, one too new or without venv, and one without wheels are passed over."""
    pythons = {"python3.14": SHIM, "python3.13": fake_version("3.13", pip=1), "python3.12": fake_version("3.12")}
    run, calls = env_sh({**pythons, "python3.11": fake_version("3.11")}, EXTRAS="gcs,s3")
    assert run.returncode == 0, run.stderr
    assert [line.split()[0] for line in calls] == ["3.13", "3.12"] and calls[1].endswith("--editable .[gcs,s3]")
    assert (tmp_path / "venv" / "bin" / "python").read_text() == fake_version("3.12")
    assert env_sh(pythons, EXTRAS="gcs,s3")[1] == []  # it is there
    run, calls = env_sh({"python3.14": fake_version("3.14")})  # other extras: the Python stays
    assert run.returncode == 0 and [line.split()[0] for line in calls] == ["3.12"]


def test_a_python_can_be_chosen(env_sh):
    pythons = {"python3.13": fake_version("3.13"), "python3": fake_version("3.11")}
    assert [line.split()[0] for line in env_sh(pythons, PYTHON="python3")[1]] == ["3.11"]
    run, calls = env_sh(pythons, PYTHON="python3.13")
    assert run.returncode == 2 and not calls
    assert re.fullmatch(r"error: \S+/venv is not of the version of PYTHON=python3.13; delete it, .*\n", run.stderr)


def test_an_allocator_that_keeps_memory_is_used_where_there_is_one(env_sh, tmp_path):
    library = tmp_path / "libtcmalloc.so.4"
    library.touch()
    pythons = {"python3.13": fake_version("3.13")}
    for variables, said in (
        ({"TCMALLOC": str(library)}, f"{library} 0"),
        ({"TCMALLOC": "none"}, ""),
        ({"TCMALLOC": str(tmp_path / "none.so")}, ""),
    ):
        run, _ = env_sh(pythons, **variables)
        assert run.returncode == 0 and run.stdout.splitlines()[-1].strip() == said, run.stderr


@pytest.mark.parametrize("pythons", [{}, {"python3.13": SHIM, "python3": fake_version("3.15", unsupported=1)}])
def test_without_a_python_it_is_said_what_to_install(pythons, env_sh, tmp_path):
    run, _ = env_sh(pythons)
    assert run.returncode == 2 and run.stderr.startswith("error: none of these is a Python from 3.11 to 3.14 with venv")
    assert run.stderr.count("\n") == 1 and not (tmp_path / "venv").exists()


def test_an_installation_that_fails_leaves_nothing_behind(env_sh, tmp_path):
    run, calls = env_sh({"python3.12": fake_version("3.12", pip=1)})
    assert run.returncode == 2 and len(calls) == 1 and not (tmp_path / "venv").exists()
    assert run.stderr.endswith("could not be made; what pip says is above\n")


FAKE_ENV = """is_supported() {
  [[ -e $1 ]]
}
python() {
  [[ $1 != -c ]] || { echo 11 && return; }
  echo "$@" >> calls
  [[ $* != *distill_b* ]] || mkdir -p "$work/distill_b/checkpoints/2"
  touch "$work/distill_b/DONE" 2> /dev/null || true
  echo "  $RESUMED"
}
"""


@pytest.fixture
def ci_run(tmp_path):
    """Runs .ci/run beside a test.sh and an env.sh that are not the real ones; returns (run, calls of python)."""

    def call(tests, slow, resumed="resumed at step 1 of 2", newer=("3.12.1", "3.14.2")):
        for folder in (".ci", "launch", *(f"pyenv/versions/{version}/bin" for version in newer)):
            (tmp_path / folder).mkdir(parents=True)
        shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
        for version in newer:
            (tmp_path / "pyenv" / "versions" / version / "bin" / "python").touch()
        (tmp_path / "launch" / "env.sh").write_text(FAKE_ENV + 'echo "PYTHON=${PYTHON:-}"\n')
        (tmp_path / "launch" / "test.sh").write_text(f"[[ $* == '-m slow' ]] && exit {slow}; exit {tests}\n")
        env = {**os.environ, "PYENV_ROOT": str(tmp_path / "pyenv"), "RESUMED": resumed}
        run = subprocess.run(["bash", tmp_path / ".ci" / "run"], env=env, check=False, capture_output=True, text=True)
        calls = tmp_path / "calls"
        return run, calls.read_text().splitlines() if calls.exists() else []

    return call


def test_ci_runs_the_newest_python_too(ci_run):
    run, calls = ci_run(tests=0, slow=5)
    assert run.returncode == 0, run.stderr
    assert "/pyenv/versions/3.14.2/bin/python\n" in run.stdout
    assert [re.search(r"--(stage|dry_)\S+", line)[0] for line in calls] == [
        "--stage=mae_l", "--stage=distill_b", "--stage=distill_b", "--dry_run"]  # fmt: skip


def test_ci_does_without_a_newer_python(ci_run):
    run, calls = ci_run(tests=0, slow=0, newer=())
    assert run.returncode == 0 and not calls and "skipped: no Python at hand is newer" in run.stdout


@pytest.mark.parametrize(
    ("outcome", "failed"),
    [
        ({"tests": 1, "slow": 0}, ["lint, format and tests"]),
        ({"tests": 0, "slow": 1}, ["slow tests"]),
        ({"tests": 0, "slow": 0, "resumed": "from the beginning"}, ["newest Python"]),
        ({"tests": 5, "slow": 2, "resumed": ""}, ["lint, format and tests", "slow tests", "newest Python"]),
    ],
)
def test_ci_fails_if_anything_does(outcome, failed, ci_run):
    run, calls = ci_run(**outcome)
    assert run.returncode == 1 and len(calls) >= 3
    assert re.findall("FAILED: (.*)", run.stderr) == failed
