"""Workdirs and data in buckets, against `tests/bucket.py`: what works, and one line for what does not."""

import contextlib
import dataclasses
import hashlib
import io
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import types

import aiohttp
import jax
import numpy as np
import pytest
from etils.epath import Path
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from PIL import Image

import tinymim_jax
from tests.bucket import serve
from tests.data import test_pairs
from tests.processes import ROOT, command, environment, finish, log, start
from tinymim_jax.__main__ import main
from tinymim_jax.data import dense
from tinymim_jax.data.sources import open_source
from tinymim_jax.experiment.config import Data
from tinymim_jax.runtime import storage, workdir_lock
from tinymim_jax.runtime.errors import InputError, Unavailable
from tinymim_jax.runtime.metric_log import read, write_whole
from tinymim_jax.runtime.workdir_lock import WorkdirLock
from tinymim_jax.weights import checkpoint

RUN = command("gs://bucket/run", "")[3:]  # as `main` takes it
OPTIMISED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # as users compile
UNDISTURBED = """
import sys
from tests.tiny_chain import get_config
from tinymim_jax.runtime import storage
from tinymim_jax.commands.run import run_chain
run_chain(get_config(), storage.path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def bucket():
    """One for all tests here, which this process's own clients find too."""
    with pytest.MonkeyPatch.context() as patch, serve() as served:
        for name, value in served.environment.items():
            patch.setenv(name, value)
        storage.prepare()
        yield served


@pytest.fixture(autouse=True)
def forget():
    """Which buckets have answered."""
    storage._check_bucket.cache_clear()


@pytest.fixture(scope="module")
def both(bucket, tmp_path_factory):
    """The chain's workdirs on a disk and in the bucket, the latter killed once and started again."""
    local = tmp_path_factory.mktemp("local")
    undisturbed = subprocess.Popen([sys.executable, "-c", UNDISTURBED, local], env=environment() | OPTIMISED, cwd=ROOT)
    (first,) = start("gs://bucket/run", "", 1, 1, env=OPTIMISED)
    deadline = time.monotonic() + 120
    while "run/mae/checkpoints/2/commit_success.txt" not in bucket.objects:
        assert time.monotonic() < deadline and first.poll() is None, first.communicate()
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # so that it holds the workdir until another has asked for it
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert main(RUN) == 2
    assert re.fullmatch(f"error: gs://bucket/run is in use by process {first.pid} on .*; wait .*\n", err.getvalue())
    first.kill()
    first.communicate()
    ((status, out, err),) = finish(start("gs://bucket/run", "", 1, 1, env=OPTIMISED))
    assert status == 0 and "Traceback" not in err and "WARNING" not in err, err
    assert f"the run before (process {first.pid}" in out and "resumed at step 2 of 4" in out
    assert undisturbed.wait(timeout=300) == 0
    copy = tmp_path_factory.mktemp("copy")
    bucket.save("run/", copy)
    return local, copy


@pytest.mark.slow
def test_a_workdir_in_a_bucket_after_a_kill_is_bit_for_bit_that_on_a_disk(both):
    local, copy = both
    for name in ("mae", "distill", "finetune"):
        models = [checkpoint.read_model(folder / name) for folder in both]
        jax.tree.map(np.testing.assert_array_equal, *models)
        assert log(local / name) == log(copy / name)
        assert list((copy / name / "tensorboard").iterdir())
    report = {file.name for file in (copy / "report").iterdir()}
    assert {"index.html", "loss_mae.svg", "mae_mae.png", "distill_distill.png", "finetune_val_classes.png"} <= report
    assert not (copy / workdir_lock.FILE).exists()


@pytest.mark.slow
def test_commands_and_load_read_a_bucket(both, capsys):
    local, _ = both
    model, variables = tinymim_jax.load("gs://bucket/run/finetune")
    jax.tree.map(np.testing.assert_array_equal, variables, tinymim_jax.load(local / "finetune").variables)
    assert model.cfg.depth == 2
    assert main(["inspect", "gs://bucket/run/finetune"]) == 0
    assert "- mae: MAE pre-training, 4 steps of digits" in capsys.readouterr().out
    assert main(["eval", "gs://bucket/run/finetune", "--suite=imagenet"]) == 0
    assert "wrote gs://bucket/run/finetune/eval/eval.json" in capsys.readouterr().out
    assert main(["doctor", RUN[1], "--workdir=gs://bucket/run"]) == 0
    assert "ok   gs://bucket/run is in a bucket" in capsys.readouterr().out


