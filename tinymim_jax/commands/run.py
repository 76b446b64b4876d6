"""`run`: a chain, or one stage of it."""

import contextlib
from typing import Any

from etils.epath import Path

from tinymim_jax.commands.flags import define_cluster, new_flags, parse, recipe, start_cluster
from tinymim_jax.experiment.config import Config
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.codec import to_dict
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.preemption import StopRequest
from tinymim_jax.runtime.workdir_lock import WorkdirLock

USAGE = """python -m tinymim_jax run --config=FILE[:options] [--workdir=DIR] [--stage=NAME] [--side_by_side=K]
  [--try_steps=N] [--dry_run]
"""


def main(argv: list[str]) -> None:
    """Runs the command with its arguments; raises InputError on bad ones."""
    values = new_flags(
        workdir=(str, None, "a folder or gs://BUCKET/... (default: runs/ and the config's name); the same goes on"),
        stage=(str, None, "run this stage only"),
        side_by_side=(int, 1, "train up to so many students of a study in one program, which runs their teacher once"),
        try_steps=(int, None, "a first try: so many steps a stage, as an experiment of its own, NAME_try"),
        dry_run=(bool, False, "print what would happen, and touch nothing"),
    )
    define_cluster(values)
    cfg = parse(values, argv, USAGE)
    if values.try_steps:
        shorten(cfg, values.try_steps)
    workdir = storage.path(values.workdir or f"runs/{cfg.name}")
    check_workdir(workdir)

    if values.dry_run:
        from tinymim_jax.planning import dry_run

        print(dry_run.describe_chain(cfg, workdir, values.stage, values.side_by_side))
        dry_run.check_workdir(workdir)
        return
    facts = {"config": to_dict(cfg), "workdir": str(workdir), "stage": values.stage}
    with StopRequest() as stop:  # before jax is imported, whose callbacks would swallow a Ctrl-C
        start_cluster(values, stop, **facts)
        run(cfg, workdir, values.stage, stop, values.side_by_side, recipe(argv, cfg))


def shorten(cfg: Config, steps: int) -> None:
    """Cuts each stage to so many steps without warm-up, under another name, so that no folder of the long one fits."""
    cfg.name += "_try"
    for stage in cfg.stages.values():
        if stage.run.epochs != 0:
            stage.run.epochs, stage.run.steps, stage.run.steps_per_call, stage.run.log_every = None, steps, 1, 1
        stage.optim.warmup_epochs = stage.optim.warmup_steps = 0


def run(
    cfg: Config, workdir: Path, only: str | None, stop: StopRequest, beside: int, recipe: dict[str, Any]
) -> None:  # fmt: skip
    """Runs the chain, prints its tables and makes its page."""
    import jax

    from tinymim_jax.report import page, tables
    from tinymim_jax.runtime import program_cache

    program_cache.keep(workdir)
    results = run_chain(cfg, workdir, only, stop, beside, recipe)
    if jax.process_index() == 0:
        print(tables.text(results))
        page.write(workdir)


def run_chain(
    cfg: Config, workdir: Path, only: str | None = None, stop: StopRequest | None = None, beside: int = 1,
    recipe: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Runs the stages that are not finished (or just `only`) and returns WORKDIR/results.json.

    Up to `beside` stages of a study run side by side; `recipe` is kept in chain.json. Raises InputError for bad
    input, a finished stage whose config was edited among it, before any stage runs, and Interrupted when `stop` asks
    for it.
    """
    from tinymim_jax.planning import dry_run, preflight
    from tinymim_jax.runtime import multihost, sharding
    from tinymim_jax.training import chain
    from tinymim_jax.weights import handoff

    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopRequest())
        mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.fsdp)
        # What is wrong with a later stage is said now.
        _, setups = multihost.raise_everywhere(lambda: dry_run.work_out(cfg, workdir, only))
        multihost.check_stop(stop, "before anything ran")
        names = list(cfg.stages) if only is None else [only]
        to_run = multihost.run_on_primary(lambda: [name for name in names if not handoff.finished(workdir / name)])
        multihost.raise_everywhere(lambda: preflight.check_ready(cfg, to_run, workdir, mesh))
        multihost.run_on_primary(lambda: preflight.check_workdir(cfg, workdir, recipe))
        lock = WorkdirLock(workdir)
        token = multihost.run_on_primary(lambda: stack.enter_context(lock).token)
        multihost.raise_everywhere(lambda: lock.see(token))
        multihost.check_stop(stop, "before anything ran")
        preflight.convert_sources(cfg, to_run, workdir)
        work = {name: setups[name].flops() * setups[name].total_steps for name in to_run}
        return chain.run_stages(cfg, names, work, workdir, mesh, stop, lock.check, beside)


def check_workdir(workdir: Path) -> None:
    """Raises InputError if `workdir` is not, and could not become, a folder of stages."""
    storage.check_checkpoints(workdir)
    storage.check(workdir)
    if (workdir / "stage.json").is_file():
        raise InputError(f"--workdir={workdir} is the folder of a stage; give the folder above, {workdir.parent}")
    parent = next(p for p in (workdir, *workdir.parents) if p.exists())
    if not parent.is_dir():
        raise InputError(f"--workdir={workdir}: {parent} is a file; name a folder")
