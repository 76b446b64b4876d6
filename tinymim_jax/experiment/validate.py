"""What is wrong with a config, said before anything runs."""

import dataclasses
import math
import re
from typing import Any

from tinymim_jax.experiment.config import (
    Classification,
    Classify,
    Config,
    Corruptions,
    Data,
    Distill,
    Eval,
    Init,
    Knn,
    Logistic,
    Mae,
    Optim,
    Run,
    Stage,
    ViT,
    sources,
)
from tinymim_jax.runtime.codec import from_dict, to_dict
from tinymim_jax.runtime.errors import InputError


def check(config: Config) -> Config:
    """A checked, independent copy of `config`; raises InputError on a wrong type, choice or combination."""
    config = from_dict(Config, to_dict(config))
    if config.mesh.fsdp < 1 or (config.mesh.data < 1 and config.mesh.data != -1):
        raise InputError(f"mesh: data {config.mesh.data} and fsdp {config.mesh.fsdp} must be at least 1 (data: or -1)")
    earlier: list[str] = []
    for name, stage in config.stages.items():
        _check_stage(f"stages.{name}", stage)
        for init in sources(stage):
            if init.stage is not None and init.stage not in earlier:
                raise InputError(
                    f"stages.{name}: takes weights from stage {init.stage!r}, which is not an earlier stage;"
                    f" those are: {', '.join(earlier) or 'none'}"
                )
        earlier.append(name)
    for title, table in config.compare.items():
        names = [name for row in table.rows.values() for name in row]
        for name in names:
            if name not in config.stages:
                raise InputError(f"compare.{title}: there is no stage {name!r}")
        for name in names:
            if table.metric.split("/")[0] not in config.stages[name].evals:
                raise InputError(f"compare.{title}: metric {table.metric!r} is of no eval of stage {name!r}")
            _check_metric(f"compare.{title}", config.stages[name], table.metric)
    return config


def _check_metric(where: str, stage: Stage, metric: str) -> None:
    eval_name, _, name = metric.partition("/")
    cfg = stage.evals[eval_name]
    if isinstance(cfg, Corruptions):
        return  # which measures a hundred things
    known = [f"top1_k{k}" for k in cfg.k] if isinstance(cfg, Knn) else ["top1"]
    known += ["top5", "images"] if isinstance(cfg, Classification) else []
    if name not in known:
        raise InputError(f"{where}: eval {eval_name!r} measures no {name!r}; choose one of {', '.join(known)}")


def _check_stage(where: str, stage: Stage) -> None:
    _check_ranges(where, stage)
    model, run, optim = stage.model, stage.run, stage.optim
    if model.image_size % model.patch_size:
        raise InputError(
            f"{where}.model: image_size {model.image_size} is not a multiple of patch_size {model.patch_size}"
        )
    if stage.data.image_size != model.image_size:
        raise InputError(
            f"{where}: data.image_size {stage.data.image_size} differs from model.image_size {model.image_size}"
        )
    if model.width % 4:
        raise InputError(f"{where}.model: width {model.width} is not a multiple of 4, which sin-cos positions need")
    for field in ("num_heads", "last_block_heads"):
        heads = getattr(model, field)
        if heads is not None and (heads < 1 or model.width % heads):
            raise InputError(f"{where}.model: width {model.width} is not a multiple of {field} {heads}")
    _check_run(where, run, optim)
    check_attention(f"{where}.model", model)
    for init in sources(stage):
        if (init.stage is None) == (init.path is None):
            which = "init" if init is stage.init else "task.teacher.init"
            raise InputError(f"{where}.{which} needs exactly one of stage and path; set the other to none")
    if isinstance(stage.task, Classify) and model.num_classes < 2:
        raise InputError(f"{where}.model: classify needs num_classes of at least 2, got {model.num_classes}")
    if isinstance(stage.task, Distill) and not 1 <= stage.task.student_block <= model.depth:
        raise InputError(
            f"{where}.task: student_block {stage.task.student_block} is beyond the student's {model.depth} blocks"
        )
    for pattern in [*optim.decay, *optim.no_decay, *optim.freeze, *(p for i in sources(stage) for p in _patterns(i))]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{where}: {pattern!r} is not a regular expression ({error})") from None
    if isinstance(stage.task, Distill) and len(set(stage.task.relations)) != len(stage.task.relations or (0, 0)):
        raise InputError(f"{where}.task.relations {stage.task.relations} must name at least one relation, each once")
    if isinstance(stage.task, Mae):
        _check_mae(where, stage.task, model)
    if isinstance(stage.task, Mae) and (model.pool != "cls" or model.num_classes or model.dist_token):
        raise InputError(
            f"{where}.model: mae needs pool 'cls', whose norm feeds the decoder, no num_classes and no dist_token"
        )
    if model.neck and (not model.num_classes or model.pool != "mean"):
        raise InputError(f"{where}.model: neck {model.neck} needs pool 'mean' and num_classes; set them, or neck=0")
    for name, cfg in stage.evals.items():
        _check_eval(f"{where}.evals.{name}", stage, cfg)


