"""The training loop: one, for every task."""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from etils.epath import Path

from tinymim_jax.data import pipeline, resident, sources
from tinymim_jax.evals import make_evaluator
from tinymim_jax.evals.contract import make_predict, measure
from tinymim_jax.evals.online import Online
from tinymim_jax.experiment import config
from tinymim_jax.experiment.config import Stage
from tinymim_jax.runtime import codec, multihost, storage
from tinymim_jax.runtime import sharding as mesh_lib
from tinymim_jax.runtime.errors import InputError, Unavailable
from tinymim_jax.runtime.metric_log import MetricLog, read, write_json, write_whole
from tinymim_jax.runtime.preemption import StopRequest
from tinymim_jax.tasks.contract import Batch, Frozen, Variables
from tinymim_jax.training.progress import BAD_IMAGES, Progress
from tinymim_jax.training.setup import StageSetup, make_setup, teacher_init
from tinymim_jax.training.step import TrainState, create_state, from_items, jit_step, to_items
from tinymim_jax.weights import checkpoint, handoff
from tinymim_jax.weights.checkpoint import Checkpoints

CHECK_EVERY = 16  # batches of the final evaluation, after which several processes ask each other whether to stop
EVALUATING, EVALUATED = "evaluating", "evaluated"  # in a checkpoint: step and weights of an unfinished evaluation


