import dataclasses
import io
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
from PIL import Image

from tests.processes import ROOT
from tinymim_jax.data import pipeline
from tinymim_jax.data.augment import transform
from tinymim_jax.data.decode import decode
from tinymim_jax.data.fields import IMAGE_LABEL
from tinymim_jax.data.pipeline import eval_batches
from tinymim_jax.data.rows import EvalRows, ReplicaRows, TrainRows, epoch_order, image_rng
from tinymim_jax.data.sources import open_source
from tinymim_jax.experiment.config import Data
from tinymim_jax.runtime import multihost
from tinymim_jax.runtime import sharding as mesh_lib
from tinymim_jax.runtime.errors import InputError, Unavailable
from tinymim_jax.runtime.preemption import GO_ON, STOP, StopRequest
from tinymim_jax.runtime.workdir_lock import born


class Numbered:
    """n images, all pixels of image i equal to i, its label i % 7; a class, so that workers can import it."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return {"image": np.full((6, 6, 3), index, np.uint8), "label": index % 7}

    def describe(self, index):
        return f"number {index}"

    def labels(self):
        return np.arange(self.n) % 7


class Backend(Numbered):
    """Its labels tell whether the process that reads them has opened a jax backend."""

    def __getitem__(self, index):
        from jax._src import xla_bridge

        return {"image": np.zeros((6, 6, 3), np.uint8), "label": int(xla_bridge.backends_are_initialized())}


@pytest.fixture(scope="module")
def mesh():
    return mesh_lib.make_mesh()


def train(mesh, data=None, source=None, start=0, stop=6, batch_size=8, seed=5):
    data = data or Data("digits", image_size=6)
    source = source or Numbered(21)
    return list(train_batches(data, source, batch_size=batch_size, seed=seed, start=start, stop=stop, mesh=mesh))


def evaluate(mesh, source, batch_size, **fields):
    data = Data("digits", **{"image_size": 6, "transform": "eval", **fields})
    return list(eval_batches(data, source, batch_size=batch_size, mesh=mesh))


def train_batches(data, source, *, batch_size, seed, start, stop, mesh):
    return pipeline.train_batches(pipeline.train_rows(data, source, batch_size, seed), start, stop, mesh)


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, other)


def no_grain_threads():
    for _ in range(100):
        if not any("grain-prefetch" in t.name for t in threading.enumerate()):
            return True
        time.sleep(0.05)
    return False


def test_shapes_and_types(mesh):
    for batch in (train(mesh, stop=1)[0], evaluate(mesh, Numbered(5), 8)[0]):
        described = {k: (v.shape, v.dtype.name) for k, v in batch.items() if k != "stop"}
        assert described == {
            "image": ((8, 6, 6, 3), "uint8"),
            "label": ((8,), "int32"),
            "is_valid": ((8,), "bool"),
            "index": ((8,), "int32"),
        }
        assert batch["image"].sharding == mesh_lib.batch_sharding(mesh)


def test_every_epoch_sees_each_image_at_most_once_in_its_own_order(mesh):
    batches = train(mesh, stop=6)  # 21 // 8 = 2 steps an epoch
    orders = [np.concatenate([batches[2 * e + s]["index"] for s in range(2)]) for e in range(3)]
    for epoch, order in enumerate(orders):
        np.testing.assert_array_equal(order, epoch_order(21, 5, epoch)[:16])
        assert len(set(order.tolist())) == 16
    assert not np.array_equal(orders[0], orders[1])
    whole = train(mesh, source=Numbered(16), stop=2)
    assert sorted(np.concatenate([b["index"] for b in whole])) == list(range(16))


def test_contents_belong_to_the_index(mesh):
    for batch in train(mesh) + evaluate(mesh, Numbered(21), 8)[:2]:
        index = np.asarray(batch["index"])
        np.testing.assert_array_equal(batch["image"], np.broadcast_to(index[:, None, None, None], (8, 6, 6, 3)))
        np.testing.assert_array_equal(batch["label"], index % 7)
        assert np.asarray(batch["is_valid"]).all()


def test_an_image_is_a_function_of_seed_epoch_and_index(mesh):
    data = Data("digits", image_size=10, rand_augment="rand-m9-mstd0.5-inc1")
    source = open_source(data)
    batch = train(mesh, data, source, start=1297 // 8 + 2, stop=1297 // 8 + 3)[0]
    for image, index in zip(batch["image"], np.asarray(batch["index"]), strict=True):
        expected = transform(decode(source[int(index)]["image"], ""), data, image_rng(5, 1, int(index)))
        np.testing.assert_array_equal(image, expected)


def test_streams_do_not_meet():
    draws = {image_rng(s, e, i).integers(2**62) for s in range(3) for e in range(3) for i in range(3)}
    draws |= {image_rng(2**32, 0, 0).integers(2**62)}
    assert len(draws) == 28
    orders = {tuple(epoch_order(50, s, e).tolist()) for s in range(3) for e in range(3)}
    assert len(orders) == 9


def test_resuming_in_the_middle_of_an_epoch_gives_the_same_batches(mesh):
    data, source = Data("digits", image_size=10), open_source(Data("digits", per_class=2))
    whole = train(mesh, data, source, stop=7)
    assert_same(whole[3:], train(mesh, data, source, start=3, stop=7))
    assert train(mesh, data, source, start=7, stop=7) == []


def test_order_does_not_depend_on_threads_or_workers(mesh):
    source = open_source(Data("digits"))
    runs = [
        train(mesh, Data("digits", image_size=10, threads=t, workers=w, prefetch=p), source, stop=5)
        for t, w, p in ((1, 0, 1), (4, 0, 5), (2, 2, 4))
    ]
    for run in runs[1:]:
        assert_same(runs[0], run)


@pytest.mark.parametrize("workers", [0, 1])
def test_host_batches_are_the_rows_in_order(workers):
    rows = pipeline.train_rows(Data("digits", image_size=6, workers=workers), Numbered(21), 8, 5)
    batches = list(pipeline.host_batches(rows, 1, 4))
    for step, batch in zip(range(1, 4), batches, strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, rows(step))
    assert not multiprocessing.active_children()


def test_workers_more_than_batches_and_without_devices(mesh):
    jax.devices()
    here = evaluate(mesh, Backend(8), 8)[0]["label"]
    there = evaluate(mesh, Backend(8), 8, workers=3)[0]["label"]
    assert np.asarray(here).all() and not np.asarray(there).any()


@pytest.mark.parametrize(("n", "batch_size"), [(21, 8), (16, 8), (3, 8), (17, 1)])
def test_evaluation_sees_every_image_once_in_order(mesh, n, batch_size):
    batches = evaluate(mesh, Numbered(n), batch_size)
    index = np.concatenate([b["index"] for b in batches])
    valid = np.concatenate([b["is_valid"] for b in batches])
    np.testing.assert_array_equal(index[valid], np.arange(n))
    assert valid[:n].all() and (index[n:] == -1).all() and not valid[n:].any()
    assert len(index) == -(-n // batch_size) * batch_size
    assert not np.concatenate([b["image"] for b in batches])[n:].any()


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_share_the_same_global_batch(num_processes):
    data = Data("digits", image_size=10)
    source = open_source(data)
    evaluation = Data("digits", image_size=10, transform="eval")
    few = open_source(Data("digits", per_class=1))  # 10 images: the last processes have nothing but padding
    for make, step in (
        (lambda p, n: TrainRows(data, source, 8, p, n, IMAGE_LABEL, 3), 200),
        (lambda p, n: EvalRows(evaluation, few, 8, p, n, IMAGE_LABEL), 1),
    ):
        parts = [make(p, num_processes)(step) for p in range(num_processes)]
        assert all(len(part["index"]) == 8 // num_processes for part in parts)
        joined = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
        assert_same([joined], [make(0, 1)(step)])


@pytest.fixture
def tree(tmp_path):
    """Ten images of one class, the fourth cut short."""
    rng = np.random.default_rng(0)
    (tmp_path / "train" / "only").mkdir(parents=True)
    for i in range(10):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "JPEG")
        content = buffer.getvalue()
        (tmp_path / "train" / "only" / f"{i}.jpg").write_bytes(content[: len(content) // 2] if i == 3 else content)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_image_stops(mesh, tree, workers):
    data = Data("folder", path=str(tree), image_size=6, transform="eval", workers=workers)
    with pytest.raises(InputError, match=r"only/3\.jpg: cannot be decoded as an image .*on_bad_image=skip "):
        list(eval_batches(data, open_source(data), batch_size=2, mesh=mesh))
    assert no_grain_threads()


def test_bad_image_is_skipped(mesh, tree, caplog):
    data = Data("folder", path=str(tree), image_size=6, transform="eval", on_bad_image="skip")
    batches = list(eval_batches(data, open_source(data), batch_size=5, mesh=mesh))
    valid = np.concatenate([b["is_valid"] for b in batches])
    assert valid.tolist() == [i != 3 for i in range(10)]
    assert np.concatenate([b["index"] for b in batches]).tolist() == list(range(10))
    images = np.concatenate([b["image"] for b in batches])
    assert [bool(i.any()) for i in images] == valid.tolist()
    assert "3.jpg" in caplog.text
    trained = train(
        mesh, Data("folder", path=str(tree), image_size=6, on_bad_image="skip"), open_source(data), 0, 1, 10
    )
    assert np.asarray(trained[0]["is_valid"]).tolist() == [i != 3 for i in trained[0]["index"]]


@pytest.mark.parametrize("workers", [0, 2])
def test_leaving_early_releases_threads_and_processes(mesh, workers):
    data = Data("digits", image_size=6, workers=workers)
    batches = train_batches(data, Numbered(64), batch_size=8, seed=0, start=0, stop=10_000, mesh=mesh)
    next(batches)
    assert len(multiprocessing.active_children()) == workers
    assert any("grain-prefetch" in t.name for t in threading.enumerate())
    batches.close()
    assert no_grain_threads()
    assert not multiprocessing.active_children()


def test_errors_are_raised_at_the_call(mesh):
    data = Data("digits", image_size=6)
    arguments = {"batch_size": 8, "seed": 0, "start": 0, "stop": 1, "mesh": mesh}
    with pytest.raises(InputError, match="batch_size 8 is more than the 7 images"):
        train_batches(data, Numbered(7), **arguments)
    with pytest.raises(InputError, match="batch_size 8 is not a multiple of the 3 devices"):
        train_batches(data, Numbered(8), **{**arguments, "mesh": types.SimpleNamespace(size=3)})
    with pytest.raises(InputError, match="set it to 'eval'"):
        eval_batches(data, Numbered(8), batch_size=8, mesh=mesh)


def test_batch_must_divide_by_processes(mesh, monkeypatch):
    evaluation = Data("digits", image_size=6, transform="eval")
    devices = np.array([types.SimpleNamespace(process_index=i) for i in range(3)])
    of_three = types.SimpleNamespace(size=1, devices=devices)
    with pytest.raises(InputError, match="batch_size 8 is not a multiple of the 3 processes"):
        eval_batches(evaluation, Numbered(8), batch_size=8, mesh=of_three)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(InputError, match="not a multiple"):
        train_batches(Data("digits"), Numbered(8), batch_size=8, seed=0, start=0, stop=1, mesh=mesh)


def test_one_of_several_processes_reads_by_itself_for_its_own_devices(mesh, monkeypatch):
    """As the report does, while the others are at their end."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost, "gather", lambda text: pytest.fail("it would wait for the others"))
    data = Data("digits", image_size=6, transform="eval")
    (batch,) = eval_batches(data, Numbered(8), batch_size=8, mesh=mesh)
    assert np.asarray(batch["index"]).tolist() == list(range(8))


