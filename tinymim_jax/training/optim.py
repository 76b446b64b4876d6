"""Optimisers, schedules, and the rules that say how each parameter is treated."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tinymim_jax.experiment.config import Optim
from tinymim_jax.models.contract import Encoder
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.weights.parameters import matches, paths

Schedule = Callable[[jax.Array | int], jax.Array]


def peak_lr(cfg: Optim, batch_size: int) -> float:
    """The highest learning rate: `lr`, scaled linearly with the batch."""
    return cfg.lr if cfg.lr_batch is None else cfg.lr * batch_size / cfg.lr_batch


def make_schedule(cfg: Optim, batch_size: int, steps_per_epoch: int, total_steps: int) -> Schedule:
    """Learning rate of each step: linear warm-up from `warmup_lr`, then what `cfg.schedule` names.

    The cosine is MAE's (util/lr_sched.py) and begins behind the warm-up; poly, (1 - progress)^power, and step count
    from the first step, as in mmcv 1; poly_behind begins behind the warm-up. Cosines and polys end at min_lr.
    cosine_epochs is timm 0.3.2's as DeiT's main.py steps it: the cosine counts from the first step, too, and epoch e
    has, from first to last step, the rate of e - 1.
    """
    peak, warmup = peak_lr(cfg, batch_size), cfg.warmup_epochs * steps_per_epoch + cfg.warmup_steps
    if total_steps and warmup >= total_steps:
        raise InputError(
            f"the warm-up of {warmup:.0f} steps is not shorter than the run, which has {total_steps}; lower"
            f" optim.{'warmup_epochs' if cfg.warmup_epochs else 'warmup_steps'}, or train longer"
        )
    shapes: dict[str, Schedule] = {  # the share of the peak that is left at `progress`, from 0 to 1
        **dict.fromkeys(("cosine", "cosine_epochs"), lambda progress: 0.5 * (1 + jnp.cos(jnp.pi * progress))),
        **dict.fromkeys(("poly", "poly_behind"), lambda progress: (1 - progress) ** cfg.power),
        "step": lambda progress: cfg.drop_factor ** sum(jnp.where(progress >= drop, 1.0, 0.0) for drop in cfg.drops),
        "constant": lambda progress: jnp.ones_like(progress),
    }
    is_cosine = cfg.schedule.startswith("cosine")
    end = cfg.min_lr if is_cosine or cfg.schedule.startswith("poly") else 0.0

    def schedule(step: jax.Array | int) -> jax.Array:
        if cfg.schedule == "cosine_epochs":
            step = jnp.maximum(step // steps_per_epoch - 1, 0) * steps_per_epoch
        begin = warmup if cfg.schedule in ("cosine", "poly_behind") else 0.0  # the others count from the first step
        progress = jnp.clip((step - begin) / max(total_steps - begin, 1), 0.0, 1.0)
        rate = end + (peak - end) * shapes[cfg.schedule](progress)
        top = peak if is_cosine or cfg.schedule == "poly_behind" else rate
        return jnp.where(step < warmup, cfg.warmup_lr + (top - cfg.warmup_lr) * step / max(warmup, 1), rate)

    return schedule


def current_lr(schedule: Schedule, opt_state: Any) -> jax.Array:
    """The rate of the next update: updates that are left out do not count."""
    count = optax.tree_utils.tree_get(
        opt_state, "count", filtering=lambda path, _: getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"
    )
    return schedule(count)


def rules(params: Any, cfg: Optim, is_untrained: Callable[[str], bool] = lambda _: False) -> Any:
    """A tree of "freeze" | "decay" | "no_decay"; raises InputError unless one rule covers each parameter."""

    def rule(name: str) -> str:
        if matches(cfg.freeze, name) or is_untrained(name):
            return "freeze"
        found = [label for label in ("decay", "no_decay") if matches(getattr(cfg, label), name)]
        if len(found) != 1:
            raise InputError(
                f"parameter {name} is in {' and '.join(found) or 'none'} of optim.decay and optim.no_decay;"
                " each trained parameter must be in one (or in optim.freeze)"
            )
        return found[0]

    names = paths(params)
    for field in ("freeze", "lr_scale"):
        for pattern in getattr(cfg, field):
            if not any(matches((pattern,), name) for name in jax.tree.leaves(names)):
                raise InputError(f"optim.{field}: {pattern!r} matches no parameter")
    return jax.tree.map(rule, names)


def lr_scales(params: Any, cfg: Optim, model: Encoder) -> Any:
    """A tree of factors on the learning rate: layer_decay^(depth + 1 - id) (MAE util/lr_decay.py) times `lr_scale`.

    Ids are the encoder's `layer_id`; what lies under pretext/ comes after all layers. Raises InputError on an unknown
    parameter.
    """

    def factor(name: str) -> float:
        scale = math.prod(value for pattern, value in cfg.lr_scale.items() if matches((pattern,), name))
        if cfg.layer_decay == 1.0 or not name.startswith("encoder/"):
            return scale
        return scale * cfg.layer_decay ** (model.depth + 1 - model.layer_id(name))

    return jax.tree.map(factor, paths(params))


def make_optimizer(cfg: Optim, schedule: Schedule, labels: Any, scales: Any) -> optax.GradientTransformation:
    """AdamW with decoupled decay, or SGD or LARS with momentum; `labels` from `rules`, `scales` from `lr_scales`.

    Frozen parameters have no moments, no decay and a rate of 0.
    """
    is_decayed = jax.tree.map(lambda label: label == "decay", labels)
    is_trained = jax.tree.map(lambda label: label != "freeze", labels)
    decay = optax.masked(optax.add_decayed_weights(cfg.weight_decay), is_decayed)
    momentum = optax.masked(optax.trace(cfg.momentum, cfg.nesterov), is_trained)
    kinds = {
        "adamw": (optax.masked(optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps), is_trained), decay),
        "sgd": (decay, momentum),
        # As in MAE's util/lars.py: no decay and no trust ratio for vectors, momentum before the rate.
        "lars": (decay, optax.masked(optax.scale_by_trust_ratio(trust_coefficient=cfg.trust), is_decayed), momentum),
    }
    factors = jax.tree.map(lambda scale, trained: scale * trained, scales, is_trained)
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        *kinds[cfg.name],
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, factors)),
        optax.scale_by_learning_rate(schedule),
    )


def stop_frozen(params: Any, labels: Any) -> Any:
    """`params` with no gradient for those that `labels` freezes, so that none is computed."""
    return jax.tree.map(lambda p, label: jax.lax.stop_gradient(p) if label == "freeze" else p, params, labels)
