"""Where the time of a distillation step goes: python -m tests.profile_step --config=FILE --stage=NAME --batch_size=N.

Times the step as it is in turn with one that has a piece written as in a plain port (attention over [B, N, H, E]; linear
layers on [B, N, D]; GELU's derivative left to JAX; patches that XLA may make again; the relation loss with whole relation
maps), or all of them; then the parts that it is made of. Prints one JSON object: median seconds, and of the plain steps
the median ratio to the step as it is.
"""

import contextlib
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinymim_jax.bench import relation
from tinymim_jax.bench import step as bench
from tinymim_jax.bench.timing import Clock, clock_of, conditions
from tinymim_jax.commands.flags import new_flags, parse
from tinymim_jax.models import attention, layers, vit
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import STREAMS
from tinymim_jax.tasks.targets import relation as relation_target
from tinymim_jax.training import optim


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """As `attention.attention`, over [B, N, H, E]."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    logits = jnp.einsum("bnhe,bmhe->bhnm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jnp.einsum("bhnm,bmhe->bnhe", jax.nn.softmax(logits).astype(v.dtype), v).swapaxes(1, 2)


class PlainAttention(layers.Attention):
    """On [B, N, D], without a position bias."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        heads = (3, self.num_heads, x.shape[-1] // self.num_heads)
        qkv = nn.DenseGeneral(heads, kernel_init=layers.xavier, dtype=self.dtype, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        out = attention.ATTENTIONS[self.kind](*(a.swapaxes(1, 2) for a in (q, k, v))).swapaxes(1, 2).reshape(x.shape)
        return nn.Dense(x.shape[-1], kernel_init=layers.xavier, dtype=self.dtype, name="proj")(out), (q, k, v)


class PlainMlp(layers.Mlp):
    """On [B, N, D]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = {"kernel_init": layers.xavier, "dtype": self.dtype}
        h = layers.gelu(nn.Dense(self.hidden, name="fc1", **dense)(x))
        return nn.Dense(x.shape[-1], name="fc2", **dense)(h)


def plain_kl(teacher: Any, student: Any, **_: Any) -> jax.Array:
    """As `relation_kl`, with whole maps [B, H, N, N]."""
    return relation.plain(teacher, student)


PLAIN = {
    "attention": [(attention.ATTENTIONS, kind, plain_attention) for kind in attention.ATTENTIONS],
    "linear layers": [(layers, "Attention", PlainAttention), (layers, "Mlp", PlainMlp)],
    "GELU": [(layers, "gelu", functools.partial(nn.gelu, approximate=False))],
    "patches": [(vit, "optimization_barrier", lambda x: x)],
    "relation loss": [(relation_target, "relation_kl", plain_kl)],
}


@contextlib.contextmanager
def plain(*names: str) -> Iterator[None]:
    """These pieces written plainly."""
    with contextlib.ExitStack() as stack:
        for where, name, piece in (patch for key in names for patch in PLAIN[key]):
            patch = (
                mock.patch.dict(where, {name: piece})
                if where is attention.ATTENTIONS
                else mock.patch.object(where, name, piece)
            )
            stack.enter_context(patch)
        jax.clear_caches()  # of blocks that were traced with other pieces
        stack.callback(jax.clear_caches)
        yield


def step_clock(plan: Any, mesh: jax.sharding.Mesh) -> Clock:
    """Seconds of the next step."""
    return bench.step_clock(*bench.compile_step(plan, mesh))


def part_clock(function: Callable, *arguments: Any) -> Clock:
    """Seconds of a function."""
    return clock_of(functools.partial(jax.jit(function).lower(*arguments).compile(), *arguments))


def parts(plan: Any, mesh: jax.sharding.Mesh) -> dict[str, tuple[Any, ...]]:
    """Teacher and student alone, forward; the whole loss, its gradient; the optimiser's update: with their arguments."""
    task = plan.task
    _, (state, frozen, batch, rng) = bench.compile_step(plan, mesh)
    rngs, images = dict.fromkeys(STREAMS, rng), task._views(batch, None)[0]

    def loss(params: Any, frozen: Any, batch: Any, rngs: Any) -> jax.Array:
        return task.loss(optim.stop_frozen(params, plan.labels), {}, frozen, batch, rngs, train=True)[0]

    def tokens(model: Any, block: int) -> Callable:
        def forward(params: Any, images: jax.Array) -> jax.Array:
            return model.apply({"params": params["encoder"]}, images, capture=(block,)).trace[block].q

        return forward

    given = state.params, frozen, batch, rngs  # what is closed over is a constant, and computed while compiling
    return {
        "teacher forward": (tokens(task.teacher, task.of_teacher.blocks[-1]), frozen["teacher"], images),
        "student forward": (tokens(task.model, task.of_student.blocks[-1]), state.params, images),
        "loss": (loss, *given),
        "loss and gradient": (jax.value_and_grad(loss), *given),
        "update": (plan.tx.update, state.params, state.opt_state, state.params),
    }


def in_turn(rounds: int, *clocks: Clock) -> list[tuple[float, ...]]:
    """Seconds of each, in each round; the second of two calls, as the first meets memory that the system has taken back."""
    return [tuple((clock(), clock())[1] for clock in clocks) for _ in range(rounds)]


def main(argv: list[str]) -> None:
    """Runs the comparison."""
    values = new_flags(
        stage=(str, None, "a distillation"), batch_size=(int, 8, "images"), rounds=(int, 5, "the median of so many")
    )
    cfg = parse(values, argv, __doc__)
    stages = [name for name, stage in cfg.stages.items() if stage.task.kind == "distill"]
    if values.stage not in stages:
        given = f"--stage={values.stage} is no distillation of the chain" if values.stage else "--stage=NAME is needed"
        raise InputError(f"{given}; choose one of {', '.join(stages)}")
    run = cfg.stages[values.stage].run
    run.batch_size, run.steps_per_call = values.batch_size, 1
    _, plan, mesh = bench.prepared(cfg, values.stage)
    base, found, as_it_is = step_clock(plan, mesh), {}, []
    for name, pieces in {**{name: (name,) for name in PLAIN}, "all": tuple(PLAIN)}.items():
        with plain(*pieces):
            pairs = in_turn(values.rounds, base, step_clock(plan, mesh))
        as_it_is += [ours for ours, _ in pairs]
        found[f"step, plain {name}"] = {
            "s": statistics.median(theirs for _, theirs in pairs),
            "ratio": statistics.median(theirs / ours for ours, theirs in pairs),
        }
        print(f"plain {name}: {found[f'step, plain {name}']}", file=sys.stderr)
    del base  # and its weights
    for name, (function, *arguments) in parts(plan, mesh).items():
        seconds = in_turn(values.rounds, part_clock(function, *arguments))
        found[name] = {"s": statistics.median(s for (s,) in seconds)}
        print(f"{name}: {found[name]['s']:.3f} s", file=sys.stderr)
    asked = {
        "stage": values.stage,
        "batch_size": run.batch_size,
        "dtype": plan.stage.model.dtype,
        "rounds": values.rounds,
    }
    found = {"step": {"s": statistics.median(as_it_is)}, **found}
    print(json.dumps({**asked, **conditions(), "found": found}, indent=2))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")