def test_repeated_augmentation(mesh):
    """Each image stands three times in a row, and is cropped anew; an epoch has a third of the images."""
    data = Data("digits", image_size=6, crop_scale=(0.2, 0.5), repeats=3)
    source = open_source(Data("digits", per_class=3))
    batches = train(mesh, data, source, stop=5, batch_size=6)
    for batch in batches:
        index = np.asarray(batch["index"]).reshape(-1, 3)
        assert (index == index[:, :1]).all() and index[0, 0] != index[1, 0]
        images = np.asarray(batch["image"]).reshape(2, 3, -1)
        assert not (images[:, 0] == images[:, 1]).all() and not (images[:, 1] == images[:, 2]).all()
    assert len({i for batch in batches for i in np.asarray(batch["index"]).tolist()}) == 10  # of 30
    once = train(mesh, dataclasses.replace(data, repeats=1), source, stop=5, batch_size=6)
    np.testing.assert_array_equal(once[0]["image"][0], batches[0]["image"][0])


def test_a_wish_to_stop_travels_with_the_batches(mesh):
    rows = pipeline.train_rows(Data("digits", image_size=6), Numbered(64), 8, 0)
    request, seen = StopRequest(), []
    for batch in pipeline.train_batches(rows, 0, 5, mesh, request):
        seen.append(np.asarray(batch["stop"]).tolist())
        request.asked = len(seen) >= 2
    assert seen == [[x] * 8 for x in (GO_ON, GO_ON, GO_ON, STOP, STOP)]
    assert "stop" not in next(
        eval_batches(Data("digits", image_size=6, transform="eval"), Numbered(8), batch_size=8, mesh=mesh)
    )


