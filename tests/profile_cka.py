"""CKA of two ViTs on a batch against their two forward passes alone: python -m tests.profile_cka [--width=192] ...

Random images and weights, float32. Prints one JSON object: median seconds of each, and their ratio, the median over
rounds that take turns.
"""

import json
import statistics
import sys

import jax
import jax.numpy as jnp

from tinymim_jax.bench.timing import clock_of, conditions, in_turn, ratio
from tinymim_jax.commands.flags import new_flags, parse_flags
from tinymim_jax.evals import Cka
from tinymim_jax.evals.contract import Context, Other
from tinymim_jax.experiment.config import Data, Init, ViT
from tinymim_jax.runtime.sharding import make_mesh


def main(argv: list[str]) -> None:
    """Runs the comparison."""
    values = new_flags(
        width=(int, 192, "of both models"), depth=(int, 12, "blocks"), heads=(int, 12, "of each block"), pixels=(int, 224, "a side"),
        batch_size=(int, 128, "images"), rounds=(int, 3, "the median of so many"),
    )  # fmt: skip
    parse_flags(values, argv)
    model = ViT(values.width, values.depth, values.heads, image_size=values.pixels)
    data = Data("digits", split="test", transform="eval", image_size=values.pixels)
    images = jnp.zeros((1, values.pixels, values.pixels, 3))
    first, second = ({"params": {"encoder": model.build().init(jax.random.key(i), images)["params"]}} for i in (0, 1))
    other = Other(model, second, data.mean, data.std)
    cka = Cka(data, other=Init(path="second"), batch_size=values.batch_size).build(
        Context(make_mesh(devices=jax.devices()[:1]), None, model, {"other": other})
    )
    shape = (values.batch_size, *images.shape[1:])
    batch = {
        "image": jax.random.randint(jax.random.key(2), shape, 0, 256).astype(jnp.uint8),
        "is_valid": jnp.ones(values.batch_size, bool),
    }
    whole = jax.jit(cka.update)
    plain = jax.jit(lambda a, b, batch: [v(w, batch["image"], ()).tokens for v, w in zip(views, (a, b), strict=True)])
    views = list(cka.viewers.values())
    clocks = {
        "cka_s": clock_of(lambda: whole(first, {}, {"other": second}, batch)),
        "forward_s": clock_of(lambda: plain(first, second, batch)),
    }
    found = in_turn(clocks, values.rounds)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    print(json.dumps({**conditions(), **medians, "ratio": ratio(found["cka_s"], found["forward_s"])}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
