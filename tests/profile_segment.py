"""A training step of UPerNet-B against transformers' BEiT with UPerNet: python -m tests.profile_segment [--size=SIZE] ...

Both have the same encoder, pyramid and heads, AdamW, float32 and random images and weights; drop path and dropout are
off, as transformers has no dropout there. Prints one JSON object: median seconds of each, and their ratio, the median
over rounds that take turns.
"""

import json
import statistics
import sys
import time

import numpy as np
import torch
from transformers import BeitConfig, BeitForSemanticSegmentation

from tinymim_jax.bench import step as bench
from tinymim_jax.bench.timing import conditions, in_turn, ratio
from tinymim_jax.commands.flags import new_flags, parse_flags
from tinymim_jax.experiment import segmentation
from tinymim_jax.experiment.config import Data, Fcn, Masks, Optim, Run, Segment, Stage, UPer
from tinymim_jax.runtime.sharding import make_mesh
from tinymim_jax.training.setup import make_setup

CLASSES = 150


def ours(size: str, pixels: int, batch: int) -> bench.Clock:
    """Seconds of the next step."""
    model = segmentation.encoder(size, image_size=pixels, dtype="float32", drop_path=0.0)
    task = Segment(CLASSES, UPer(model.width, dropout=0.0), aux=Fcn(dropout=0.0))
    data = Data("scenes", image_size=pixels, masks=Masks(CLASSES, photometric=False))
    stage = Stage(task, model, data, Optim(1e-4, decay=(".*/kernel", ".*/(cls_token|pos_embed)"),
                                           no_decay=(".*/(bias|scale)",)), Run(batch, steps=100))  # fmt: skip
    return bench.step_clock(*bench.compile_step(make_setup(stage, "segment", {}, 1000), make_mesh()))


def theirs(size: str, pixels: int, batch: int) -> bench.Clock:
    """Likewise."""
    like = segmentation.encoder(size)
    sizes = {"hidden_size": like.width, "num_attention_heads": like.num_heads, "intermediate_size": 4 * like.width}
    model = BeitForSemanticSegmentation(
        BeitConfig(
            image_size=pixels, out_indices=[5, 7, 9, 12], num_labels=CLASSES, use_relative_position_bias=True,
            use_absolute_position_embeddings=True, layer_scale_init_value=1.0, drop_path_rate=0.0, **sizes,
        )
    ).train()  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.05)
    draws = np.random.default_rng(0)
    images = torch.tensor(draws.normal(size=(batch, 3, pixels, pixels)).astype(np.float32))
    labels = torch.tensor(draws.integers(0, CLASSES, (batch, pixels, pixels)))

    def step() -> float:
        begin = time.perf_counter()
        loss = model(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.perf_counter() - begin

    return step


def main(argv: list[str]) -> None:
    """Runs the comparison."""
    values = new_flags(
        size=(str, "base", "of the encoder"), pixels=(int, 512, "a side"), batch_size=(int, 2, "images; PyTorch cannot normalise one"),
        rounds=(int, 3, "the median of so many"),
    )  # fmt: skip
    parse_flags(values, argv)
    how = values.size, values.pixels, values.batch_size
    found = in_turn({"step_s": ours(*how), "torch_step_s": theirs(*how)}, values.rounds)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    about = {"benchmark": "segment", **conditions(), **dict(zip(("size", "pixels", "batch_size"), how, strict=True))}
    print(json.dumps({**about, **medians, "ratio": ratio(found["torch_step_s"], found["step_s"])}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