def _check_run(where: str, run: Run, optim: Optim) -> None:
    if (run.epochs is None) == (run.steps is None):
        raise InputError(f"{where}.run: set exactly one of epochs and steps")
    if run.batch_size < 1 or run.batch_size % optim.accum_steps:
        raise InputError(f"{where}: batch_size {run.batch_size} is not a multiple of accum_steps {optim.accum_steps}")
    for field in ("log_every", "checkpoint_every", "eval_every"):
        if getattr(run, field) % run.steps_per_call:
            raise InputError(
                f"{where}.run: {field} {getattr(run, field)} is not a multiple of steps_per_call {run.steps_per_call}"
            )


def check_attention(where: str, model: ViT) -> None:
    """Raises InputError if `model` wants cuDNN to do what it does not do on every GPU since Ampere."""
    if model.attention != "cudnn":
        return
    if model.dtype == "float32":
        raise InputError(f"{where}: attention 'cudnn' does not compute in float32; set model.dtype=bfloat16")
    for heads in (model.num_heads, model.last_block_heads or model.num_heads):
        width = model.width // heads
        if width % 8 or width > 128:
            raise InputError(
                f"{where}: attention 'cudnn' takes heads of a width that is a multiple of 8 and at most 128, and"
                f" {heads} heads are {width} wide; set model.attention=xla"
            )


def _patterns(init: Init) -> tuple[str, ...]:
    return (*init.skip, *init.fresh, *init.rename)


def _check_mae(where: str, task: Mae, model: ViT) -> None:
    decoder = task.decoder
    if decoder.width % 4 or decoder.num_heads < 1 or decoder.width % decoder.num_heads or decoder.depth < 1:
        raise InputError(f"{where}.task.decoder: width {decoder.width} must be a multiple of 4 and of its num_heads")
    if not 0 < task.mask_ratio < 1:
        raise InputError(f"{where}.task.mask_ratio is {task.mask_ratio}; it must be above 0 and below 1")
    sizes = {field: getattr(decoder, field) for field in ("width", "depth", "num_heads")}
    check_attention(f"{where}.task.decoder", dataclasses.replace(model, **sizes, last_block_heads=None))


def _check_eval(where: str, stage: Stage, cfg: Eval) -> None:
    """What would otherwise be found only after the training."""
    sets = {"data": cfg.data, "bank": cfg.bank} if isinstance(cfg, (Knn, Logistic)) else {"data": cfg.data}
    for name, data in sets.items():
        _check_data(f"{where}.{name}", data)
        if data.transform != "eval":
            raise InputError(f"{where}: {name}.transform is 'train', which is random; set it to 'eval'")
        for field in ("image_size", "mean", "std"):
            if getattr(data, field) != getattr(stage.data, field):
                raise InputError(f"{where}: {name}.{field} differs from the stage's, {getattr(stage.data, field)}")
    if cfg.batch_size < 1:
        raise InputError(f"{where}.batch_size is {cfg.batch_size}; it must be at least 1")
    if isinstance(cfg, Knn) and (not cfg.k or min(cfg.k) < 1 or cfg.temperature <= 0):
        raise InputError(
            f"{where}: k {cfg.k} must hold numbers of at least 1, and temperature {cfg.temperature} be above 0"
        )
    if isinstance(cfg, Logistic) and (cfg.c <= 0 or cfg.max_iter < 1):
        raise InputError(f"{where}: c {cfg.c} must be above 0, and max_iter {cfg.max_iter} at least 1")
    if isinstance(cfg, (Classification, Corruptions)) and not stage.model.num_classes:
        raise InputError(f"{where}: {cfg.kind} needs a model with a head; set model.num_classes, or use knn")
    if isinstance(cfg, Classification) and cfg.subset and stage.model.num_classes != 1000:
        raise InputError(f"{where}: subset {cfg.subset!r} needs a head of ImageNet's 1000 classes")
    if isinstance(cfg, Corruptions) and (not cfg.severities or not set(cfg.severities) <= set(range(1, 6))):
        raise InputError(f"{where}: severities {cfg.severities} must be among 1 to 5")


