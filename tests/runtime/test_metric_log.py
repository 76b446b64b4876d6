import json
import sys
import time
import types

import pytest
from tensorboardX.proto.event_pb2 import Event

from tinymim_jax.runtime import metric_log as writer_module
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.metric_log import MetricLog, read


def steps(folder):
    return [line["step"] for line in read(folder / "metrics.jsonl")]


@pytest.mark.parametrize("bad", [b'{"loss": 1}', b'{"step": 3, "\xff": 1}', b"[3]", b"x"])
def test_lines_from_a_damaged_one_on_are_dropped(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 3}\n')
    assert read(path) == [{"step": 1}]


def test_lines(tmp_path):
    folder = tmp_path / "not" / "there"
    with MetricLog(folder) as writer:
        writer.write(1, {"loss": 0.5, "lr": 1e-3})
        writer.write(2, {"top1": 10.0})
    text = (folder / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == [
        {"step": 1, "loss": 0.5, "lr": 1e-3},
        {"step": 2, "top1": 10.0},
    ]
    assert text.endswith("\n")


def test_each_line_is_there_soon_and_after_a_flush(tmp_path, monkeypatch):
    with MetricLog(tmp_path) as writer:
        writer.write(1, {"loss": 0.5})
        writer.flush()
        assert steps(tmp_path) == [1]
    monkeypatch.setattr(writer_module, "EVERY", 0.02)
    with MetricLog(tmp_path, 1) as writer:
        writer.write(2, {"loss": 0.5})
        deadline = time.monotonic() + 20
        while steps(tmp_path) == [1]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert steps(tmp_path) == [1, 2]


def test_a_write_that_fails_is_tried_again_and_raised_by_who_waits_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "EVERY", 0.02)
    with MetricLog(tmp_path) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(writer_module, "write_whole", lambda *_: 1 / 0)
            writer.write(1, {"loss": 0.5})
            time.sleep(0.1)
            with pytest.raises(ZeroDivisionError):
                writer.flush()
        writer.flush()
    assert steps(tmp_path) == [1]


def test_a_full_disk_does_not_hold_up_who_writes(tmp_path, monkeypatch):
    local = type(writer_module.storage.files(tmp_path))
    pipe = local.pipe_file

    def full(self, path, value, **more):
        if "tensorboard" in path:
            raise OSError(28, "No space left on device", path)
        pipe(self, path, value, **more)

    monkeypatch.setattr(local, "pipe_file", full)
    with MetricLog(tmp_path) as writer:
        for step in range(100):
            writer.write(step, {"loss": 1.0})
        writer.board.flush()
    assert len(read(tmp_path / "metrics.jsonl")) == 100


