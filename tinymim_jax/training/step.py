"""The training step: one, for every task."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from tinymim_jax.data import resident
from tinymim_jax.objectives.metrics import Mean
from tinymim_jax.runtime import keys, preemption, sharding
from tinymim_jax.tasks.contract import STREAMS, Batch, Frozen
from tinymim_jax.training import optim
from tinymim_jax.training.progress import ASKED, BAD_IMAGES, FAILED, FINITE, LR
from tinymim_jax.training.setup import StageSetup, example_batch


@flax.struct.dataclass
class TrainState:
    """All that a step changes. `ema` is {} where no average is kept. Several replicas are stacked, [R, ...]."""

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    ema: Any


TrainStep = Callable[[TrainState, Frozen, Batch, jax.Array], tuple[TrainState, dict[str, Mean]]]


def host_keys(setup: StageSetup, stream: int) -> jax.Array:
    """The key of one of the stage's streams; of several replicas theirs, [R]."""
    found = [keys.key(seed, stream) for seed in setup.seeds()]
    return found[0] if len(found) == 1 else jnp.stack(found)


def stage_keys(setup: StageSetup, stream: int, mesh: jax.sharding.Mesh) -> jax.Array:
    """`host_keys` on every device of `mesh`, as the step takes them."""
    data = jax.random.key_data(host_keys(setup, stream))
    return jax.random.wrap_key_data(sharding.put_tree(data, sharding.replicated(mesh)))


def create_state(setup: StageSetup, rng: jax.Array) -> TrainState:
    """Fresh parameters and optimiser state; rng is of stream INIT, one for each replica."""

    def create(rng: jax.Array) -> TrainState:
        variables = dict(setup.task.init(rng, example_batch(setup.task, setup.stage))[0])
        params = variables.pop("params")
        ema = params if setup.stage.optim.ema else {}
        return TrainState(jnp.zeros((), jnp.int32), params, variables, setup.tx.init(params), ema)

    return jax.vmap(create)(rng) if rng.ndim else create(rng)


def make_train_step(setup: StageSetup) -> TrainStep:
    """step(state, frozen, batch, rng) -> (state, metrics); pure, for `jit`.

    `rng` is the stage's key of stream STEPS: every random number is a function of it, the step and the stream's name.
    """
    task, tx, cfg = setup.task, setup.tx, setup.stage.optim

    def gradients(state: TrainState, frozen: Frozen, batch: Batch, rng: jax.Array) -> tuple[Any, Any]:
        rngs = {name: jax.random.fold_in(rng, i) for i, name in enumerate(STREAMS)}

        def loss(params: Any) -> tuple[jax.Array, Any]:
            params = optim.stop_frozen(params, setup.labels)
            return task.loss(params, state.model_state, frozen, batch, rngs, train=True)

        return jax.grad(loss, has_aux=True)(state.params)

    def step(state: TrainState, frozen: Frozen, batch: Batch, rng: jax.Array) -> tuple[TrainState, dict[str, Mean]]:
        batch = resident.make_batch(setup.stage.data, batch)
        rng = jax.random.fold_in(rng, state.step)
        grads, aux = accumulate(gradients, cfg.accum_steps, task.merge_state, state, frozen, batch, rng)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1 - cfg.ema) if cfg.ema else {}
        norms = {"grad_norm": Mean.of(optax.global_norm(grads)), "param_norm": Mean.of(optax.global_norm(params))}
        wishes = {ASKED: preemption.STOP, FAILED: preemption.FAILED}
        rows = {BAD_IMAGES: ~batch["is_valid"], **{name: batch["stop"] == wish for name, wish in wishes.items()}}
        counts = {name: Mean.of(jnp.sum(is_one)) for name, is_one in rows.items()}
        new = TrainState(state.step + 1, params, aux.model_state, opt_state, ema)
        rate = {LR: Mean.of(optim.current_lr(setup.schedule, state.opt_state))}
        step_metrics = {**aux.metrics, **norms, **counts, **rate}
        if setup.stage.run.on_nan == "skip":
            new = keep_if_bad(state, new, step_metrics)
        return new, step_metrics

    return step


