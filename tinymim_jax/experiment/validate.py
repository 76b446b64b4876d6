"""What is wrong with a config, said before anything runs; ranges of single fields stand beside these."""

import re

from tinymim_jax.experiment.config import Compare, Config, Stage
from tinymim_jax.runtime.codec import check_name, from_dict, to_dict
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.weights.checkpoint import REPLICA
from tinymim_jax.weights.handoff import check_regex

TAKEN = ("report", "converted", "jax_cache", "chain.json", "results.json", "run.lock")  # beside stages in a workdir


def check(config: Config) -> Config:
    """A checked, independent copy of `config`; raises InputError on a wrong type, choice or combination."""
    config = from_dict(Config, to_dict(config))
    if config.mesh.data < 1 and config.mesh.data != -1:
        raise InputError(f"mesh: data is {config.mesh.data}; it must be at least 1, or -1")
    earlier: list[str] = []
    for name, stage in config.stages.items():
        if not re.fullmatch(r"\w[\w .+-]*", name) or name.lower() in TAKEN or name.lower().startswith(REPLICA):
            raise InputError(
                f"stages.{name}: cannot name a folder in the workdir beside {', '.join(TAKEN)} and {REPLICA}*; choose"
                " letters, digits, _, ., + and -"
            )
        _check_stage(f"stages.{name}", stage)
        for where, init in stage.inits():
            if init.stage is not None and init.stage not in earlier:
                raise InputError(
                    f"stages.{name}: takes weights from stage {init.stage!r}, which is not an earlier stage;"
                    f" those are: {', '.join(earlier) or 'none'}; a folder or file is given as Init(path=...)"
                )
            source = config.stages.get(init.stage)
            _check_replica(f"stages.{name}.{where}", where == "init", stage, init.replica, source)
        earlier.append(name)
    for title, table in config.compare.items():
        _check_table(f"compare.{title}", table, config)
    return config


def _check_replica(where: str, is_own: bool, stage: Stage, replica: int | None, source: Stage | None) -> None:
    """`is_own`: of the weights that the stage itself starts from."""
    count = 1 if source is None else source.run.replicas
    if replica is not None and source is not None and replica >= count:
        raise InputError(f"{where}.replica is {replica}, and its stage has {count} (run.replicas)")
    is_paired = is_own and stage.run.replicas == count
    if replica is None and count > 1 and not is_paired:
        raise InputError(
            f"{where} is a stage of {count} replicas: choose one with {where}.replica, or give this stage as many and"
            " let it start from them"
        )


def _check_table(where: str, table: Compare, config: Config) -> None:
    eval_name, _, metric = table.metric.partition("/")
    if unknown := set(table.paper) - set(table.rows):
        raise InputError(f"{where}.paper: there is no row {min(unknown)!r}; choose from {', '.join(table.rows)}")
    for name in (name for row in table.rows.values() for name in row):
        if name not in config.stages:
            raise InputError(f"{where}: there is no stage {name!r}")
        if eval_name not in config.stages[name].evals:
            raise InputError(f"{where}: metric {table.metric!r} is of no eval of stage {name!r}")
        known = config.stages[name].evals[eval_name].metrics()
        if known is not None and metric not in known:
            raise InputError(f"{where}: eval {eval_name!r} measures no {metric!r}; choose one of {', '.join(known)}")


def _check_stage(where: str, stage: Stage) -> None:
    stage.model.check(f"{where}.model")
    stage.data.check(f"{where}.data")
    if stage.data.image_size != stage.model.image_size:
        raise InputError(
            f"{where}: data.image_size {stage.data.image_size} differs from model.image_size {stage.model.image_size}"
        )
    _check_run(where, stage)
    for field, init in stage.inits():
        init.check(f"{where}.{field}")
        if field != "init" and (init.keep_blocks is not None or init.fresh):
            raise InputError(f"{where}.{field}: keep_blocks and fresh are for a stage itself; leave them out")
    for pattern in (*stage.optim.decay, *stage.optim.no_decay, *stage.optim.freeze, *stage.optim.lr_scale):
        check_regex(where, pattern)
    stage.task.check(f"{where}.task", stage.model)
    for name, cfg in stage.evals.items():
        check_name(f"{where}.evals", name)
        if cfg.needs_pixels and not stage.task.gives_pixels:
            raise InputError(
                f"{where}.evals.{name}: {cfg.kind} needs a task that gives each pixel a class; leave it out"
            )
        cfg.check(f"{where}.evals.{name}", stage.model, stage.data)


def _check_run(where: str, stage: Stage) -> None:
    run, optim = stage.run, stage.optim
    if (run.epochs is None) == (run.steps is None):
        raise InputError(f"{where}.run: set exactly one of epochs and steps")
    if optim.warmup_epochs and optim.warmup_steps:
        raise InputError(f"{where}.optim: set warmup_epochs or warmup_steps, and the other to 0")
    for pattern, factor in optim.lr_scale.items():
        if factor < 0:
            raise InputError(f"{where}.optim.lr_scale: the factor of {pattern!r} is {factor}; it must be at least 0")
    if run.batch_size % optim.accum_steps:
        raise InputError(f"{where}: batch_size {run.batch_size} is not a multiple of accum_steps {optim.accum_steps}")
    for field in ("log_every", "checkpoint_every", "eval_every"):
        if getattr(run, field) % run.steps_per_call:
            raise InputError(
                f"{where}.run: {field} {getattr(run, field)} is not a multiple of steps_per_call {run.steps_per_call}"
            )
