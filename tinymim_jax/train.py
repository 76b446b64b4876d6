"""The training loop: one, for every task."""

import contextlib
import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from tinymim_jax import checkpoint, config, handoff, optim
from tinymim_jax import mesh as mesh_lib
from tinymim_jax.checkpoint import Checkpoints
from tinymim_jax.config import InputError, Stage
from tinymim_jax.data import pipeline, sources
from tinymim_jax.evals import make_evaluator
from tinymim_jax.evals.base import make_predict, measure
from tinymim_jax.evals.online import Online
from tinymim_jax.metrics import Mean
from tinymim_jax.plan import Plan, example_batch, make_plan, teacher_init
from tinymim_jax.progress import BAD_IMAGES, Progress
from tinymim_jax.stop import StopRequest
from tinymim_jax.tasks.base import STREAMS, Batch, Frozen, Variables
from tinymim_jax.writer import Writer


@flax.struct.dataclass
class TrainState:
    """All that a step changes. `ema` is {} where no average is kept."""

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    ema: Any


TrainStep = Callable[[TrainState, Frozen, Batch, jax.Array], tuple[TrainState, dict[str, Mean]]]


def create_state(plan: Plan, rng: jax.Array) -> TrainState:
    """Fresh parameters and optimiser state."""
    variables = dict(plan.task.init(rng, example_batch(plan.stage))[0])
    params = variables.pop("params")
    ema = params if plan.stage.optim.ema else {}
    return TrainState(jnp.zeros((), jnp.int32), params, variables, plan.tx.init(params), ema)


def make_train_step(plan: Plan) -> TrainStep:
    """step(state, frozen, batch, rng) -> (state, metrics); pure, for `jit`.

    `rng` is the stage's key: every random number is a function of it, the step and the stream's name.
    """
    task, tx, cfg = plan.task, plan.tx, plan.stage.optim

    def gradients(state: TrainState, frozen: Frozen, batch: Batch, rng: jax.Array) -> tuple[Any, Any]:
        rngs = {name: jax.random.fold_in(rng, i) for i, name in enumerate(STREAMS)}

        def loss(params: Any) -> tuple[jax.Array, Any]:
            params = optim.stop_frozen(params, plan.labels)
            return task.loss(params, state.model_state, frozen, batch, rngs, train=True)

        grads, aux = jax.grad(loss, has_aux=True)(state.params)
        return grads, aux

    def step(state: TrainState, frozen: Frozen, batch: Batch, rng: jax.Array) -> tuple[TrainState, dict[str, Mean]]:
        rng = jax.random.fold_in(rng, state.step)
        grads, aux = accumulate(gradients, cfg.accum_steps, state, frozen, batch, rng)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1 - cfg.ema) if cfg.ema else {}
        norms = {"grad_norm": Mean.of(optax.global_norm(grads)), "param_norm": Mean.of(optax.global_norm(params))}
        bad = {BAD_IMAGES: Mean.of(jnp.sum(~batch["is_valid"]))}
        return TrainState(state.step + 1, params, aux.model_state, opt_state, ema), {**aux.metrics, **norms, **bad}

    return step


def accumulate(
    gradients: Callable, steps: int, state: TrainState, frozen: Frozen, batch: Batch, rng: jax.Array
) -> tuple[Any, Any]:
    """Gradients of the mean over all valid images, and summed metrics, from `steps` micro-batches over all devices."""
    if steps == 1:
        return gradients(state, frozen, batch, rng)
    # Row i goes to micro-batch i % steps, so that no row moves to another device.
    micro = jax.tree.map(lambda x: x.reshape(-1, steps, *x.shape[1:]).swapaxes(0, 1), batch)

    def body(total: Any, item: tuple[Batch, jax.Array]) -> tuple[Any, Any]:
        rows, i = item
        grads, aux = gradients(state, frozen, rows, jax.random.fold_in(rng, i))
        return jax.tree.map(lambda t, g: t + g * aux.metrics["loss"].count, total, grads), aux

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    grads, aux = jax.lax.scan(body, zeros, (micro, jnp.arange(steps)))
    summed = jax.tree.map(lambda x: x.sum(axis=0), aux.metrics)
    newest = jax.tree.map(lambda x: x[-1], aux.model_state)
    return jax.tree.map(lambda g: g / summed["loss"].count, grads), aux.replace(metrics=summed, model_state=newest)


