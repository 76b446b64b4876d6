"""A stage's evaluators while it trains, and at its end."""

import concurrent.futures
import itertools
import statistics
import threading
from collections.abc import Callable
from typing import Any

import jax

from tinymim_jax.evals.contract import Measurement, Result, save_arrays, scalars
from tinymim_jax.runtime import multihost
from tinymim_jax.runtime.metric_log import MetricLog
from tinymim_jax.runtime.preemption import StopRequest
from tinymim_jax.tasks.contract import Variables
from tinymim_jax.training import start
from tinymim_jax.training.progress import replica_metric
from tinymim_jax.training.step import TrainState
from tinymim_jax.weights import handoff

CHECK_EVERY = 16  # batches of an evaluation, after which several processes ask each other whether to stop


class Evaluations:
    """A stage's evaluators: devices go over the data at once, between two steps; the host's part is done beside."""

    def __init__(self, loaded: start.Loaded, log: MetricLog, stop: StopRequest):
        self.setup, self.frozen, self.log, self.stop = loaded.setup, loaded.frozen, log, stop
        self.measurement = Measurement(loaded.evaluators)
        self.pending: tuple[int, concurrent.futures.Future] | None = None

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after `step`; the last apart, which is always."""
        every = self.setup.stage.run.eval_every
        return bool(self.measurement and every) and 0 < step < self.setup.total_steps and step % every == 0

    def is_missing(self, step: int) -> bool:
        """Whether the evaluation of a step that a run begins at was due and is not logged."""
        names = tuple(f"{name}/" for name in self.setup.stage.evals)
        return self.is_due(step) and not multihost.run_on_primary(lambda: self.log.has(step, names))

    def begin(self, step: int, state: TrainState) -> bool:
        """Evaluates the weights after `step`, all but the host's part; False if a stop was asked for meanwhile."""
        self.wait()
        try:
            finish = self._on_devices(state, f"{self.setup.name}, evaluation")
        except Stopped:
            return False
        self.pending = step, in_thread(finish)
        return True

    def wait(self) -> None:
        """Returns when the results of what was begun are written; raises what the evaluator raised."""
        if self.pending is not None:
            (step, future), self.pending = self.pending, None
            self.log.write(step, multihost.raise_everywhere(future.result))

    def final(self, state: TrainState) -> dict[str, float]:
        """{"<eval>/<metric>": value} of the final weights; raises `Stopped`."""
        self.wait()
        return multihost.raise_everywhere(self._on_devices(state, f"{self.setup.name}, evaluation"))

    def _on_devices(self, state: TrainState, title: str) -> Callable[[], dict[str, float]]:
        calls, every = itertools.count(1), 1 if jax.process_count() == 1 else CHECK_EVERY

        def check() -> None:
            if next(calls) % every == 0 and multihost.agreed(self.stop.asked):
                raise Stopped

        replicas = self.setup.stage.run.replicas
        finishes = [
            self.measurement.run(variables_of(state, replica, replicas), self.frozen, title, check)
            for replica in range(replicas)
        ]
        return lambda: self._stored([finish() for finish in finishes])

    def _stored(self, results: list[dict[str, Result]]) -> dict[str, float]:
        """Scalars, of several replicas their mean, too; arrays go to the stage's folder."""
        for replica, found in enumerate(results):
            for name, result in found.items():
                own = name if len(results) == 1 else f"{handoff.replica_name(replica)}_{name}"
                save_arrays(result, self.log.path.parent / "evals" / f"{own}.npz")
        each = [scalars(found) for found in results]
        if len(each) == 1:
            return each[0]
        means = {key: statistics.fmean(one[key] for one in each) for key in each[0]}
        return means | {replica_metric(r, key): value for r, one in enumerate(each) for key, value in one.items()}


class Stopped(Exception):
    """An evaluation was left because a stop was asked for, in all processes alike."""


def in_thread(function: Callable[[], Any]) -> concurrent.futures.Future:
    """`function` under way in a thread that nothing waits for at the end."""
    future: concurrent.futures.Future = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def variables_of(state: TrainState, replica: int, replicas: int) -> Variables:
    """What is evaluated of one of `replicas`: the averaged weights if there are any."""
    variables = {"params": state.ema or state.params, **state.model_state}
    return variables if replicas == 1 else _take(variables, replica)


@jax.jit
def _take(tree: Any, replica: jax.Array) -> Any:
    return jax.tree.map(lambda x: x[replica], tree)
