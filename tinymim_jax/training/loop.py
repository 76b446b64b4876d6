"""The training loop: one, for every task."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
from etils.epath import Path

from tinymim_jax.data import pipeline, resident
from tinymim_jax.experiment import stage_file
from tinymim_jax.experiment.config import Stage
from tinymim_jax.runtime import keys, multihost, sharding, storage
from tinymim_jax.runtime.errors import Unavailable
from tinymim_jax.runtime.metric_log import MetricLog, write_json
from tinymim_jax.runtime.preemption import StopRequest
from tinymim_jax.training import start
from tinymim_jax.training.evaluations import Evaluations, Stopped
from tinymim_jax.training.progress import BAD_IMAGES, Progress, replica_metric
from tinymim_jax.training.step import jit_step, side_by_side, stage_keys, to_items
from tinymim_jax.weights import handoff
from tinymim_jax.weights.checkpoint import Checkpoints, save_model


def run_stage(
    stage: Stage, name: str, workdir: Path, mesh: jax.sharding.Mesh, stop: StopRequest | None = None,
    guard: Callable[[], object] = lambda: None,
) -> dict[str, float]:  # fmt: skip
    """Runs `stage` in `workdir`/`name` to its end, from its own newest checkpoint if it has one, or until `stop`.

    Writes stage.json, metrics.jsonl, tensorboard/, checkpoints/ and, at the end, DONE with the final metrics:
    the last training averages and every evaluator's results, which it returns; of several replicas, a folder like that
    of a finished stage each. `guard` raises once this process may write no longer.

    Raises:
      InputError: bad input, or a loss that is not finite.
      Interrupted: after Ctrl-C or SIGTERM, the state saved.
    """
    return run_side_by_side({name: stage}, workdir, mesh, stop, guard)[name]


def run_side_by_side(
    stages: Mapping[str, Stage], workdir: Path, mesh: jax.sharding.Mesh, stop: StopRequest | None = None,
    guard: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """`run_stage` of several that see the same batches and whose tasks can share, all in one program."""
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest()) if stop is None else stop
        runs: list[_Run] = []
        for name, stage in stages.items():
            others = f" and {len(stages) - 1} more" if len(stages) > 1 else ""
            runs.append(_Run(stage, name, workdir, mesh, stop, guard, stack, "" if runs else f"{name}{others}"))
            share_frozen(runs)
        train(runs, mesh, stop, stack)
        return {run.setup.name: run.finish() for run in runs}


def share_frozen(runs: list["_Run"]) -> None:
    """The frozen networks of the newest run or those of the others, whichever reach further, serve all."""
    frozen = max((run.loaded.frozen for run in runs), key=lambda tree: len(jax.tree.leaves(tree)))
    for run in runs:
        run.loaded = dataclasses.replace(run.loaded, frozen=frozen)
        run.evaluations.frozen = frozen


def train(runs: list["_Run"], mesh: jax.sharding.Mesh, stop: StopRequest, stack: contextlib.ExitStack) -> None:
    """All to their last step, whose checkpoint is written then; raises Interrupted."""
    lead = runs[0]
    run, first, total = lead.setup.stage.run, lead.first, lead.setup.total_steps
    if any(other.first != first for other in runs):
        raise Unavailable(f"{lead.setup.name} and the stages beside it are at different steps; run the command again")
    setups, shardings = [one.setup for one in runs], tuple(one.shardings for one in runs)
    step = jit_step(side_by_side(setups), mesh, shardings, run.steps_per_call)
    rngs = tuple(stage_keys(setup, keys.STEPS, mesh) for setup in setups)
    read = resident.train_batches if lead.setup.stage.data.resident else pipeline.train_batches
    rows = lead.loaded.rows
    batches = multihost.raise_everywhere(lambda: read(rows, first, total, mesh, stop, run.steps_per_call))
    stack.enter_context(contextlib.closing(batches))

    def leave(done: int) -> None:
        for one in runs:
            one.checkpoints.wait()
        stop.obey(f"stage {' and '.join(setup.name for setup in setups)} stopped at step {done} of {total}")

    if not all(one.catch_up() for one in runs):
        leave(first)
    for steps in pipeline.calls(first, total, run.steps_per_call):
        done = steps.stop  # how many steps are done then
        with jax.profiler.StepTraceAnnotation("train", step_num=done):
            begin = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - begin
            with jax.transfer_guard("disallow"):
                states, metrics = step(tuple(one.state for one in runs), lead.loaded.frozen, batch, rngs)
        for one, state, values in zip(runs, states, metrics, strict=True):
            one.state = state
            one.progress.add(done, values, waited)
        last = done == total
        if done % run.log_every == 0 or last:
            for one in runs:
                one.progress.log(done, {"epoch": done / one.setup.steps_per_epoch})
        asked = lead.progress.is_asked()  # read once: what is not saved must not be left
        if done % run.checkpoint_every == 0 or last or asked:
            save_all(runs, done)
        if asked and not last:
            leave(done)
        if not all(one.evaluate(done) for one in runs):
            save_all(runs, done)
            leave(done)
    if total == 0:
        save_all(runs, 0)
    for one in runs:
        one.checkpoints.wait()  # from here on the state is safe


def save_all(runs: list["_Run"], done: int) -> None:
    """Starts to write what is needed to go on from step `done`."""
    for one in runs:
        one.save(done)


class _Run:
    """A stage under way, from its newest checkpoint; what it opens is closed by `stack`."""

    def __init__(
        self, stage: Stage, name: str, workdir: Path, mesh: jax.sharding.Mesh, stop: StopRequest,
        guard: Callable[[], object], stack: contextlib.ExitStack, title: str,
    ):  # fmt: skip
        begin = time.perf_counter()
        self.loaded = loaded = multihost.raise_everywhere(lambda: start.load(stage, name, workdir, mesh))
        self.setup, self.folder, self.mesh, self.stop, self.guard = loaded.setup, workdir / name, mesh, stop, guard
        begun = start.begin(loaded, workdir)  # before anything is written
        self.state, self.shardings, self.total = begun.state, begun.shardings, loaded.setup.total_steps
        multihost.check_stop(stop, f"before stage {name}")
        self.first = int(np.ravel(jax.device_get(begun.state.step))[0])
        multihost.run_on_primary(lambda: self._describe([*loaded.report, *begun.report]))
        self.checkpoints = stack.enter_context(Checkpoints(self.folder, stage.run.keep))
        lines = [f"{name}: {self.total} steps of {stage.run.batch_size} images", *loaded.report, *begun.report]
        print("\n  ".join([*lines, *self.setup.untrained_line()]), flush=True)
        is_primary = jax.process_index() == 0
        self.log = multihost.raise_everywhere(lambda: MetricLog(self.folder, self.first, active=is_primary))
        stack.enter_context(self.log)
        note = functools.partial(start.note_bad_step, loaded.rows, self.folder / "bad_steps.jsonl")
        past = {"start": self.first, "saved": begun.log, "begin": begin, "title": title}
        self.progress = Progress(name, self.log, total=self.total, run=stage.run, stop=stop, note=note, **past)
        stack.enter_context(self.progress.bar)
        self.evaluations = Evaluations(loaded, self.log, stop)

    def _describe(self, handover: list[str]) -> None:
        """Writes stage.json; of a run that goes on, the hand-over is that of its begin."""
        stage, folder, source = self.setup.stage, self.folder, self.loaded.rows.source
        if self.first and (folder / "stage.json").is_file():
            handover = stage_file.read(folder).get("handover", handover)
        facts = self.setup.untrained(), start.classes_of(stage), len(source), handover
        write_json(folder / "stage.json", stage_file.describe(stage, *facts))

    def catch_up(self) -> bool:
        """Does an evaluation that was due when the last run ended; False if a stop was asked for meanwhile."""
        return not self.evaluations.is_missing(self.first) or self.evaluations.begin(self.first, self.state)

    def evaluate(self, step: int) -> bool:
        """Begins the evaluation that is due after `step`, if there is one; False as `catch_up`."""
        return not self.evaluations.is_due(step) or self.evaluations.begin(step, self.state)

    def save(self, step: int) -> None:
        """Waits for what is evaluated; then starts to write all that a run needs to go on from `step`."""
        self.progress.collect()  # a state whose loss is not finite is never saved
        self.evaluations.wait()  # a run that goes on from here does not evaluate what came before
        multihost.run_on_primary(lambda: (self.guard(), self.log.flush()))
        self.checkpoints.save(step, to_items(self.state), self.progress.state())

    def finish(self) -> dict[str, float]:
        """Evaluates the final weights and writes DONE; returns what it says."""
        name, folder = self.setup.name, self.folder
        try:
            evaluated = self.evaluations.final(self.state)
        except Stopped:
            self.stop.obey(f"stage {name} stopped while it was evaluated")
        if bad := self.progress.totals[BAD_IMAGES]:
            print(f"{name}: images left out because they could not be read: {bad}, all epochs together")
        results = {**self.progress.averages, **evaluated}
        if self.setup.stage.run.replicas > 1:
            self._write_replicas(results)

        def close() -> None:
            self.guard()
            self.log.write(self.total, evaluated)
            self.log.flush()  # a stage that is DONE is not run again
            write_json(folder / "DONE", {"step": self.total, "metrics": results})

        multihost.run_on_primary(close)
        multihost.raise_everywhere(lambda: storage.wait_for(folder / "DONE"))  # others may read it now
        multihost.check_stop(self.stop, f"stopped after stage {name}")
        return results

    def _write_replicas(self, results: dict[str, float]) -> None:
        """A folder for each replica, like that of the finished stage that it is."""
        setup, folder, init = self.setup, self.folder, self.setup.stage.init
        is_paired = init is not None and bool(handoff.replicas(handoff.source_folder(init, folder.parent)))
        host = sharding.get_tree(to_items(self.state)["model"], self.mesh)

        def write(replica: int) -> None:
            self.guard()
            own = folder / handoff.replica_name(replica)
            Path(own).rmtree(missing_ok=True)  # what a killed run has left
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