class Runner:
    """One stage in one folder: everything that `run_stage` puts together before it loops."""

    def __init__(self, stage: Stage, name: str, workdir: Path, mesh: jax.sharding.Mesh):
        self.stage, self.name, self.workdir, self.mesh = stage, name, workdir, mesh
        self.folder = workdir / name
        mesh_lib.check_batch(stage.run.batch_size // stage.optim.accum_steps, mesh)
        self.source = sources.open_source(stage.data)
        init = teacher_init(stage)
        teacher = handoff.read_model(handoff.source_folder(init, workdir)) if init else None
        self.plan = make_plan(stage, teacher, len(self.source))
        self.evaluators = {key: make_evaluator(cfg, mesh) for key, cfg in stage.evals.items()}
        self.predict = make_predict(self.plan.task, mesh)
        self.report: list[str] = []
        self.frozen = self._load_teacher(init) if init else {}

    def _load_teacher(self, init: config.Init) -> Frozen:
        frozen = self._hand_over("teacher", self.plan.frozen, handoff.for_teacher(init))
        return jax.device_put(frozen, mesh_lib.state_sharding(self.mesh, frozen))

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
        if saved_steps := checkpoint.steps(self.folder):
            target = jax.tree.map(
                lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, self.shardings
            )
            with Checkpoints(self.folder, stage.run.keep) as checkpoints:
                model, optimizer, log = checkpoints.restore(saved_steps[-1], *items(target))
            self.report.append(f"resumed at step {saved_steps[-1]} of {plan.total_steps}")
            return TrainState(**model, **optimizer), log
        # The key is an argument: stages that differ by seed share one compilation.
        state = jax.jit(lambda key: create_state(plan, key), out_shardings=self.shardings)(key)
        if stage.init is not None:
            params = self._hand_over("init", jax.device_get(state.params), stage.init)
            state = state.replace(params=jax.device_put(params, self.shardings.params))
            if stage.optim.ema:
                state = state.replace(ema=jax.tree.map(jnp.copy, state.params))
        return state, None

    def batches(self, start: int) -> Iterator[Batch]:
        """The batches of the steps after step `start`."""
        run, stop = self.stage.run, self.plan.total_steps
        options = {"batch_size": run.batch_size, "seed": run.seed, "start": start, "stop": stop, "mesh": self.mesh}
        return pipeline.train_batches(self.stage.data, self.source, **options)

    def variables(self, state: TrainState) -> Variables:
        """What is evaluated: the averaged weights if there are any."""
        return {"params": state.ema or state.params, **state.model_state}

    def online(self, writer: Writer) -> Online:
        """Evaluation while training goes on."""
        return Online(self.evaluators, self.predict, self.frozen, writer.write)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """{"<eval>/<metric>": value} of the final weights."""
        title = f"{self.name}, evaluation"
        return measure(self.evaluators, self.predict, self.variables(state), self.frozen, title)

    def is_evaluated(self, step: int) -> bool:
        """Whether an evaluation is due after `step`, the last apart."""
        every = self.stage.run.eval_every
        return bool(self.evaluators and every) and 0 < step < self.plan.total_steps and step % every == 0


def jit_step(plan: Plan, mesh: jax.sharding.Mesh, shardings: TrainState) -> TrainStep:
    """The train step for `jit`: the state is donated and nothing else is."""
    out = (shardings, mesh_lib.replicated(mesh))
    return jax.jit(make_train_step(plan), donate_argnums=0, out_shardings=out)


def items(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two array items of a checkpoint: what later stages read, and the rest."""
    model = {"params": state.params, "model_state": state.model_state, "ema": state.ema}
    return model, {"opt_state": state.opt_state, "step": state.step}


def run_stage(
    stage: Stage, name: str, workdir: Path, mesh: jax.sharding.Mesh, stop: StopRequest | None = None
) -> dict[str, float]:
    """Runs `stage` in `workdir`/`name` to its end, from its own newest checkpoint if it has one, or until `stop`.

    Writes stage.json, metrics.jsonl, tensorboard/, checkpoints/ and, at the end, DONE with the final metrics:
    the last training averages and every evaluator's results, which it returns.

    Raises:
      InputError: bad input, or a loss that is not finite.
      Interrupted: after Ctrl-C or SIGTERM, the state saved.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest()) if stop is None else stop
        runner = Runner(stage, name, workdir, mesh)
        run, total = stage.run, runner.plan.total_steps
        state, log = runner.start()  # before anything is written
        stop.check(f"before stage {name}")
        first = int(state.step)
        checkpoints = stack.enter_context(Checkpoints(runner.folder, run.keep))
        write_json(runner.folder / "stage.json", describe(runner.plan))
        lines = [f"{name}: {total} steps of {run.batch_size} images", *runner.report, *runner.plan.untrained_line()]
        print("\n  ".join(lines), flush=True)
        writer = stack.enter_context(Writer(runner.folder, first, active=jax.process_index() == 0))
        batches = stack.enter_context(contextlib.closing(runner.batches(first)))
        progress = Progress(name, writer, start=first, total=total, batch_size=run.batch_size, saved=log)
        stack.enter_context(progress.bar)
        replicated = mesh_lib.replicated(mesh)
        rng = jax.jit(lambda: jax.random.fold_in(jax.random.key(run.seed), 1), out_shardings=replicated)()
        train_step = jit_step(runner.plan, mesh, runner.shardings)
        online = stack.enter_context(runner.online(writer))
        if runner.is_evaluated(first) and not writer.has(first, "/"):
            online.start(first, runner.variables(state))

        for step in range(first + 1, total + 1):
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
            asked = stop.asked  # read once: what is not saved must not be left
            if step % run.checkpoint_every == 0 or last or asked:
                progress.collect()  # a state whose loss is not finite is never saved
                if not asked:  # or else the state comes first
                    online.wait()  # whoever resumes from here has all results from before
                checkpoints.save(step, *items(state), progress.state())
            if asked and not last:
                checkpoints.wait()
                online.wait()
                stop.check(f"stage {name} stopped at step {step} of {total}")
            if runner.is_evaluated(step):
                online.start(step, runner.variables(state))

        if total == 0:
            checkpoints.save(0, *items(state), progress.state())
        evaluated = runner.evaluate(state)
        writer.write(total, evaluated)
        checkpoints.wait()
        if progress.bad_images:
            print(f"{name}: images left out because they could not be read: {progress.bad_images}, all epochs together")
        results = {**progress.averages, **evaluated}
        write_json(runner.folder / "DONE", {"step": total, "metrics": results})
        stop.check(f"stopped after stage {name}")
    return results


def describe(plan: Plan) -> dict[str, Any]:
    """The contents of `stage.json`: everything needed to build the stage again, and what it ran on."""
    versions = {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")}
    return {"stage": config.to_dict(plan.stage), "untrained": plan.untrained(), "versions": versions}


def write_json(path: Path, value: Any) -> None:
    """Writes `value` to `path`, which never holds half of it."""
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(value, indent=2) + "\n")
        partial.replace(path)