def _check_ranges(where: str, stage: Stage) -> None:
    data, run, model, optim = stage.data, stage.run, stage.model, stage.optim
    checks = {
        "model.depth": (model.depth, model.depth >= 1, "at least 1"),
        "model.neck": (model.neck, model.neck >= 0, "at least 0"),
        "model.patch_size": (model.patch_size, model.patch_size >= 1, "at least 1"),
        "run.steps": (run.steps, run.steps is None or run.steps >= 0, "at least 0"),
        "run.epochs": (run.epochs, run.epochs is None or 0 <= run.epochs < math.inf, "at least 0, and finite"),
        "run.seed": (run.seed, run.seed >= 0, "at least 0"),
        "run.steps_per_call": (run.steps_per_call, run.steps_per_call >= 1, "at least 1"),
        "run.log_every": (run.log_every, run.log_every >= 1, "at least 1"),
        "run.checkpoint_every": (run.checkpoint_every, run.checkpoint_every >= 1, "at least 1"),
        "run.max_skipped": (run.max_skipped, run.max_skipped >= 0, "at least 0"),
        "run.eval_every": (run.eval_every, run.eval_every >= 0, "at least 0"),
        "run.keep": (run.keep, run.keep >= 1, "at least 1"),
        "optim.lr": (optim.lr, 0 <= optim.lr < math.inf, "at least 0, and finite"),
        "optim.min_lr": (optim.min_lr, 0 <= optim.min_lr < math.inf, "at least 0, and finite"),
        "optim.warmup_epochs": (optim.warmup_epochs, 0 <= optim.warmup_epochs < math.inf, "at least 0, and finite"),
        "optim.weight_decay": (optim.weight_decay, 0 <= optim.weight_decay < math.inf, "at least 0, and finite"),
        "optim.b1": (optim.b1, 0 <= optim.b1 < 1, "at least 0 and below 1"),
        "optim.b2": (optim.b2, 0 <= optim.b2 < 1, "at least 0 and below 1"),
        "optim.momentum": (optim.momentum, 0 <= optim.momentum < 1, "at least 0 and below 1"),
        "optim.trust": (optim.trust, optim.trust > 0, "above 0"),
        "optim.layer_decay": (optim.layer_decay, 0 < optim.layer_decay <= 1, "above 0 and at most 1"),
        "optim.clip_norm": (optim.clip_norm, optim.clip_norm is None or optim.clip_norm > 0, "above 0, or none"),
        "optim.ema": (optim.ema, optim.ema is None or 0 < optim.ema < 1, "above 0 and below 1, or none"),
        "optim.accum_steps": (optim.accum_steps, optim.accum_steps >= 1, "at least 1"),
        "model.drop_path": (model.drop_path, 0 <= model.drop_path < 1, "at least 0 and below 1"),
    }
    _check_data(f"{where}.data", data)
    _raise_first(where, checks)
    if isinstance(stage.task, Classify):
        _check_classify(f"{where}.task", stage.task)


def _check_data(where: str, data: Data) -> None:
    checks = {
        "repeats": (data.repeats, data.repeats >= 1, "at least 1"),
        "severity": (data.severity, 1 <= data.severity <= 5, "1 to 5"),
        "crop_scale": (data.crop_scale, 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1, "0 < low <= high <= 1"),
        "crop_ratio": (data.crop_ratio, 0 < data.crop_ratio[0] <= data.crop_ratio[1], "0 < low <= high"),
        "hflip": (data.hflip, 0 <= data.hflip <= 1, "at least 0 and at most 1"),
        "std": (data.std, min(data.std) > 0, "above 0"),
        "crop_pct": (data.crop_pct, 0 < data.crop_pct <= 1, "above 0 and at most 1"),
        "rand_augment": (
            repr(data.rand_augment),
            not (data.resident and data.rand_augment),
            "'' with resident=True: it is made on the host",
        ),
        "threads": (data.threads, data.threads >= 1, "at least 1"),
        "workers": (data.workers, data.workers >= 0, "at least 0"),
        "prefetch": (data.prefetch, data.prefetch >= 1, "at least 1"),
    }
    _raise_first(where, checks)


def _check_classify(where: str, task: Classify) -> None:
    shares = {name: getattr(task, name) for name in ("label_smoothing", "mix_prob", "switch_prob", "erasing")}
    checks = {name: (value, 0 <= value <= 1, "at least 0 and at most 1") for name, value in shares.items()}
    alphas = {name: getattr(task, name) for name in ("mixup", "cutmix")}
    checks |= {name: (value, value >= 0, "at least 0") for name, value in alphas.items()}
    if task.teacher is not None:
        weight, temperature = task.teacher.weight, task.teacher.temperature
        checks["teacher.weight"] = (weight, 0 <= weight <= 1, "at least 0 and at most 1")
        checks["teacher.temperature"] = (temperature, temperature > 0, "above 0")
    _raise_first(where, checks)


def _raise_first(where: str, checks: dict[str, tuple[Any, bool, str]]) -> None:
    for field, (value, is_good, range_) in checks.items():
        if not is_good:
            raise InputError(f"{where}.{field} is {value}; it must be {range_}")
