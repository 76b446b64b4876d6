"""Several processes and devices against one; `python -m tests.test_processes` measures it at length."""

import json
import re
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path

import pytest

from tests.processes import connected, difference, finish, free_port, log, run, start
from tinymim_jax.weights import checkpoint

STAGES = ("mae", "distill", "finetune")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The chain in one process with one device."""
    folder = tmp_path_factory.mktemp("one")
    ((status, _, err),) = run(folder, "steps=4")
    assert status == 0, err[-2000:]
    return folder


@pytest.mark.slow
def test_two_processes_with_two_devices_train_like_one(one, tmp_path):
    """Parameters, teacher and optimiser state are split over fsdp, which spans both devices of each process."""
    ended = run(tmp_path, "steps=4,fsdp=2", 2, 2)
    for status, _, err in ended:
        assert status == 0, err[-2000:]
    assert "mae: 4 steps of 8 images" in ended[0][1] and "steps of" not in ended[1][1]  # one process speaks
    for name in STAGES:
        assert difference(one / name, tmp_path / name) < 1e-6, name
        for mine, theirs in zip(log(one / name), log(tmp_path / name), strict=True):
            assert sorted(mine) == sorted(theirs)
            assert mine.get("loss", 0.0) == pytest.approx(theirs.get("loss", 0.0), rel=1e-6)
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.slow
def test_data_in_the_devices_memory_in_two_processes(tmp_path):
    for folder, shape in (("one", (1, 1)), ("two", (2, 2))):
        for status, _, err in run(tmp_path / folder, f"steps=4,fsdp={shape[0]},resident", *shape, "--stage=mae"):
            assert status == 0, err[-2000:]
    assert difference(tmp_path / "one" / "mae", tmp_path / "two" / "mae") < 1e-6


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both_at_one_step_and_the_run_goes_on_elsewhere(one, tmp_path):
    """Saved by two processes with a device each, restored by one with four."""
    running = start(tmp_path, "steps=400,every=400", 2, 1, "--stage=mae")
    deadline = time.monotonic() + 300
    while not (tmp_path / "mae" / "metrics.jsonl").exists() or not (tmp_path / "mae" / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline and all(process.poll() is None for process in running)
        time.sleep(0.1)
    running[1].send_signal(signal.SIGTERM)
    ended = finish(running)
    assert [status for status, _, _ in ended] == [75, 75], ended
    (step,) = checkpoint.steps(tmp_path / "mae")
    assert f"stage mae stopped at step {step} of 400; run the same command to go on" in ended[0][2]
    ((status, _, err),) = run(tmp_path, f"steps={step + 3},every=400", 1, 4, "--stage=mae")
    assert status == 2 and "run.steps: 400 -> " in err  # the length is part of the schedule
    stopped = start(tmp_path, "steps=400,every=400", 1, 4, "--stage=mae")
    assert any(f"resumed at step {step} of 400" in line for line in iter(stopped[0].stdout.readline, ""))
    stopped[0].kill()
    stopped[0].communicate()


@pytest.mark.slow
def test_a_cut_checkpoint_is_named_in_one_line(one, tmp_path):
    """Nothing of what orbax leaves behind is heard."""
    shutil.copytree(one / "mae", tmp_path / "mae")
    (tmp_path / "mae" / "DONE").unlink()
    files = (tmp_path / "mae" / checkpoint.FOLDER / "4" / "model").rglob("*")
    largest = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    ((status, out, err),) = run(tmp_path, "steps=4", 1, 1, "--stage=mae")
    assert status == 0 and "resumed at step 2 of 4" in out
    assert re.search(r"the checkpoint of step 4 is damaged \([^)]*\w: ", out) and "See full" not in out
    assert "Traceback" not in err and "ignored" not in err, err


UNREADABLE = """
from tinymim_jax.weights import checkpoint

checkpoint.fault = lambda folder, step: "cut short"

def damaged(self, path, *args, restore=checkpoint.ocp.StandardCheckpointHandler.restore, **kwargs):
    if path.parent.name == "4":
        raise ValueError("FAILED_PRECONDITION")
    return restore(self, path, *args, **kwargs)

checkpoint.ocp.StandardCheckpointHandler.restore = damaged
"""


OTHER_VALUES = """
import jax
from tinymim_jax.weights import checkpoint

checkpoint.fault = lambda folder, step: "its values are not those"

def altered(self, path, *args, restore=checkpoint.ocp.StandardCheckpointHandler.restore, **kwargs):
    found = restore(self, path, *args, **kwargs)
    return jax.tree.map(lambda x: x + 1, found) if path.parent.name == "4" else found