class Runner:
    """One stage in one folder: everything that `run_stage` puts together before it loops."""

    def __init__(self, stage: Stage, name: str, workdir: Path, mesh: jax.sharding.Mesh):
        self.stage, self.name, self.workdir, self.mesh = stage, name, workdir, mesh
        self.folder = workdir / name
        self.cut_short = f"stage {name} stopped while it was evaluated"
        mesh_lib.check_batch(stage.run.batch_size, mesh, stage.optim.accum_steps)
        self.source = sources.open_source(stage.data)
        init = teacher_init(stage)
        teacher = handoff.read_model(handoff.source_folder(init, workdir)) if init else None
        self.plan = make_setup(stage, teacher, len(self.source))
        self.rows = pipeline.train_rows(stage.data, self.source, stage.run.batch_size, stage.run.seed)
        self.evaluators = {key: make_evaluator(cfg, mesh) for key, cfg in stage.evals.items()}
        self.predict = make_predict(self.plan.task, mesh)
        self.report: list[str] = []
        self.frozen = self._load_teacher(init) if init else {}

    def _load_teacher(self, init: config.Init) -> Frozen:
        frozen = self._hand_over("teacher", self.plan.frozen, handoff.for_teacher(init))
        return mesh_lib.put_tree(frozen, mesh_lib.state_sharding(self.mesh, frozen))

    def _hand_over(self, what: str, target: Any, init: config.Init) -> Any:
        folder = handoff.source_folder(init, self.workdir)
        params, untrained = handoff.read_params(folder), handoff.read_untrained(folder)
        try:
            report = handoff.match(handoff.shapes(target), handoff.shapes(params), init, untrained)
        except InputError as error:
            raise InputError(f"stage {self.name}, {what} from {folder}: {error}") from None
        self.report += [f"{what} from {folder}: {report.lines()[0]}", *(f"  {line}" for line in report.lines()[1:])]
        return handoff.transfer(target, params, report)

    def start(self) -> tuple[TrainState, dict[str, Any] | None]:
        """The state to go on from, and its log: own checkpoint, else `init`, else scratch if `init` is None."""
        stage, plan = self.stage, self.plan
        key = jax.random.fold_in(jax.random.key(stage.run.seed), 0)
        shapes = jax.eval_shape(lambda: create_state(plan, key))
        self.shardings = mesh_lib.state_sharding(self.mesh, shapes)
        target = jax.tree.map(
            lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, self.shardings
        )
        # One process decides: a network's file system may show others an older folder.
        for step in reversed(multihost.run_on_primary(lambda: checkpoint.steps(self.folder))):
            multihost.raise_everywhere(lambda step=step: checkpoint.wait_for(self.folder, step))
            try:
                items, log = checkpoint.restore(self.folder, step, to_items(target))
            except Unavailable:
                raise
            except InputError as error:
                self._pass_over(step, error)
                continue
            self.report.append(f"resumed at step {step} of {plan.total_steps}")
            return from_items(items), log
        if multihost.run_on_primary(lambda: (self.folder / "stage.json").is_file()):
            self.report.append("there is no checkpoint from before: begins anew")
        # The key is an argument: stages that differ by seed share one compilation.
        state = jax.jit(lambda key: create_state(plan, key), out_shardings=self.shardings)(key)
        if stage.init is not None:
            fresh = mesh_lib.get_tree(state.params, self.mesh)
            params = multihost.raise_everywhere(lambda: self._hand_over("init", fresh, stage.init))
            state = state.replace(params=mesh_lib.put_tree(params, self.shardings.params))
            if stage.optim.ema:
                state = state.replace(ema=jax.tree.map(jnp.copy, state.params))
        return state, None

    def _pass_over(self, step: int, error: InputError) -> None:
        """Puts a damaged checkpoint aside; raises `error` if there is none older to go on from."""
        if multihost.run_on_primary(lambda: len(checkpoint.steps(self.folder))) == 1:
            raise InputError(f"{error}, and there is no older one; delete {self.folder} to run the stage again")
        multihost.run_on_primary(lambda: checkpoint.set_aside(self.folder, step))
        print(f"{error}; it is put aside, and the one before it used", flush=True)

    def batches(self, start: int, stop: StopRequest) -> Iterator[Batch]:
        """The batches of the steps after step `start`."""
        read = resident.train_batches if self.stage.data.resident else pipeline.train_batches
        return read(self.rows, start, self.plan.total_steps, self.mesh, stop, self.stage.run.steps_per_call)

    def note_bad_step(self, step: int, what: str) -> str:
        """Writes the records of a step whose `what` is not finite into bad_steps.jsonl, once; says so."""
        path = self.folder / "bad_steps.jsonl"
        noted = read(path) if jax.process_index() == 0 else [{"step": step}]
        if all(line["step"] != step for line in noted):
            epoch, index, _ = self.rows.numbers(step - 1)
            records = [self.source.describe(int(i)) for i in index]
            noted.append({"step": step, "epoch": epoch, "not_finite": what, "records": records})
            try:
                write_whole(path, "".join(json.dumps(line) + "\n" for line in noted))
            except OSError as error:  # the loss is what has gone wrong
                return f" (its images could not be written down: {storage.reason(error)})"
        return f" (its images: {path})"

    def variables(self, state: TrainState) -> Variables:
        """What is evaluated: the averaged weights if there are any."""
        return {"params": state.ema or state.params, **state.model_state}

    def online(self, writer: MetricLog) -> Online:
        """Evaluation while training goes on."""
        return Online(self.evaluators, self.predict, self.frozen, writer.write)

    def evaluate(self, state: TrainState, stop: StopRequest) -> dict[str, float]:
        """{"<eval>/<metric>": value} of the final weights; raises Interrupted."""
        title, is_asked = f"{self.name}, evaluation", asker(stop)

        def check() -> None:
            if is_asked():
                stop.obey(self.cut_short)

        return measure(self.evaluators, self.predict, self.variables(state), self.frozen, title, check)

    def is_evaluated(self, step: int) -> bool:
        """Whether an evaluation is due after `step`, the last apart."""
        every = self.stage.run.eval_every
        return bool(self.evaluators and every) and 0 < step < self.plan.total_steps and step % every == 0

    def catch_up(
        self, first: int, state: TrainState, log: dict[str, Any] | None, online: Online, writer: MetricLog
    ) -> None:
        """Makes the evaluations that were under way or due when the run before ended at `first`, and are not logged."""
        variables = self.variables(state)
        began = (log or {}).get(EVALUATING)
        if began is not None and not multihost.run_on_primary(lambda: writer.has(began, "/")):
            target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), variables)
            try:
                items, _ = checkpoint.restore(self.folder, first, {EVALUATED: target})
            except Unavailable:
                raise
            except InputError as error:
                print(f"{error}; the evaluation of step {began} is left out", flush=True)
            else:
                online.start(began, items[EVALUATED])
        if self.is_evaluated(first) and not multihost.run_on_primary(lambda: writer.has(first, "/")):
            online.start(first, variables)


