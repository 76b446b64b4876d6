"""Where all randomness comes from: a stage's seed and name, then a stream, then the step.

Nothing random is stored: whoever knows these has every draw of a stage.
"""

import zlib

import jax
import numpy as np

SEEDS = {"at_least": 0, "at_most": 2**63 - 1}  # whole numbers of 64 bits, as other programs read them
INIT, STEPS, CROPS = range(3)  # streams of a stage's key: initial weights, training steps, crops made on devices


def stage_seed(seed: int, name: str) -> int:
    """64 bits that tell stages of one seed apart; of the host's generators, and of `key`."""
    words = np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(2, np.uint32)
    return int(words[0]) << 32 | int(words[1])


def key(seed: int, stream: int) -> jax.Array:
    """The key of one of a stage's streams; `seed` is a `stage_seed`."""
    high, low = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(low), high), stream)