checkpoint.ocp.StandardCheckpointHandler.restore = altered
"""


@pytest.mark.slow
@pytest.mark.parametrize(("patch", "why"), [(UNREADABLE, "cut short"), (OTHER_VALUES, "its values are not those")])
def test_a_checkpoint_that_one_of_two_processes_cannot_read_is_passed_over_by_both(one, tmp_path, patch, why):
    shutil.copytree(one / "mae", tmp_path / "mae")
    (tmp_path / "mae" / "DONE").unlink()
    ended = finish(start(tmp_path, "steps=4", 2, 1, "--stage=mae", patches={1: patch}))
    assert [status for status, _, _ in ended] == [0, 0], ended[0][2][-2000:]
    out = ended[0][1]
    assert "process 1: " in out and f"the checkpoint of step 4 is damaged ({why}" in out
    assert "resumed at step 2 of 4" in out
    assert difference(one / "mae", tmp_path / "mae") < 1e-6


NO_IMAGE = """
from tinymim_jax.data import fields
from tinymim_jax.runtime.errors import InputError

def load(data, name, cfg, rng, load=fields.load):
    if cfg.transform == {transform!r}:
        raise InputError(f"{{name}}: cannot be decoded")
    return load(data, name, cfg, rng)

fields.load = load
"""


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["train", "eval"])
def test_an_image_that_one_of_two_processes_cannot_read_ends_both(tmp_path, transform):
    patches = {1: NO_IMAGE.format(transform=transform)}
    small = ["--stage=mae", "--config.stages.mae.evals.knn.batch_size=8"]  # so that both read some
    ended = finish(start(tmp_path, "steps=4", 2, 1, *small, patches=patches))
    assert [status for status, _, _ in ended] == [74 if transform == "train" else 2, 2], ended
    theirs, own = (err.splitlines()[-1] for _, _, err in ended)
    assert "cannot be decoded, or leave such images out with on_bad_image=skip" in own
    if transform == "train":
        assert theirs == "error: stage mae: another process has failed; its log says why"
        assert checkpoint.steps(tmp_path / "mae") == []  # no step without its images is saved
    else:
        assert theirs == own.replace("error: eval knn: ", "error: eval knn: process 1: ")


BUG = """
from tinymim_jax.training import start

def broken(*args):
    raise RuntimeError("a bug")

start.make_setup = broken
"""


@pytest.mark.slow
def test_a_bug_in_one_of_two_processes_leaves_nobody_waiting(tmp_path):
    """JAX would have both wait for five minutes."""
    ended = finish(start(tmp_path, "steps=4", 2, 1, "--stage=mae", patches={1: BUG}), timeout=200)
    (other, _, _), (own, _, err) = ended
    assert own == 1 and err.rstrip().endswith("RuntimeError: a bug")
    assert other in (74, -signal.SIGABRT), ended[0]


TERMINATED = """
import os, signal
from tinymim_jax.evals.contract import Measurement
from tinymim_jax.training import evaluations

evaluations.CHECK_EVERY = 1

def run_stopped(*args, run=Measurement.run):
    os.kill(os.getpid(), signal.SIGTERM)
    return run(*args)