def test_a_folder_of_images_in_a_bucket_is_that_on_a_disk(bucket, tmp_path):
    for i, name in enumerate(["cat/b.jpg", "cat/a.JPEG", "ant/c.png", "ant/._c.png", "ant/notes.txt"]):
        content = io.BytesIO()
        Image.new("RGB", (9, 7), (40 * i, 0, 0)).save(content, "JPEG")
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(content.getvalue())
    bucket.load(tmp_path, "images/")
    for folder in ("images/train/", "images/train/cat/"):  # as some tools mark a folder
        bucket.objects[folder] = dataclasses.replace(bucket.objects["images/train/cat/b.jpg"], data=b"")
    local, there = (open_source(Data("folder", path=path)) for path in (str(tmp_path), "gs://bucket/images"))
    assert (len(there), there.classes, there.describe(0)) == (3, local.classes, "gs://bucket/images/train/ant/c.png")
    assert there.labels().tolist() == local.labels().tolist()
    before = len(bucket.requests)
    assert [there[i] for i in range(3)] == [local[i] for i in range(3)]
    assert len(bucket.requests) == before + 3
    assert pickle.loads(pickle.dumps(there))[1] == local[1]  # as worker processes get it
    del bucket.objects["images/train/ant/c.png"]
    with pytest.raises(InputError, match=r"gs://bucket/images/train/ant/c\.png: cannot be read \(FileNotFoundError"):
        there[0]
    with pytest.raises(InputError, match="gs://bucket/images/val: no such folder"):
        open_source(Data("folder", path="gs://bucket/images", split="val"))


def test_pairs_in_a_bucket_are_those_on_a_disk(bucket, tmp_path):
    test_pairs.write(tmp_path, "images/training", "annotations/training", keys=("x/a", "y/b"))
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    bucket.load(tmp_path, "ade/")
    local, there = (open_source(Data("pairs", path=path)) for path in (str(tmp_path), "gs://bucket/ade"))
    assert there.classes == ("one", "two") and there.describe(1) == "gs://bucket/ade/images/training/y/b.jpg"
    assert [there[i] for i in range(2)] == [local[i] for i in range(2)] and len(there) == 2
    assert dense.sizes(there).tolist() == dense.sizes(local).tolist() == [[3, 4], [3, 5]]
    assert pickle.loads(pickle.dumps(there))[1] == local[1]
    del bucket.objects["ade/annotations/training/y/b.png"]
    with pytest.raises(InputError, match=r"gs://bucket/ade/annotations/training/y/b\.png: cannot be read"):
        there[1]


def test_a_lock_in_a_bucket(bucket, monkeypatch, capsys):
    workdir = storage.path("gs://bucket/locked")
    monkeypatch.setattr(workdir_lock, "BEAT", 0.02)
    with WorkdirLock(workdir) as held:
        first, deadline = bucket.objects["locked/run.lock"], time.monotonic() + 20
        while bucket.objects["locked/run.lock"].generation == first.generation:
            assert time.monotonic() < deadline
        assert bucket.objects["locked/run.lock"].data == first.data
        with pytest.raises(InputError, match=f"gs://bucket/locked is in use by process {os.getpid()} on "):
            WorkdirLock(workdir).__enter__()
        assert held._take()  # the answer to a request was lost, and it was sent again
    assert "locked/run.lock" not in bucket.objects
    write_whole(workdir / workdir_lock.FILE, '{"host": "elsewhere", "pid": 1, "born": "0", "token": "t"}')
    monkeypatch.setattr(workdir_lock, "STALE", 0.5)
    with WorkdirLock(workdir):
        assert "the run before (process 1 on elsewhere) has died" in capsys.readouterr().out
    assert [name for name in bucket.objects if name.startswith("locked/")] == []


def test_files_that_others_have_written_are_seen(bucket):
    folder = storage.path("gs://bucket/seen")
    write_whole(folder / "a.jsonl", '{"step": 1}\n')
    assert [path.name for path in folder.iterdir()] == ["a.jsonl"]  # which a cache of listings would keep
    bucket.objects["seen/b"] = bucket.objects["seen/a.jsonl"]
    assert (folder / "b").exists() and read(folder / "a.jsonl") == [{"step": 1}]


