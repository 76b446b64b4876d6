"""What stands between a stage's setup and its loop: frozen networks, evaluators, data, and the first state."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
from etils.epath import Path

from tinymim_jax.data import pipeline, sources
from tinymim_jax.evals.contract import Context, Evaluator, Other
from tinymim_jax.experiment import stage_file
from tinymim_jax.experiment.config import Config, Stage
from tinymim_jax.models.contract import Encoder
from tinymim_jax.runtime import keys, multihost, sharding, storage
from tinymim_jax.runtime.errors import InputError, Unavailable
from tinymim_jax.runtime.metric_log import read, write_whole
from tinymim_jax.tasks.contract import Frozen
from tinymim_jax.training.setup import StageSetup, make_setup
from tinymim_jax.training.step import TrainState, create_state, host_keys, to_items
from tinymim_jax.weights import checkpoint, handoff
from tinymim_jax.weights.handoff import Init
from tinymim_jax.weights.parameters import shapes_of


@dataclasses.dataclass
class Loaded:
    """A stage's setup with what it reads: data, frozen networks, evaluators. `report` says it for people."""

    setup: StageSetup
    mesh: jax.sharding.Mesh
    rows: pipeline.TrainRows | pipeline.ReplicaRows
    frozen: Frozen
    evaluators: dict[str, Evaluator]
    report: list[str]


@dataclasses.dataclass
class Begun:
    """The state that the loop begins with, and the log that was saved beside it."""

    state: TrainState
    shardings: Any
    log: dict[str, Any] | None
    report: list[str]


def source_model(cfg: Config | None, init: Init, workdir: Path) -> Encoder:
    """The model that `init` names, as it was trained, or as a stage of `cfg` that has not begun is to be."""
    folder = handoff.source_folder(init, workdir)
    if cfg is not None and init.stage is not None and not (folder / "stage.json").exists():
        return cfg.stages[init.stage].model
    return stage_file.read_model(folder)


def differences(stage: Stage, field: str, model: Encoder, pixels: dict[str, Any]) -> list[str]:
    """In what the source of weights `field`, a `model` trained on `pixels`, differs from `stage`, for people."""
    own, notes = stage.model, []
    for key in ("mean", "std"):
        if list(getattr(stage.data, key)) != list(pixels[key]):
            notes.append(
                f"pixels normalised with {key} {tuple(pixels[key])}, here data.{key} {getattr(stage.data, key)}"
            )
    if model.image_size != own.image_size:
        notes.append(f"images of {model.image_size} px, here {own.image_size} px")
    heads = [" and ".join(map(str, sorted({m.heads_of(i + 1) for i in range(m.depth)}))) for m in (model, own)]
    if heads[0] != heads[1]:
        notes.append(f"{heads[0]} heads, here {heads[1]}")
    if field == "init" and model.layer_norm_eps != own.layer_norm_eps:
        notes.append(f"LayerNorm eps {model.layer_norm_eps:g}, here model.layer_norm_eps {own.layer_norm_eps:g}")
    return [f"note: {field} was trained with {'; '.join(notes)}"] if notes else []


def load(stage: Stage, name: str, workdir: Path, mesh: jax.sharding.Mesh) -> Loaded:
    """All that `stage` reads; raises InputError on what is missing or does not fit."""
    sharding.check_batch(stage.run.batch_size, mesh, stage.optim.accum_steps)
    models = {field: source_model(None, init, workdir) for field, init in stage.task_inits().items()}
    setup = make_setup(stage, name, models, len(sources.open_source(stage.data)))
    rows = rows_of(setup)
    notes = dict.fromkeys(note for data in stage.data_sets() for note in sources.open_source(data).notes)
    frozen, report = {}, [f"data: {note}" for note in notes]
    for field, init in stage.task_inits().items():
        target = setup.frozen[field]
        params, lines = _hand_over(name, field, target, handoff.for_teacher(init), workdir, None, models[field])
        frozen[field] = sharding.put_tree(params, sharding.state_sharding(mesh, params))
        report += [*lines, *_differences(stage, field, init, workdir)]
    return Loaded(setup, mesh, rows, frozen, make_evaluators(setup, workdir, mesh), report)


def _differences(stage: Stage, field: str, init: Init, workdir: Path) -> list[str]:
    folder = handoff.source_folder(init, workdir)
    pixels = stage_file.read_preprocessing(folder)
    return [f"  {line}" for line in differences(stage, field, stage_file.read_model(folder), pixels)]


def classes_of(stage: Stage) -> tuple[str, ...] | None:
    """The names of the labels, or of the classes of masks, that `stage` learns, in order; None without any."""
    has_names = stage.task.has_labels() or stage.task.gives_pixels
    return sources.open_source(stage.data).classes if has_names else None


def rows_of(setup: StageSetup) -> pipeline.TrainRows | pipeline.ReplicaRows:
    """The rows of the stage's batches; of replicas that do not share them, those of each."""
    count = 1 if setup.shares_batches else setup.stage.run.replicas
    each = []
    for replica in range(count):
        data, seed = setup.data(replica)
        source = sources.open_source(data)
        each.append(pipeline.train_rows(data, source, setup.stage.run.batch_size, seed, setup.task.fields))
    return each[0] if count == 1 else pipeline.ReplicaRows(tuple(each))


