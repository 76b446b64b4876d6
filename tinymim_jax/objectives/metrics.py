"""Metrics as (sum, count), so that nothing averages batch means."""

from collections.abc import Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Mean:
    """A sum and how many values are in it; scalars."""

    sum: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, values: jax.Array, is_valid: jax.Array | None = None) -> "Mean":
        """From values [B] (or a scalar), counting those where `is_valid` [B]."""
        values = jnp.asarray(values, jnp.float32)
        weight = jnp.ones(values.shape) if is_valid is None else is_valid.astype(jnp.float32)
        # where, not a product: a masked NaN must not leak.
        return cls(jnp.sum(jnp.where(weight > 0, values, 0.0)), jnp.sum(weight))

    def value(self) -> jax.Array:
        """sum / count; NaN if nothing was counted."""
        return self.sum / self.count


def merge(many: Iterable[dict[str, Any]]) -> dict[str, Mean]:
    """Adds up dicts of `Mean`; a key may be missing from some."""
    total: dict[str, Mean] = {}
    for metrics in many:
        for name, m in metrics.items():
            total[name] = Mean(total[name].sum + m.sum, total[name].count + m.count) if name in total else m
    return total


def to_floats(metrics: dict[str, Mean]) -> dict[str, float]:
    """Name -> sum / count as Python floats."""
    return {name: float(m.sum) / float(m.count) if m.count else float("nan") for name, m in metrics.items()}