LOG_IN = "gcloud auth application-default login"
BAD = {
    "s3": ("s3://bucket/run", "s3://bucket/run: checkpoints can be written to disks and gs:// only; mount the bucket"),
    "no bucket": ("gs://none/run", f"there is no bucket gs://none that you may see; make it, or log in: {LOG_IN}"),
    "unknown": ("gcs://bucket/run", "gcs://bucket/run: no such kind of storage; give a folder, gs://BUCKET/... or s3:"),
    "a slip": ("gs:/bucket/run", "gs:/bucket/run: no such kind of storage; give a folder, gs://BUCKET/... or s3://"),
}


def refusal(capsys, workdir, status=2):
    assert main([*RUN[:2], f"--workdir={workdir}"]) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("case", BAD)
def test_a_workdir_that_cannot_be(bucket, case, capsys):
    workdir, line = BAD[case]
    assert line in refusal(capsys, workdir)


def test_nobody_who_is_logged_in(bucket, monkeypatch, capsys):
    what = "Anonymous caller does not have storage.objects.get access"
    monkeypatch.setattr(bucket, "refusal", (".*", 401, what))
    line = f"gs://bucket cannot be reached (HttpError: {what}, 401); log in: {LOG_IN}"
    assert line in refusal(capsys, "gs://bucket/run")


def test_a_bucket_that_may_only_be_read(bucket, monkeypatch, capsys):
    monkeypatch.setattr(bucket, "refusal", ("POST", 403, "a@b does not have storage.objects.create access"))
    line = refusal(capsys, "gs://bucket/new")
    assert "gs://bucket/new cannot be written to (OSError: Forbidden" in line and "storage.objects.create" in line


def test_a_bucket_that_does_not_answer(bucket, monkeypatch, capsys):
    monkeypatch.setattr(storage, "PATIENCE", 1.0)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    line = refusal(capsys, "gs://bucket/run", status=74)
    assert "gs://bucket does not answer within 1 s; check the network and proxies" in line