def test_steps_of_a_call_end_at_its_multiples():
    assert list(pipeline.calls(0, 5, 1)) == [range(i, i + 1) for i in range(5)]
    assert list(pipeline.calls(3, 9, 4)) == [range(3, 4), range(4, 8), range(8, 9)]
    assert list(pipeline.calls(5, 5, 4)) == []


def test_batches_of_a_call_are_stacked(mesh):
    rows = pipeline.train_rows(Data("digits", image_size=6), Numbered(64), 8, 0)
    one = list(pipeline.train_batches(rows, 1, 6, mesh))
    stacks = list(pipeline.train_batches(rows, 1, 6, mesh, per_call=2))
    assert [len(stack["index"]) for stack in stacks] == [1, 2, 2]
    for name in one[0]:
        expected = np.stack([batch[name] for batch in one])
        np.testing.assert_array_equal(np.concatenate([stack[name] for stack in stacks]), expected)


def replicas(seeds=(3, 9), **sizes):
    data = Data("digits", image_size=6)
    return ReplicaRows(tuple(pipeline.train_rows(data, Numbered(sizes.get(str(s), 21)), 8, s) for s in seeds))


@pytest.mark.parametrize("per_call", [1, 2])
def test_batches_of_replicas_are_those_of_each_stacked(mesh, per_call):
    rows = replicas()
    alone = [list(pipeline.train_batches(one, 1, 5, mesh)) for one in rows.each]
    assert not np.array_equal(alone[0][0]["index"], alone[1][0]["index"])
    found = list(pipeline.train_batches(rows, 1, 5, mesh, StopRequest(), per_call))
    for name in alone[0][0]:
        expected = np.stack([np.stack([batch[name] for batch in pair]) for pair in zip(*alone, strict=True)])
        join = np.stack if per_call == 1 else np.concatenate
        np.testing.assert_array_equal(join([batch[name] for batch in found]), expected)
    assert found[0]["stop"].shape == ((2, 8) if per_call == 1 else (1, 2, 8))


