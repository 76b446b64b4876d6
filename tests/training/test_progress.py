import json
import time

import jax.numpy as jnp
import numpy as np
import pytest

from tinymim_jax.experiment.config import Run
from tinymim_jax.objectives.metrics import Mean
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.preemption import StopRequest
from tinymim_jax.training.progress import Progress


class Lines(list):
    """A writer that keeps what it is given."""

    active = True

    def write(self, step, scalars):
        self.append((step, scalars))


def make_progress(saved=None, start=0, **run):
    lines = Lines()
    return Progress(
        "tiny", lines, start=start, total=10, run=Run(batch_size=4, **run), saved=saved, stop=StopRequest()
    ), lines


def step_metrics(loss, count=4.0, **others):
    others = {key: Mean(jnp.float32(value), jnp.float32(1)) for key, value in others.items()}
    return {"loss": Mean(jnp.float32(loss), jnp.float32(count)), **others}


def without_speed(scalars):
    return {key: value for key, value in scalars.items() if key not in ("images_per_s", "data_wait")}


def test_averages_between_log_lines():
    progress, lines = make_progress()
    progress.add(1, step_metrics(4.0, kl=1.0))
    progress.add(2, step_metrics(2.0, count=1.0, kl=2.0))
    progress.log(2, {"lr": 0.1})
    progress.add(3, step_metrics(8.0, kl=7.0))
    progress.log(3, {"lr": 0.2})
    assert [step for step, _ in lines] == [2, 3]
    # (4 + 2) / (4 + 1), not the mean of 1 and 2
    assert without_speed(lines[0][1]) == pytest.approx({"loss": 1.2, "kl": 1.5, "lr": 0.1, "bad_images": 0})
    assert without_speed(lines[1][1]) == {"loss": 2.0, "kl": 7.0, "lr": 0.2, "bad_images": 0}
    assert progress.averages == {"loss": 2.0, "kl": 7.0, "lr": 0.2, "bad_images": 0}


def test_the_first_line_says_when_the_first_step_was_done():
    lines, begin = Lines(), time.perf_counter() - 5
    fresh = {"start": 0, "saved": None, "stop": StopRequest()}
    progress = Progress("tiny", lines, total=10, run=Run(batch_size=4), begin=begin, **fresh)
    progress.collect()  # nothing yet
    for step in (1, 2):
        time.sleep(0.01)
        progress.add(step, step_metrics(1.0))
        progress.log(step, {})
    assert 5.01 < lines[0][1]["first_step_s"] < 60 and "first_step_s" not in lines[1][1]


def test_speed():
    progress, lines = make_progress()

    def slow():
        time.sleep(0.05)
        yield "batch"

    begin = time.perf_counter()
    next(slow())
    progress.add(1, step_metrics(1.0), time.perf_counter() - begin)
    progress.log(1, {})
    speed = lines[0][1]
    assert 0.5 < speed["data_wait"] <= 1.0
    assert 4 / 5 < speed["images_per_s"] <= 4 / 0.05
    progress.add(2, step_metrics(1.0))
    progress.log(2, {})
    assert lines[1][1]["data_wait"] == 0.0
    assert lines[1][1]["images_per_s"] > speed["images_per_s"]


def test_the_bar_goes_on_where_the_run_does():
    progress, _ = make_progress(start=3)
    assert (progress.bar.n, progress.bar.total, progress.bar.first) == (3, 10, "compiling")
    progress.add(4, step_metrics(1.0))
    assert progress.bar.n == 3  # dispatched, and perhaps not done
    progress.collect()
    assert (progress.bar.n, progress.bar.first) == (4, "")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_loss_is_named(bad):
    progress, lines = make_progress()
    for step, loss in ((6, 1.0), (7, bad), (8, 1.0), (9, float("nan"))):
        progress.add(step, step_metrics(loss))
    with pytest.raises(InputError, match="stage tiny: the loss is not finite at step 7; ") as error:
        progress.collect()
    assert "optim.lr" in str(error.value) and "\n" not in str(error.value)
    assert lines == []


