"""BatchNorm as torch has it, of whole batches, whose rows may lie on many devices and come in several parts."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

MOMENTUM = 0.1  # torch's: the share of the new
PROBE_EPS = 1e-6  # of a linear probe (MAE, main_linprobe.py)


class BatchNorm(nn.Module):
    """[B, D] float32 -> the same, by mean and biased variance of the batch, or when not in training by running ones.

    The latter, in the collection batch_stats, average the batches' means and unbiased variances. There is no affine.
    """

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        running = {"mean": jnp.zeros, "var": jnp.ones}
        running = {name: self.variable("batch_stats", name, make, x.shape[1:]) for name, make in running.items()}
        if not train:
            return (x - running["mean"].value) * jax.lax.rsqrt(running["var"].value + self.epsilon)
        mean, var, n = x.mean(axis=0), x.var(axis=0), len(x)
        for name, new in {"mean": mean, "var": var * n / max(n - 1, 1)}.items():
            running[name].value = (1 - MOMENTUM) * running[name].value + MOMENTUM * new
        return (x - mean) * jax.lax.rsqrt(var + self.epsilon)


def merge(before: Any, parts: Any, rows: int) -> Any:
    """`Encoder.merge_state`: what one batch would have left, had its parts not been normalised each for itself."""

    def merged(old: dict[str, jax.Array], new: dict[str, jax.Array]) -> dict[str, jax.Array]:
        total, kept = rows * len(new["mean"]), (1 - MOMENTUM) * old["var"]
        within = (new["var"].mean(axis=0) - kept) * (total - total / rows)
        between = new["mean"].var(axis=0) / MOMENTUM * total
        return {"mean": new["mean"].mean(axis=0), "var": kept + (within + between) / (total - 1)}

    return jax.tree.map(merged, before, parts, is_leaf=lambda node: "mean" in node)


def fold(kernel: np.ndarray, bias: np.ndarray, mean: np.ndarray, var: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The kernel [D, C] and bias [C] that give, without the probe's norm, what `kernel` and `bias` give behind it."""
    kernel, bias, mean, var = (np.asarray(array, np.float64) for array in (kernel, bias, mean, var))
    kernel = kernel / np.sqrt(var + PROBE_EPS)[:, None]
    return kernel.astype(np.float32), (bias - mean @ kernel).astype(np.float32)
