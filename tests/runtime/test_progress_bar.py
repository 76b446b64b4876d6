import io
import re

import pytest

from tinymim_jax.runtime import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [1000.0]
    init = progress_bar.tqdm.tqdm.__init__

    def with_clock(self, *args, **options):
        init(self, *args, **options)
        self._time = lambda: now[0]
        self.start_t = self.last_print_t = now[0]

    monkeypatch.setattr(progress_bar.tqdm.tqdm, "__init__", with_clock)
    return now


def train(clock, stream, monkeypatch, **options):
    """100 s until the first of 400 steps is done, then one each 0.5 s of 64 images, up to step 120."""
    monkeypatch.setattr("sys.stderr", stream)
    with progress_bar.bar("mae", 400, "step", first="compiling", speed=(64, "img"), **options) as bar:
        for _ in range(120):
            clock[0] += 100 if bar.first else 0.5
            bar.update()
            bar.note = " loss 0.34"
    return stream.getvalue()


def test_a_log_has_plain_lines(clock, monkeypatch):
    text = train(clock, io.StringIO(), monkeypatch)
    assert "\r" not in text and "\x1b" not in text
    lines = text.splitlines()
    assert lines[0] == "mae: compiling"
    # 128 images a second, as if there had been no 100 s of compiling; (400 - 120) / 2 seconds are left.
    assert lines[-1] == "mae: step 120/400 loss 0.34 128 img/s eta 02:20"
    steps = [int(re.search(r"step (\d+)/400", line)[1]) for line in lines[1:]]
    assert steps == [2, 22, 42, 62, 82, 102, 120]  # each ten seconds, and the last


def test_a_terminal_has_a_bar(clock, monkeypatch):
    text = train(clock, Terminal(), monkeypatch, ncols=100, ascii=True)
    shown = [part for part in text.split("\r") if part.strip()]
    assert shown[0].startswith("mae, compiling:   0%|") and "? img/s" in shown[0]
    assert "120/400 [00:59<02:20, 128 img/s loss 0.34]" in shown[-1] and shown[-1].startswith("mae:  30%|###")


def test_going_on_does_not_count_what_was_done_before(clock, monkeypatch):
    monkeypatch.setattr("sys.stderr", stream := io.StringIO())
    with progress_bar.bar("mae", 400, "step", initial=300) as bar:
        for _ in range(3):
            clock[0] += 2
            bar.update(10)
    assert stream.getvalue().splitlines()[-1] == "mae: step 330/400 5.00 step/s eta 00:14"


def test_short_work_that_is_not_to_leave_a_trace_has_no_line(clock, monkeypatch):
    monkeypatch.setattr("sys.stderr", stream := io.StringIO())
    for seconds, lines in ((1, 0), (4, 1)):
        with progress_bar.bar("val", 6, "batch", leave=False) as bar:
            for _ in range(6):
                clock[0] += seconds
                bar.update()
        assert len(stream.getvalue().splitlines()) == lines


def test_nothing_is_shown_of_what_is_disabled(clock, monkeypatch):
    assert train(clock, io.StringIO(), monkeypatch, disable=True) == ""
