"""What a task reads of a record, and how one record becomes that: the fields of a batch."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tinymim_jax.data.augment import load
from tinymim_jax.data.config import Data

Record = Mapping[str, Any]  # of a `sources.Source`
Example = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of a batch, which also has is_valid bool [B] and index int32 [B].

    Both are functions of a module, because worker processes are sent them by pickle. `read` draws geometry once and
    applies it to all fields of a record.
    """

    empty: Callable[[Data], Example]
    """An example of zeros: the shapes and dtypes."""
    read: Callable[[Record, str, Data, np.random.Generator], Example]
    """A record, its name and a generator -> an example; raises InputError that begins with the name."""

    def batch(self, data: Data, rows: int) -> Example:
        """A batch without a record in it."""
        zeros = {name: np.zeros((rows, *np.shape(value)), value.dtype) for name, value in self.empty(data).items()}
        return {**zeros, "is_valid": np.zeros(rows, bool), "index": np.full(rows, -1, np.int32)}


def _empty_image_label(data: Data) -> Example:
    return {"image": np.zeros((data.image_size, data.image_size, 3), np.uint8), "label": np.zeros((), np.int32)}


def _read_image_label(record: Record, name: str, data: Data, rng: np.random.Generator) -> Example:
    return {"image": load(record["image"], name, data, rng), "label": np.int32(record["label"])}


def _empty_two_crops(data: Data) -> Example:
    example = _empty_image_label(data)
    return {**example, "second": example["image"]}


def _read_two_crops(record: Record, name: str, data: Data, rng: np.random.Generator) -> Example:
    return {**_read_image_label(record, name, data, rng), "second": load(record["image"], name, data, rng)}


IMAGE_LABEL = Fields(_empty_image_label, _read_image_label)  # image uint8 [B, S, S, 3], label int32 [B]
TWO_CROPS = Fields(_empty_two_crops, _read_two_crops)  # and second, a crop of its own of the same image
