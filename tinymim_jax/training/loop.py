"""The training loop: one, for every task."""

import concurrent.futures
import contextlib
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils.epath import Path

from tinymim_jax.data import pipeline, resident
from tinymim_jax.evals.contract import Measurement, Result, save_arrays, scalars
from tinymim_jax.experiment import stage_file
from tinymim_jax.experiment.config import Stage
from tinymim_jax.runtime import keys, multihost, sharding, storage
from tinymim_jax.runtime.metric_log import MetricLog, write_json
from tinymim_jax.runtime.preemption import StopRequest
from tinymim_jax.tasks.contract import Batch, Variables
from tinymim_jax.training import start
from tinymim_jax.training.progress import BAD_IMAGES, Progress, replica_metric
from tinymim_jax.training.setup import StageSetup
from tinymim_jax.training.step import TrainState, jit_step, stage_keys, to_items
from tinymim_jax.weights import handoff
from tinymim_jax.weights.checkpoint import Checkpoints, save_model

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


def run_stage(
    stage: Stage,
    name: str,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    stop: StopRequest | None = None,
    guard: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Runs `stage` in `workdir`/`name` to its end, from its own newest checkpoint if it has one, or until `stop`.

    Writes stage.json, metrics.jsonl, tensorboard/, checkpoints/ and, at the end, DONE with the final metrics:
    the last training averages and every evaluator's results, which it returns; of several replicas, a folder like that
    of a finished stage each. `guard` raises once this process may write no longer.

    Raises:
      InputError: bad input, or a loss that is not finite.
      Interrupted: after Ctrl-C or SIGTERM, the state saved.
    """
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest()) if stop is None else stop
        loaded = multihost.raise_everywhere(lambda: start.load(stage, name, workdir, mesh))
        setup, folder, run = loaded.setup, workdir / name, stage.run
        begun = start.begin(loaded, workdir)  # before anything is written
        state, total = begun.state, setup.total_steps
        multihost.check_stop(stop, f"before stage {name}")
        first = int(np.ravel(jax.device_get(state.step))[0])
        content = stage_file.describe(stage, setup.untrained(), start.classes_of(stage), len(loaded.rows.source))
        multihost.run_on_primary(lambda: write_json(folder / "stage.json", content))
        checkpoints = stack.enter_context(Checkpoints(folder, run.keep))
        lines = [f"{name}: {total} steps of {run.batch_size} images", *loaded.report, *begun.report]
        print("\n  ".join([*lines, *setup.untrained_line()]), flush=True)
        log = multihost.raise_everywhere(lambda: MetricLog(folder, first, active=jax.process_index() == 0))
        stack.enter_context(log)
        batches = multihost.raise_everywhere(lambda: batches_of(loaded, first, mesh, stop))
        stack.enter_context(contextlib.closing(batches))
        note = start.BadSteps(loaded, folder)
        past = {"start": first, "saved": begun.log, "begin": begin}
        progress = Progress(name, log, total=total, run=run, stop=stop, note=note, **past)
        stack.enter_context(progress.bar)
        rng = stage_keys(setup, keys.STEPS, mesh)
        train_step = jit_step(setup, mesh, begun.shardings, run.steps_per_call)
        evaluations = Evaluations(loaded, log, stop)

        def save(step: int) -> None:
            """Waits for what is evaluated; then starts to write all that a run needs to go on from `step`."""
            progress.collect()  # a state whose loss is not finite is never saved
            evaluations.wait()  # a run that goes on from here does not evaluate what came before
            multihost.run_on_primary(lambda: (guard(), log.flush()))
            checkpoints.save(step, to_items(state), progress.state())

        def leave(step: int) -> None:
            checkpoints.wait()
            stop.obey(f"stage {name} stopped at step {step} of {total}")

        if evaluations.is_missing(first) and not evaluations.begin(first, state):
            leave(first)
        for steps in pipeline.calls(first, total, run.steps_per_call):
            step = steps.stop  # how many are done then
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                batch = progress.next_batch(batches)
                with jax.transfer_guard("disallow"):
                    state, step_metrics = train_step(state, loaded.frozen, batch, rng)
            progress.add(step, step_metrics)
            last = step == total
            if step % run.log_every == 0 or last:
                progress.log(step, {"epoch": step / setup.steps_per_epoch})
            asked = progress.is_asked()  # read once: what is not saved must not be left
            if step % run.checkpoint_every == 0 or last or asked:
                save(step)
            if asked and not last:
                leave(step)
            if evaluations.is_due(step) and not evaluations.begin(step, state):
                save(step)
                leave(step)

        if total == 0:
            save(0)
        checkpoints.wait()  # from here on the state is safe
        try:
            evaluated = evaluations.final(state)
        except Stopped:
            stop.obey(f"stage {name} stopped while it was evaluated")
        if bad := progress.totals[BAD_IMAGES]:
            print(f"{name}: images left out because they could not be read: {bad}, all epochs together")
        results = {**progress.averages, **evaluated}
        if run.replicas > 1:
            write_replicas(setup, folder, state, results, mesh, guard)

        def finish() -> None:
            guard()
            log.write(total, evaluated)
            log.flush()  # a stage that is DONE is not run again
            write_json(folder / "DONE", {"step": total, "metrics": results})

        multihost.run_on_primary(finish)
        multihost.raise_everywhere(lambda: storage.wait_for(folder / "DONE"))  # others may read it now
        multihost.check_stop(stop, f"stopped after stage {name}")
    return results


def batches_of(loaded: start.Loaded, first: int, mesh: jax.sharding.Mesh, stop: StopRequest) -> Iterator[Batch]:
    """The batches of the steps after step `first`."""
    stage = loaded.setup.stage
    read = resident.train_batches if stage.data.resident else pipeline.train_batches
    return read(loaded.rows, first, loaded.setup.total_steps, mesh, stop, stage.run.steps_per_call)


def write_replicas(
    setup: StageSetup, folder: Path, state: TrainState, results: dict[str, float], mesh: jax.sharding.Mesh,
    guard: Callable[[], object],
) -> None:  # fmt: skip
    """A folder for each replica, like that of the finished stage that it is."""
    init = setup.stage.init
    is_paired = init is not None and bool(handoff.replicas(handoff.source_folder(init, folder.parent)))
    host = sharding.get_tree({"params": state.params, "model_state": state.model_state, "ema": state.ema}, mesh)

    def write(replica: int) -> None:
        guard()
        own = folder / handoff.replica_name(replica)
        storage.remove(own)  # what a killed run has left
        save_model(own, **jax.tree.map(lambda x: x[replica], host))
        single = setup.as_single(replica, is_paired)
        write_json(own / "stage.json", stage_file.describe(single, setup.untrained(), start.classes_of(single)))
        prefix = replica_metric(replica, "")
        metrics = {key.removeprefix(prefix): value for key, value in results.items() if key.startswith(prefix)}
        write_json(own / "DONE", {"step": setup.total_steps, "metrics": metrics})

    for replica in range(setup.stage.run.replicas):
        multihost.run_on_primary(lambda replica=replica: write(replica))
        done = folder / handoff.replica_name(replica) / "DONE"
        multihost.raise_everywhere(lambda done=done: storage.wait_for(done))