def test_resuming_drops_what_comes_after_start(tmp_path):
    with MetricLog(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": float(step)})
    with MetricLog(tmp_path, start=3) as writer:
        assert steps(tmp_path) == [1, 2, 3]
        writer.write(4, {"loss": 40.0})
    lines = read(tmp_path / "metrics.jsonl")
    assert [line["loss"] for line in lines] == [1.0, 2.0, 3.0, 40.0]


def test_starting_again_from_scratch_drops_all(tmp_path):
    with MetricLog(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
    with MetricLog(tmp_path, start=0):
        assert steps(tmp_path) == []


def test_several_lines_of_one_step_are_kept(tmp_path):
    with MetricLog(tmp_path) as writer:
        writer.write(3, {"loss": 1.0})
        writer.write(3, {"val/top1": 2.0})
    with MetricLog(tmp_path, start=3):
        assert read(tmp_path / "metrics.jsonl") == [{"step": 3, "loss": 1.0}, {"step": 3, "val/top1": 2.0}]


def test_a_half_written_last_line_is_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.2')
    assert read(file) == [{"step": 1, "loss": 0.5}]
    with MetricLog(tmp_path, start=2) as writer:
        writer.write(3, {"loss": 0.1})
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 3]


def test_no_file_is_no_lines(tmp_path):
    assert read(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").write_text("")
    assert read(tmp_path / "metrics.jsonl") == []


def events(folder):
    """The events in a TensorBoard folder, read record by record: uint64 length, crc, data, crc."""
    for file in sorted((folder / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_tensorboard(tmp_path):
    with MetricLog(tmp_path) as writer:
        writer.write(7, {"loss": 0.5, "val/top1": 25.0})
    scalars = {v.tag: (e.step, v.simple_value) for e in events(tmp_path) for v in e.summary.value}
    assert scalars == {"loss": (7, 0.5), "val/top1": (7, 25.0)}


def test_tensorboard_purges_what_comes_after_start(tmp_path):
    with MetricLog(tmp_path, start=4):
        pass
    starts = [e.step for e in events(tmp_path) if e.HasField("session_log")]
    assert starts == [5]


def test_an_evaluation_done_again_after_a_crash_is_one_line(tmp_path):
    with MetricLog(tmp_path) as writer:
        writer.write(4, {"loss": 0.5})
        writer.write(4, {"val/top1": 10.0})
    with MetricLog(tmp_path, start=4) as writer:
        writer.write(4, {"val/top1": 10.0})
    assert steps(tmp_path) == [4, 4]


def test_an_inactive_writer_touches_nothing(tmp_path):
    with MetricLog(tmp_path / "none", active=False) as writer:
        writer.write(1, {"loss": 0.5})
    assert not (tmp_path / "none").exists()


def test_the_same_as_csv(tmp_path):
    with MetricLog(tmp_path) as writer:
        writer.write(2, {"loss": 0.5})
        writer.write(4, {"loss": 0.25})
        writer.write(2, {"val/top1": 10.0})  # of an evaluation that took longer
        writer.flush()
        assert (tmp_path / "metrics.csv").read_text() == "step,loss,val/top1\n2,0.5,10.0\n4,0.25,\n"
    with MetricLog(tmp_path, start=2):
        pass
    assert (tmp_path / "metrics.csv").read_text() == "step,loss,val/top1\n2,0.5,10.0\n"


class Tracker(types.ModuleType):
    """wandb's part that is used."""

    Error = type("Error", (Exception,), {})

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def init(self, **given):
        self.calls.append(given)
        return self

    def define_metric(self, name, step_metric):
        self.calls.append((name, step_metric))

    def log(self, line):
        self.calls.append(line)

    def finish(self, exit_code):
        self.calls.append(exit_code)


def test_weights_and_biases(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "p")
    monkeypatch.setitem(sys.modules, "wandb", wandb := Tracker())
    folder = tmp_path / "work" / "mae"
    folder.mkdir(parents=True)
    (folder / "stage.json").write_text('{"a": 1}')
    for start in (0, 1):
        with MetricLog(folder, start) as writer:
            writer.write(start + 1, {"loss": 0.5})
    (first, axis, line, code), again = wandb.calls[:4], wandb.calls[4]
    assert first["name"] == "work/mae" and first["config"] == {"a": 1} and first["resume"] == "allow"
    assert (axis, line, code) == (("*", "step"), {"step": 1, "loss": 0.5}, 0)
    assert again["id"] == first["id"]  # it went on
    with pytest.raises(ZeroDivisionError), MetricLog(folder):
        1 / 0  # noqa: B018
    assert wandb.calls[-1] == 1 and wandb.calls[-3]["id"] != first["id"]  # from the start: another run


def test_weights_and_biases_that_is_missing_or_refuses_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "p")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="^WANDB_PROJECT is set and the package is missing: pip install wandb"):
        MetricLog(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", wandb := Tracker())
    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(wandb.Error("no key")))
    (tmp_path / "stage.json").write_text("{}")
    with pytest.raises(InputError, match="no key.*wandb login"):
        MetricLog(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
