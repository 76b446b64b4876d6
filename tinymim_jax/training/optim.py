"""AdamW, its schedule, and the rules that say how each parameter is treated."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tinymim_jax.experiment.config import Optim
from tinymim_jax.runtime.errors import InputError

Schedule = Callable[[jax.Array | int], jax.Array]


def paths(tree: Any) -> Any:
    """A tree like `tree` whose leaves are their own paths, "encoder/block1/norm1/scale"."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), tree)


def path_name(path: tuple) -> str:
    """A key path joined by "/"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)


def matches(patterns: tuple[str, ...], name: str) -> bool:
    """Whether any regex matches the whole of `name`."""
    return any(re.fullmatch(p, name) for p in patterns)


def peak_lr(cfg: Optim, batch_size: int) -> float:
    """The highest learning rate: `lr`, scaled linearly with the batch."""
    return cfg.lr if cfg.lr_batch is None else cfg.lr * batch_size / cfg.lr_batch


def make_schedule(cfg: Optim, batch_size: int, steps_per_epoch: int, total_steps: int) -> Schedule:
    """Learning rate of each step: linear warm-up from 0, then half a cosine to min_lr (MAE util/lr_sched.py)."""
    peak, warmup = peak_lr(cfg, batch_size), cfg.warmup_epochs * steps_per_epoch
    if total_steps and warmup >= total_steps:
        raise InputError(
            f"warmup_epochs {cfg.warmup_epochs:g} is {warmup:.0f} steps, and the run has only {total_steps}; lower"
            " optim.warmup_epochs, or train longer"
        )

    def schedule(step: jax.Array | int) -> jax.Array:
        rising = peak * step / max(warmup, 1)
        progress = jnp.clip((step - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
        falling = cfg.min_lr + (peak - cfg.min_lr) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup, rising, falling)

    return schedule


def rules(params: Any, cfg: Optim, untrained: tuple[str, ...] = ()) -> Any:
    """A tree of "freeze" | "decay" | "no_decay"; raises InputError unless one rule covers each parameter."""

    def rule(name: str) -> str:
        if matches(cfg.freeze + untrained, name):
            return "freeze"
        found = [label for label in ("decay", "no_decay") if matches(getattr(cfg, label), name)]
        if len(found) != 1:
            raise InputError(
                f"parameter {name} is in {' and '.join(found) or 'none'} of optim.decay and optim.no_decay;"
                " each trained parameter must be in one (or in optim.freeze)"
            )
        return found[0]

    names = paths(params)
    for pattern in cfg.freeze:
        if not any(matches((pattern,), name) for name in jax.tree.leaves(names)):
            raise InputError(f"optim.freeze: {pattern!r} matches no parameter")
    return jax.tree.map(rule, names)


def lr_scales(params: Any, layer_decay: float, depth: int) -> Any:
    """A tree of factors on the learning rate: layer_decay^(depth + 1 - id) (MAE util/lr_decay.py).

    Ids: 0 for embeddings, i for block i, depth + 1 for what follows. Raises InputError on an unknown parameter.
    """

    def layer_id(name: str) -> int:
        if re.fullmatch(r"encoder/(cls_token|pos_embed|patch_embed/.*)", name):
            return 0
        if block := re.match(r"encoder/block(\d+)/", name):
            return int(block[1])
        if re.fullmatch(r"encoder/(dist_token|(norm|neck_norm|neck|fc_norm|head|head_dist)/.*)", name):
            return depth + 1
        raise InputError(f"optim.layer_decay knows no layer for parameter {name}; set it to 1.0")

    if layer_decay == 1.0:
        return jax.tree.map(lambda _: 1.0, params)
    return jax.tree.map(lambda name: layer_decay ** (depth + 1 - layer_id(name)), paths(params))


def make_optimizer(cfg: Optim, schedule: Schedule, labels: Any, scales: Any) -> optax.GradientTransformation:
    """AdamW with decoupled decay, or SGD or LARS with momentum; `labels` from `rules`, `scales` from `lr_scales`.

    Frozen parameters have no moments, no decay and a rate of 0.
    """
    is_decayed = jax.tree.map(lambda label: label == "decay", labels)
    is_trained = jax.tree.map(lambda label: label != "freeze", labels)
    decay = optax.masked(optax.add_decayed_weights(cfg.weight_decay), is_decayed)
    momentum = optax.masked(optax.trace(cfg.momentum), is_trained)
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