Measurement.run = run_stopped
"""


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_during_the_final_evaluation(tmp_path):
    patches = {0: "from tinymim_jax.training import evaluations\nevaluations.CHECK_EVERY = 1", 1: TERMINATED}
    arguments = ["--stage=mae", "--config.stages.mae.run.eval_every=0"]  # so that no evaluation is before it
    ended = finish(start(tmp_path, "steps=4", 2, 1, *arguments, patches=patches))
    assert [status for status, _, _ in ended] == [75, 75], ended
    assert "stage mae stopped while it was evaluated; run the same command to go on" in ended[0][2]
    assert checkpoint.steps(tmp_path / "mae")[-1] == 4 and not (tmp_path / "mae" / "DONE").exists()


@pytest.mark.slow
def test_processes_with_a_workdir_each(tmp_path):
    """The same path, on disks that are not shared."""
    patch = (
        "import os\nfrom tinymim_jax.runtime import storage\nstorage.APPEARS = 1.0\nos.makedirs({0!r})\nos.chdir({0!r})"
    )
    patches = {i: patch.format(str(tmp_path / str(i))) for i in range(2)}
    ended = finish(start("work", "steps=4", 2, 1, patches=patches))
    assert [status for status, _, _ in ended] == [2, 2], ended
    assert "process 1: work/run.lock, which the first process has written, is not seen here" in ended[0][2]
    assert "all processes need one shared --workdir" in ended[1][2]
    assert not (tmp_path / "0" / "work" / "mae").exists() and not (tmp_path / "0" / "work" / "run.lock").exists()


def test_processes_that_differ_say_so_and_start_nothing(tmp_path):
    address = f"--coordinator=127.0.0.1:{free_port()}"
    running = []
    for i, override in enumerate((["--config.stages.mae.optim.lr=0.001"], ["--config.stages.mae.optim.lr=0.5"])):
        cluster = [address, "--num_processes=2", f"--process_id={i}"]
        running += start(tmp_path, "steps=4", 1, 1, *cluster, *override)
    for status, _, err in finish(running, 100):
        assert status == 2
        assert "differs from process 0 in config.stages.mae.optim.lr: 0.001 -> 0.5; start all with the same code" in err
    assert list(tmp_path.iterdir()) == []


def test_a_signal_while_others_are_waited_for_is_heard_at_once(tmp_path):
    """Process 0 waits for one that does not come, process 1 for a process 0 that keeps it waiting."""
    port, host = free_port(), socket.gethostname()
    with socket.create_server(("127.0.0.1", 0)) as fake:
        places = [(port, 0), (fake.getsockname()[1], 1)]
        running = [
            start(tmp_path, "steps=4", 1, 1, f"--coordinator=127.0.0.1:{at}", "--num_processes=2", f"--process_id={i}")[
                0
            ]
            for at, i in places
        ]
        with fake.accept()[0] as line, line.makefile("rb") as said:
            own = json.loads(said.readline())
            running[1].send_signal(signal.SIGINT)
            assert own["host"] == host and json.loads(said.readline()) == {"is_stopped": True}
        connection = connected(port)
        connection.sendall(json.dumps({**own, "host": "h1"}).encode()[:-1])  # half of a word: not yet there
        running[0].send_signal(signal.SIGTERM)
        ended = finish(running, 60)
    assert [status for status, _, _ in ended] == [75, 130]
    for i, (_, _, err) in enumerate(ended):
        assert (
            f"interrupted: process {i} ({host}) was stopped while processes were waited for; run the same command"
            in err
        )
        assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_second_run_in_one_workdir(tmp_path):
    (first,) = start(tmp_path, "steps=2000,every=1000", 1, 1, "--stage=mae")
    deadline = time.monotonic() + 120
    while not (tmp_path / "run.lock").exists():
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    ((status, _, err),) = run(tmp_path, "steps=2000,every=1000", 1, 1, "--stage=mae")
    assert status == 2 and f"is in use by process {first.pid} on " in err
    first.send_signal(signal.SIGTERM)
    ((status, _, _),) = finish([first], 120)
    assert status == 75 and not (tmp_path / "run.lock").exists()


def measure() -> None:
    """30 steps on 2 x 4 and 1 x 8 devices against 1 x 1; then what 8 devices saved, restored on 1, 2 and 4."""
    folder, found = Path(tempfile.mkdtemp()), {}

    def trained(name: str, options: str, processes: int, devices: int) -> list[str]:
        ended = run(folder / name, f"steps=30,every=15,{options}", processes, devices)
        for status, _, err in ended:
            assert status == 0, err[-3000:]
        return [out for _, out, _ in ended]

    for name, options, processes, devices in (
        ("1x1", "fsdp=1", 1, 1),
        ("2x4", "fsdp=2", 2, 4),
        ("1x8", "fsdp=2", 1, 8),
    ):
        trained(name, options, processes, devices)
        found[f"{name} against 1x1"] = {s: difference(folder / "1x1" / s, folder / name / s) for s in STAGES}
    for devices in (1, 2, 4):
        name = f"saved on 1x8 after 15 steps, restored on 1x{devices}"
        shutil.copytree(folder / "1x8", folder / name)
        for stage in STAGES:
            (folder / name / stage / "DONE").unlink()
            shutil.rmtree(folder / name / stage / checkpoint.FOLDER / "30")
        (out,) = trained(name, f"fsdp={min(devices, 2)}", 1, devices)
        assert out.count("resumed at step 15 of 30") == 3
        found[f"{name}, against 1x8"] = {s: difference(folder / "1x8" / s, folder / name / s) for s in STAGES}
    print(json.dumps({"largest difference of a weight after 30 steps": found}, indent=2))


if __name__ == "__main__":
    measure()
