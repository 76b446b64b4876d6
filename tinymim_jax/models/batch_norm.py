"""BatchNorm as torch has it, of whole batches, whose rows may lie on many devices and come in several parts."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

MOMENTUM = 0.1  # torch's: the share of the new
PROBE_EPS = 1e-6  # of a linear probe (MAE, main_linprobe.py)


class BatchNorm(nn.Module):
    """[..., D] -> the same, by mean and biased variance of the batch, or when not in training by running ones.

    The latter, in the collection batch_stats, average the batches' means and unbiased variances, in float32. With
    `affine`, a learnt scale and bias follow. Of maps [B, H, W, D] the collection also has `count`, H W, the elements of
    a row, which `merge` needs to know.
    """

    epsilon: float = 1e-5
    affine: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        axes, d = tuple(range(x.ndim - 1)), x.shape[-1:]
        dtype, x = x.dtype, x.astype(jnp.float32)
        running = {"mean": jnp.zeros, "var": jnp.ones}
        running = {name: self.variable("batch_stats", name, make, d) for name, make in running.items()}
        if x.ndim > 2 and self.is_mutable_collection("batch_stats"):
            count = jnp.float32(x[0].size // d[0])
            self.variable("batch_stats", "count", lambda: count).value = count
        mean, var = running["mean"].value, running["var"].value
        if train:
            mean, var, n = x.mean(axis=axes), x.var(axis=axes), x.size // d[0]
            for name, new in {"mean": mean, "var": var * n / max(n - 1, 1)}.items():
                running[name].value = (1 - MOMENTUM) * running[name].value + MOMENTUM * new
        x = (x - mean) * jax.lax.rsqrt(var + self.epsilon)
        if self.affine:
            x = x * self.param("scale", nn.initializers.ones, d) + self.param("bias", nn.initializers.zeros, d)
        return x.astype(dtype)


def merge(before: Any, parts: Any, rows: int) -> Any:
    """`Encoder.merge_state`: what one batch would have left, had its parts not been normalised each for itself.

    A part's unbiased variance is of as many elements as its `rows` have, each `count` of them.
    """

    def merged(old: dict[str, jax.Array], new: dict[str, jax.Array]) -> dict[str, jax.Array]:
        n, kept = rows * old.get("count", 1), (1 - MOMENTUM) * old["var"]
        total = n * len(new["mean"])
        within = (new["var"].mean(axis=0) - kept) * (total - total / n)
        between = new["mean"].var(axis=0) / MOMENTUM * total
        found = {"mean": new["mean"].mean(axis=0), "var": kept + (within + between) / (total - 1)}
        return {**old, **found}

    return jax.tree.map(merged, before, parts, is_leaf=lambda node: "mean" in node)


def fold(kernel: np.ndarray, bias: np.ndarray, mean: np.ndarray, var: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The kernel [D, C] and bias [C] that give, without the probe's norm, what `kernel` and `bias` give behind it."""
    kernel, bias, mean, var = (np.asarray(array, np.float64) for array in (kernel, bias, mean, var))
    kernel = kernel / np.sqrt(var + PROBE_EPS)[:, None]
    return kernel.astype(np.float32), (bias - mean @ kernel).astype(np.float32)