def keep_if_bad(old: TrainState, new: TrainState, step_metrics: dict[str, Mean]) -> TrainState:
    """`new`, or where it is not finite `old` a step later (the optimiser's own count stays as well)."""
    is_good = jnp.all(jnp.isfinite(jnp.stack([step_metrics[name].sum for name in FINITE])))
    kept = jax.tree.map(lambda n, o: jnp.where(is_good, n, o), new, old)
    return kept.replace(step=new.step)


def accumulate(
    gradients: Callable, steps: int, merge: Callable, state: TrainState, frozen: Frozen, batch: Batch, rng: jax.Array
) -> tuple[Any, Any]:
    """Gradients of the mean over all valid images, summed metrics and `merge`d state, from `steps` micro-batches."""
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
    merged = merge(state.model_state, aux.model_state, micro["is_valid"].shape[1])
    return jax.tree.map(lambda g: g / summed["loss"].count, grads), aux.replace(metrics=summed, model_state=merged)


def train_step(setup: StageSetup) -> TrainStep:
    """`make_train_step`; of replicas, all at once: states, keys, metrics and batches of their own are stacked [R, ...].

    What does not differ between replicas, such as a teacher's pass over a shared batch, is computed once. A CPU is full
    with one replica: where they share nothing, it takes one after the other, in less time and memory.
    """
    step = make_train_step(setup)
    if setup.stage.run.replicas == 1:
        return step
    if setup.shares_batches or jax.default_backend() != "cpu":
        return jax.vmap(step, in_axes=(0, None, None if setup.shares_batches else 0, 0))

    def steps(states: TrainState, frozen: Frozen, batches: Batch, rngs: jax.Array) -> tuple[TrainState, dict]:
        # Written out: in a loop, XLA on the CPU computes convolutions a hundred times as slowly.
        each = (jax.tree.map(lambda x, i=i: x[i], (states, batches, rngs)) for i in range(len(rngs)))
        done = [step(state, frozen, batch, rng) for state, batch, rng in each]
        return jax.tree.map(lambda *found: jnp.stack(found), *done)

    return steps


def in_turn(step: TrainStep) -> TrainStep:
    """`step` on one after the other of batches stacked [K, ...]; the metrics come stacked [K, ...]."""

    def steps(state: TrainState, frozen: Frozen, batch: Batch, rng: jax.Array) -> tuple[TrainState, dict[str, Mean]]:
        held = {name: batch[name] for name in batch if name == "held"}  # the same for all
        rows = {name: batch[name] for name in batch if name != "held"}
        return jax.lax.scan(lambda state, rows: step(state, frozen, {**held, **rows}, rng), state, rows)

    return steps


def side_by_side(setups: Sequence[StageSetup]) -> TrainStep:
    """The steps of one or several stages on one batch; states, keys and metrics are tuples, and `frozen` is for all.

    What the tasks of several can share, such as a teacher's pass, is computed once.
    """
    steps, tasks = [train_step(setup) for setup in setups], [setup.task for setup in setups]

    def step(states: Any, frozen: Frozen, batch: Batch, rngs: Any) -> tuple[Any, Any]:
        if len(tasks) > 1:
            batch = resident.make_batch(setups[0].stage.data, batch)
            batch = {**batch, **tasks[0].shared(frozen, batch, tasks)}
        done = [one(state, frozen, batch, rng) for one, state, rng in zip(steps, states, rngs, strict=True)]
        return tuple(zip(*done, strict=True))

    return step


def jit_step(step: TrainStep, mesh: jax.sharding.Mesh, shardings: Any, per_call: int = 1) -> TrainStep:
    """`step`, compiled, or up to `per_call` of them `in_turn`: the state is donated and nothing else is."""
    step = step if per_call == 1 else in_turn(step)
    out, options = (shardings, sharding.replicated(mesh)), sharding.compiler_options(mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=out, compiler_options=options)


def to_items(state: TrainState) -> dict[str, Any]:
    """The array items of a checkpoint: `model`, which later stages read, and `optim`; of both a state is made again."""
    model = {"params": state.params, "model_state": state.model_state, "ema": state.ema}
    return {"model": model, "optim": {"opt_state": state.opt_state, "step": state.step}}
