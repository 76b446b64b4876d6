"""Linear CKA between the layers of two models, or of one, in mini-batches (Nguyen et al. 2021, Eq. 3)."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.evals.analysis import Analysis, Layers, Viewer, layer_names, variables_of, viewers
from tinymim_jax.evals.contract import Batch, Context, Evaluator, Result, Variables
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.weights.handoff import Init

FEWEST = 4  # images for the unbiased HSIC


@dataclasses.dataclass
class Cka(Analysis):
    """Centred kernel alignment, 0 to 1, of every layer with every layer of another model."""

    other: Init | None = None  # None: of the model itself
    layers: Layers = "norm1"
    cls: bool = False  # whether the tokens in front of the patches take part
    kind: Literal["cka"] = "cka"

    def build(self, context: Context) -> "Similarity":
        return Similarity(self, context)

    def metrics(self) -> list[str]:
        return ["mean"]


class Similarity(Evaluator):
    """{"mean"} over all pairs of layers; arrays: `cka` and its standard error over batches, [rows, columns]."""

    def __init__(self, cfg: Cka, context: Context):
        self.cfg, self.passes = cfg, {"data": cfg.batches(context)}
        self.others = variables_of(context.others)
        self.viewers = viewers(cfg.data, context)
        count = min(len(self.passes["data"].source), self.passes["data"].args["batch_size"])
        if count < FEWEST:
            raise InputError(f"cka needs {FEWEST} images in a batch, not {count}; give more, or set batch_size")

    def update(self, variables: Variables, frozen: Any, others: Mapping[str, Variables], batch: Batch) -> Any:
        """Gram matrices [layers, B, B] of each model, so that no pair of layers is compared on the devices."""
        each = {"": variables, **others}
        return [self._grams(viewer, each[name], batch) for name, viewer in self.viewers.items()], batch["is_valid"]

    def _grams(self, viewer: Viewer, variables: Variables, batch: Batch) -> jax.Array:
        return jnp.stack(
            [
                gram(x, batch["is_valid"])
                for x in viewer.layers(variables, batch["image"], self.cfg.layers, cls=self.cfg.cls)
            ]
        )

    def finish(self, found: Mapping[Hashable, list[Any]]) -> Result:
        each = []
        for grams, is_valid in found["data"]:
            if is_valid.sum() >= FEWEST:  # of the last batch there may be fewer
                rows, columns = grams[0], grams[-1]
                each.append([hsic(*pair, is_valid) for pair in ((rows, columns), (rows, rows), (columns, columns))])
        if not each:
            raise InputError(f"cka: no batch had {FEWEST} images that can be read; mend the data")
        value, error = cka_of_batches(each)
        models = list(self.viewers.values())
        rows, columns = (layer_names(viewer.model, self.cfg.layers) for viewer in (models[0], models[-1]))
        other = self.cfg.other
        names = ["this model", *([other.stage or other.path] if other else [])]
        arrays = {"cka": value, "cka_error": error, "rows": rows, "columns": columns, "models": names}
        arrays["kind"] = self.cfg.kind
        return Result({"mean": float(value.mean())}, arrays)


def gram(x: jax.Array, is_valid: jax.Array) -> jax.Array:
    """Products of B images' features [B, N, D] with each other, without each with itself: [B, B], float32.

    Features are centred first, which changes no HSIC, so that float32 is enough. Rows that are not valid are 0.
    """
    x = jnp.where(is_valid[:, None, None], x.astype(jnp.float32), 0)
    x = jnp.where(is_valid[:, None, None], x - x.sum(axis=0) / jnp.maximum(is_valid.sum(), 1), 0)
    products = jnp.einsum("bnd,cnd->bc", x, x, precision="highest")
    return products * (1 - jnp.eye(len(x)))


def hsic(rows: np.ndarray, columns: np.ndarray, is_valid: np.ndarray) -> np.ndarray:
    """The unbiased HSIC_1 of Gram matrices [R, B, B] and [C, B, B] without diagonals, of the valid of B: [R, C].

    Song et al. 2012, Eq. 4; float64, as its terms nearly cancel.
    """
    n = int(is_valid.sum())
    rows, columns = (m.astype(np.float64) for m in (rows, columns))
    trace = np.einsum("rij,cij->rc", rows, columns, optimize=True)
    row_sums, column_sums = rows.sum(axis=2), columns.sum(axis=2)
    totals = np.outer(row_sums.sum(axis=1), column_sums.sum(axis=1)) / ((n - 1) * (n - 2))
    return (trace + totals - 2 / (n - 2) * row_sums @ column_sums.T) / (n * (n - 3))


def cka_of_batches(each: list[list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """CKA [R, C] from each batch's HSIC of rows with columns, rows with rows, columns with columns.

    With its standard error over the batches by the jackknife, NaN of a single batch.
    """

    def cka(batches: list[list[np.ndarray]]) -> np.ndarray:
        cross, rows, columns = (np.mean(parts, axis=0) for parts in zip(*batches, strict=True))
        return cross / np.sqrt(np.outer(np.diag(rows), np.diag(columns)))

    value, n = cka(each), len(each)
    if n == 1:
        return value, np.full_like(value, np.nan)
    without = np.stack([cka(each[:i] + each[i + 1 :]) for i in range(n)])
    return value, np.sqrt((n - 1) * without.var(axis=0))