def test_steps_of_one_call_are_told_apart():
    progress, lines = make_progress()
    stack = {
        "loss": Mean(jnp.array([8.0, 4.0, jnp.nan]), jnp.full(3, 4.0)),
        "bad_images": Mean(jnp.ones(3), jnp.ones(3)),
    }
    progress.add(6, stack)
    with pytest.raises(InputError, match="the loss is not finite at step 6; "):
        progress.collect()
    progress, lines = make_progress()
    progress.add(2, {name: Mean(m.sum[:2], m.count[:2]) for name, m in stack.items()})
    progress.log(2, {})
    assert without_speed(lines[0][1]) == {"loss": 1.5, "bad_images": 2}


def test_other_metrics_may_be_anything():
    progress, lines = make_progress()
    progress.add(1, step_metrics(1.0, kl=float("inf")))
    progress.log(1, {})
    assert lines[0][1]["kl"] == float("inf")


@pytest.mark.parametrize("norm", ["grad_norm", "param_norm"])
def test_a_bad_update_is_named(norm):
    """A finite loss whose gradient is not: the parameters after this step are bad, and would be saved as good."""
    progress, _ = make_progress()
    progress.add(5, step_metrics(1.0, **{norm: float("nan")}))
    with pytest.raises(InputError, match="not finite at step 5"):
        progress.collect()


def test_a_batch_without_a_valid_image_counts_for_nothing():
    progress, lines = make_progress()
    progress.add(1, step_metrics(0.0, count=0.0))
    progress.add(2, step_metrics(6.0, count=3.0))
    progress.log(2, {})
    assert lines[0][1]["loss"] == 2.0


def test_an_interrupted_run_writes_what_an_uninterrupted_one_does():
    losses = np.random.default_rng(0).normal(size=12).astype(np.float32)

    def run(progress, lines, first, last):
        for step in range(first, last + 1):
            progress.add(step, step_metrics(losses[step - 1], count=step, kl=step / 7))
            if step % 5 == 0 or step == 12:
                progress.log(step, {"lr": step * 0.1})
        return [(step, without_speed(scalars)) for step, scalars in lines]

    whole = run(*make_progress(), 1, 12)
    assert [step for step, _ in whole] == [5, 10, 12]
    for stop in range(1, 12):
        progress, lines = make_progress()
        before = run(progress, lines, 1, stop)
        progress.collect()
        saved = json.loads(json.dumps(progress.state()))  # as the checkpoint keeps it
        after = run(*make_progress(saved, start=stop), stop + 1, 12)
        assert before + after == whole, stop


def test_state_holds_the_last_averages():
    progress, _ = make_progress()
    assert progress.state() == {"window": {}, "averages": {}, "totals": {"bad_images": 0}}
    progress.add(1, step_metrics(2.0))
    progress.log(1, {"lr": 0.5})
    progress.add(2, step_metrics(3.0, count=2.0))
    progress.collect()
    averages = {"loss": 0.5, "lr": 0.5, "bad_images": 0}
    assert progress.state() == {"window": {"loss": [3.0, 2.0]}, "averages": averages, "totals": {"bad_images": 0}}
    resumed, _ = make_progress(progress.state(), start=2)
    assert resumed.averages == averages  # a run that was over has its results
    assert resumed.state() == progress.state()


def test_bad_images_are_counted_over_the_whole_run():
    progress, lines = make_progress()
    for step, bad in enumerate([2.0, 0.0, 3.0], 1):
        progress.add(step, step_metrics(1.0, bad_images=bad))
        progress.log(step, {})
    assert [scalars["bad_images"] for _, scalars in lines] == [2, 2, 5]
    resumed, lines = make_progress(json.loads(json.dumps(progress.state())), start=3)
    resumed.add(4, step_metrics(1.0, bad_images=1.0))
    resumed.log(4, {})
    assert lines[0][1]["bad_images"] == 6


def test_collecting_twice_counts_once():
    progress, _ = make_progress()
    progress.add(1, step_metrics(2.0))
    progress.collect()
    progress.collect()
    assert progress.state()["window"] == {"loss": [2.0, 4.0]}