def test_replicas_reach_workers_by_pickle():
    rows = replicas()
    sent = pickle.loads(pickle.dumps(rows))
    assert (sent.replicas, sent.batch_size) == (2, 8)
    jax.tree.map(np.testing.assert_array_equal, sent(2), rows(2))
    assert not sent.empty()["is_valid"].any() and sent.empty()["index"].shape == (2, 8)


def test_replicas_read_as_many_images_each():
    with pytest.raises(InputError, match=r"replicas read \[21, 24\] images.*set data\.subset_seed$"):
        replicas(**{"9": 24})


KILLED = """
import multiprocessing, os, signal
from tinymim_jax.experiment.config import Data
from tinymim_jax.data import pipeline, sources

data = Data("digits", image_size=6, workers=2)
rows = pipeline.train_rows(data, sources.open_source(data), 8, 0)
batches = pipeline.host_batches(rows, 0, 10**6)
next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_leave_it_to_their_parent_to_heed_a_signal(mesh):
    """One that is sent to all processes of a run."""
    data = Data("digits", image_size=6, workers=1)
    batches = train_batches(data, Numbered(64), batch_size=8, seed=0, start=0, stop=10_000, mesh=mesh)
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    for _ in range(20):
        assert next(batches)["is_valid"].all()
    batches.close()
    assert not multiprocessing.active_children()


def test_workers_end_with_a_killed_parent():
    run = subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT, capture_output=True, text=True, timeout=100)
    workers = [int(pid) for pid in run.stdout.split()]
    assert workers
    deadline = time.monotonic() + 20
    while any(map(born, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(born, workers))


class Deadly(Numbered):
    """Kills the worker that reads it: between two batches it could hold a lock of grain's, which waits for it forever."""

    def __init__(self, count, number):
        super().__init__(count)
        self.number = number

    def __getitem__(self, index):
        assert multiprocessing.parent_process() is not None
        os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])  # want of memory; of room in /dev/shm
def test_a_worker_that_is_killed_is_one_line(number):
    rows = pipeline.train_rows(Data("digits", image_size=6, workers=1, prefetch=1), Deadly(21, number), 8, 5)
    batches = pipeline.host_batches(rows, 0, 1000)
    with pytest.raises(Unavailable, match="worker process was killed .*/dev/shm") as raised:
        list(batches)
    assert signal.strsignal(number) in str(raised.value) and "\n" not in str(raised.value)