def asker(stop: StopRequest) -> Callable[[], bool]:
    """Whether any process was asked to stop, which several ask each other at every `CHECK_EVERY`th call only."""
    calls, every = itertools.count(1), 1 if jax.process_count() == 1 else CHECK_EVERY
    return lambda: next(calls) % every == 0 and multihost.agreed(stop.asked)


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
    the last training averages and every evaluator's results, which it returns. `guard` raises once this process may
    write no longer.

    Raises:
      InputError: bad input, or a loss that is not finite.
      Interrupted: after Ctrl-C or SIGTERM, the state saved.
    """
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest()) if stop is None else stop
        runner = multihost.raise_everywhere(lambda: Runner(stage, name, workdir, mesh))
        run, total = stage.run, runner.plan.total_steps
        state, log = runner.start()  # before anything is written
        multihost.check_stop(stop, f"before stage {name}")
        first = int(state.step)
        multihost.run_on_primary(lambda: write_json(runner.folder / "stage.json", describe(runner.plan)))
        checkpoints = stack.enter_context(Checkpoints(runner.folder, run.keep))
        lines = [f"{name}: {total} steps of {run.batch_size} images", *runner.report, *runner.plan.untrained_line()]
        print("\n  ".join(lines), flush=True)
        writer = multihost.raise_everywhere(lambda: MetricLog(runner.folder, first, active=jax.process_index() == 0))
        stack.enter_context(writer)
        batches = multihost.raise_everywhere(lambda: runner.batches(first, stop))
        stack.enter_context(contextlib.closing(batches))
        past = {"start": first, "saved": log, "begin": begin}
        progress = Progress(name, writer, total=total, run=run, stop=stop, note=runner.note_bad_step, **past)
        stack.enter_context(progress.bar)
        replicated = mesh_lib.replicated(mesh)
        rng = jax.jit(lambda: jax.random.fold_in(jax.random.key(run.seed), 1), out_shardings=replicated)()
        train_step = jit_step(runner.plan, mesh, runner.shardings, run.steps_per_call)
        online, is_asked = stack.enter_context(runner.online(writer)), asker(stop)
        runner.catch_up(first, state, log, online, writer)

        def save(step: int) -> None:
            """Starts to write all that a run needs to go on from `step`."""
            multihost.run_on_primary(lambda: (guard(), writer.flush()))
            items, log = to_items(state), progress.state()
            if evaluation := online.state():
                log[EVALUATING], items[EVALUATED] = evaluation
            checkpoints.save(step, items, log)

        for steps in pipeline.calls(first, total, run.steps_per_call):
            step = steps.stop  # how many are done then
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                batch = progress.next_batch(batches)
                with jax.transfer_guard("disallow"):
                    state, step_metrics = train_step(state, runner.frozen, batch, rng)
            progress.add(step, step_metrics)
            last = step == total
            if step % run.log_every == 0 or last:
                epoch = step / runner.plan.steps_per_epoch
                progress.log(step, {"lr": float(runner.plan.schedule(step - 1)), "epoch": epoch})
            online.advance()
            is_due = runner.is_evaluated(step)
            # Read once: what is not saved must not be left.
            asked = progress.is_asked() or (is_due and not online.wait(is_asked))
            if step % run.checkpoint_every == 0 or last or asked:
                progress.collect()  # a state whose loss is not finite is never saved
                save(step)
            if asked and not last:
                checkpoints.wait()
                stop.obey(f"stage {name} stopped at step {step} of {total}")
            if is_due:
                online.start(step, runner.variables(state))

        if total == 0:
            save(0)
        checkpoints.wait()  # from here on the state is safe
        if not online.wait(is_asked):
            stop.obey(runner.cut_short)
        evaluated = runner.evaluate(state, stop)
        if bad := progress.totals[BAD_IMAGES]:
            print(f"{name}: images left out because they could not be read: {bad}, all epochs together")
        results = {**progress.averages, **evaluated}

        def finish() -> None:
            guard()
            writer.write(total, evaluated)
            writer.flush()  # a stage that is DONE is not run again
            write_json(runner.folder / "DONE", {"step": total, "metrics": results})

        multihost.run_on_primary(finish)
        multihost.raise_everywhere(lambda: storage.wait_for(runner.folder / "DONE"))  # others may read it now
        multihost.check_stop(stop, f"stopped after stage {name}")
    return results


def describe(plan: StageSetup) -> dict[str, Any]:
    """The contents of `stage.json`: everything needed to build the stage again, and what it ran on."""
    versions = {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")}
    return {
        "format": handoff.FORMAT,
        "stage": codec.to_dict(plan.stage),
        "untrained": plan.untrained(),
        "versions": versions,
    }