def make_evaluators(setup: StageSetup, workdir: Path, mesh: jax.sharding.Mesh) -> dict[str, Evaluator]:
    """The stage's evaluators, with the checkpoints that they name."""
    evaluators, classes = {}, classes_of(setup.stage)
    for name, cfg in setup.stage.evals.items():
        others = {}
        for field, init in setup.stage.eval_inits(name).items():
            folder = handoff.source_folder(init, workdir)
            variables = handoff.read_variables(folder)
            variables = sharding.put_tree(variables, sharding.state_sharding(mesh, variables))
            pixels = stage_file.read_preprocessing(folder)
            others[field] = Other(stage_file.read_model(folder), variables, pixels["mean"], pixels["std"])
        evaluators[name] = cfg.build(Context(mesh, setup.task.predict, setup.stage.model, others, classes))
    return evaluators


def _hand_over(
    name: str, what: str, target: Any, init: Init, workdir: Path, replica: int | None, model: Encoder
) -> tuple[Any, list[str]]:
    folder = handoff.source_folder(init, workdir, replica)
    params, untrained = handoff.read_variables(folder)["params"], stage_file.read_untrained(folder)
    try:
        report = handoff.match(shapes_of(target), shapes_of(params), init, untrained, model.layer_id)
    except InputError as error:
        raise InputError(f"stage {name}, {what} from {folder}: {error}") from None
    lines = report.lines()
    text = [f"{what} from {folder}: {lines[0]}", *(f"  {line}" for line in lines[1:])]
    return handoff.transfer(target, params, report), text


def begin(loaded: Loaded, workdir: Path) -> Begun:
    """The state to go on from, and its log: own checkpoint, else `init`, else scratch if `init` is None."""
    setup, mesh, folder = loaded.setup, loaded.mesh, workdir / loaded.setup.name
    shapes = jax.eval_shape(lambda: create_state(setup, host_keys(setup, keys.INIT)))
    shardings = sharding.state_sharding(mesh, shapes)
    target = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)
    # One process decides: a network's file system may show others an older folder.
    for step in reversed(multihost.run_on_primary(lambda: checkpoint.steps(folder))):
        multihost.raise_everywhere(lambda step=step: storage.wait_for(folder / checkpoint.FOLDER / str(step)))
        try:
            items, log = checkpoint.restore(folder, step, to_items(target))
        except Unavailable:
            raise
        except InputError as error:
            _pass_over(folder, step, error)
            continue
        state = TrainState(**items["model"], **items["optim"])
        return Begun(state, shardings, log, [f"resumed at step {step} of {setup.total_steps}"])
    report = []
    if multihost.run_on_primary(lambda: (folder / "stage.json").is_file()):
        report.append("there is no checkpoint from before: begins anew")
    # The key is an argument: stages that differ by seed share one compilation.
    options = sharding.compiler_options(mesh)
    create = jax.jit(lambda key: create_state(setup, key), out_shardings=shardings, compiler_options=options)
    state = create(host_keys(setup, keys.INIT))
    if setup.stage.init is not None:
        state, lines = _initialised(setup, state, shardings, mesh, workdir)
        notes = multihost.raise_everywhere(lambda: _differences(setup.stage, "init", setup.stage.init, workdir))
        report += [*lines, *notes]
    return Begun(state, shardings, None, report)


def _initialised(
    setup: StageSetup, state: TrainState, shardings: TrainState, mesh: jax.sharding.Mesh, workdir: Path
) -> tuple[TrainState, list[str]]:
    """`state` with the parameters that `init` names; each replica's are filled apart."""
    stage, fresh = setup.stage, sharding.get_tree(state.params, mesh)

    def fill(params: Any, replica: int | None) -> tuple[Any, list[str]]:
        return _hand_over(setup.name, "init", params, stage.init, workdir, replica, stage.model)

    def filled() -> tuple[Any, list[str]]:
        if stage.run.replicas == 1:
            return fill(fresh, None)
        each = [fill(jax.tree.map(lambda x, r=r: x[r], fresh), r) for r in range(stage.run.replicas)]
        return jax.tree.map(lambda *rows: jnp.stack(rows), *(params for params, _ in each)), each[0][1]

    params, lines = multihost.raise_everywhere(filled)
    state = state.replace(params=sharding.put_tree(params, shardings.params))
    if stage.optim.ema:
        state = state.replace(ema=jax.tree.map(jnp.copy, state.params))
    return state, lines


def _pass_over(folder: Path, step: int, error: InputError) -> None:
    """Puts a damaged checkpoint aside; raises `error` if there is none older to go on from."""
    if multihost.run_on_primary(lambda: len(checkpoint.steps(folder))) == 1:
        raise InputError(f"{error}, and there is no older one; delete {folder} to run the stage again")
    multihost.run_on_primary(lambda: checkpoint.set_aside(folder, step))
    print(f"{error}; it is put aside, and the one before it used", flush=True)


def note_bad_step(rows: pipeline.TrainRows | pipeline.ReplicaRows, path: Path, step: int, what: str) -> str:
    """Notes the records of a step whose `what`, loss or gradient, is not finite, once in `path`; says where."""
    noted = read(path) if jax.process_index() == 0 else [{"step": step}]
    if all(line["step"] != step for line in noted):
        records = []
        for one in rows.each if rows.replicas else (rows,):
            epoch, index, _ = one.numbers(step - 1)
            records += [one.source.describe(int(i)) for i in index]
        noted.append({"step": step, "epoch": epoch, "not_finite": what, "records": records})
        try:
            write_whole(path, "".join(json.dumps(line) + "\n" for line in noted))
        except OSError as error:  # the loss is what has gone wrong
            return f" (its images could not be written down: {storage.reason(error)})"
    return f" (its images: {path})"