def test_a_package_that_is_missing(bucket, monkeypatch, capsys):
    monkeypatch.delitem(_registry, "gs", raising=False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    line = refusal(capsys, "gs://bucket/run")
    assert "Please install gcsfs to access Google Storage: pip install 'tinymim_jax[gcs]'" in line


def test_what_fails_on_the_way_is_said_in_a_line_too(bucket, monkeypatch):
    monkeypatch.setattr(bucket, "refusal", ("POST", 403, "the account is closed"))
    with pytest.raises(OSError, match="the account is closed") as raised:
        write_whole(storage.path("gs://bucket/file"), "x")
    assert str(storage.blame(raised.value)).startswith("the bucket failed (OSError: Forbidden")
    assert str(storage.blame(OSError(28, "No space left on device", "/x"))).startswith(
        "/x: No space left on device; make room"
    )
    assert storage.blame(ValueError("a bug")) is None and storage.blame(FileNotFoundError(2, "No such file")) is None
    assert isinstance(storage.blame(OSError(107, "Transport endpoint is not connected", "/mnt")), Unavailable)
    denied = storage.blame(PermissionError(13, "Permission denied", "/x"))
    assert str(denied).startswith("/x: Permission denied; mend its rights") and not isinstance(denied, Unavailable)
    assert storage.blame(RuntimeError("Gloo all-reduce failed: Connection reset by peer")) is None
    ours = InputError("wrong")
    assert storage.blame(ours) is ours


def test_what_the_disk_said_is_found_in_what_a_library_makes_of_it():
    full = "No space left on device"
    assert storage.reason(OSError(28, full)) == full
    assert storage.reason(ValueError(f"RESOURCE_EXHAUSTED: writing a {'long ' * 100} path: {full} [source]")) == full
    wrapped = RuntimeError("a barrier failed")
    wrapped.__cause__ = OSError(28, full)
    assert storage.reason(wrapped) == full
    wrapped.__cause__ = FileNotFoundError(2, "No such file or directory")
    assert storage.reason(wrapped) == "RuntimeError: a barrier failed"
    assert storage.reason(ValueError("word " * 100)).endswith("word ...")
    wrapped.__cause__ = ValueError("why")
    assert storage.reason(wrapped) == "RuntimeError: a barrier failed"
    wrapped = Exception("Encountered error while reading array index: (slice(0, 32, 1),). See full ...")
    wrapped.__cause__ = ValueError("OUT_OF_RANGE: reading params")
    assert storage.reason(wrapped) == "ValueError: OUT_OF_RANGE: reading params"


def test_a_bucket_s_own_error_is_no_fault_of_rights():
    """As aiohttp's, whose number is of TLS."""
    with pytest.raises(OSError) as raised, storage.writing("gs://bucket/file"):
        raise aiohttp.ClientOSError(1, "[SSL] record layer failure")
    blamed = storage.blame(raised.value)
    assert isinstance(blamed, Unavailable) and str(blamed).startswith("the bucket failed ([SSL] record layer failure)")


@pytest.mark.parametrize("part", ["open", "write"])
def test_a_full_disk_names_the_file(tmp_path, monkeypatch, part):
    def full(*_, **__):
        raise OSError(28, "No space left on device")  # as a file's own `write` says it

    monkeypatch.setattr(LocalFileSystem, "pipe_file" if part == "write" else "open", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        write_whole(storage.path(tmp_path / "a"), "x") if part == "write" else WorkdirLock(
            storage.path(tmp_path)
        ).__enter__()
    where = tmp_path / ("a" if part == "write" else workdir_lock.FILE)
    assert str(storage.blame(raised.value)).startswith(f"{where}: No space left on device; make room")


def test_what_a_failed_read_leaves_behind_is_not_heard(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    storage.prepare.__wrapped__()
    assert not logging.getLogger("asyncio").isEnabledFor(logging.ERROR)

    async def dropped():
        pass

    rest = dropped()
    left = types.SimpleNamespace(object=rest, exc_value=ValueError("a bug"))
    sys.unraisablehook(left)
    assert heard == [left]
    code = types.SimpleNamespace(co_filename="site-packages/orbax/checkpoint/_src/serialization.py")
    sys.unraisablehook(types.SimpleNamespace(object=types.SimpleNamespace(cr_code=code), exc_value=ValueError("more")))
    sys.unraisablehook(types.SimpleNamespace(object=None, exc_value=RuntimeError("Event loop is closed")))
    assert heard == [left]
    rest.close()


def test_a_folder_to_write_to_is_made_and_left_empty(tmp_path):
    storage.check_writable(storage.path(tmp_path / "a" / "b"))
    assert list((tmp_path / "a" / "b").iterdir()) == []
    with pytest.raises(InputError, match="/proc/gone cannot be written to .*; choose another folder"):
        storage.check_writable(storage.path("/proc/gone"))


def test_waiting_for_another_process_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(storage, "APPEARS", 0.0)
    with pytest.raises(InputError, match="need one shared --workdir"):
        storage.wait_for(storage.path(tmp_path / "DONE"))
    assert capsys.readouterr().err == f"waiting for up to 0 s until {tmp_path}/DONE is seen here\n"


def test_what_needs_a_disk_says_so(tmp_path):
    for source in ("array_record", "tfds"):
        with pytest.raises(InputError, match="gs://bucket/data: .* must be on a disk; copy it, or mount the bucket"):
            open_source(Data(source, path="gs://bucket/data", name="x"))


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert storage.sha256(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize("name", ["run[1]", "a]b", "a*", "what?", "a\\b", os.fsdecode(b"a\xff")])
def test_checkpoints_are_not_written_where_orbax_would_lose_them(name, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="orbax loses checkpoints in paths with .*; choose another folder"):
        storage.check_checkpoints(Path(tmp_path) / name / "runs")
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(InputError, match="orbax loses"):
        storage.check_checkpoints(Path("runs"))


@pytest.mark.parametrize("name", ["a b", "größe", "a:b,c{d}$e&;~!(x)@=+|<>", "q\"'#%20", "日本語"])
def test_checkpoints_may_be_written_elsewhere(name, tmp_path):
    storage.check_checkpoints(Path(tmp_path) / name)


def test_what_is_in_a_folder_whatever_its_name(tmp_path):
    for name in ("run[1]", "a*", "plain"):
        (tmp_path / name).mkdir()
        for file in ("b.json", "a.json", ".x.json.partial", "c.txt"):
            (tmp_path / name / file).touch()
        folder = Path(tmp_path) / name
        assert [path.name for path in storage.children(folder, "*.json")] == ["a.json", "b.json"]
        assert [path.name for path in storage.children(folder, ".x*.partial")] == [".x.json.partial"]
    assert storage.children(Path(tmp_path) / "gone") == []
