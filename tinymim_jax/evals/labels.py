"""Which output of a head a data set's label means."""

import re
from collections.abc import Sequence

import numpy as np

from tinymim_jax.evals import subsets
from tinymim_jax.runtime.errors import InputError


def match(
    head: Sequence[str] | None, data: Sequence[str] | None, outputs: int, where: str
) -> tuple[np.ndarray | None, str]:
    """(the output of each label, int [n], None: of the same number; how that is known, for people).

    By name where the head and the data have names, else by the number that folders 0 to n-1 are called by, else by
    position. Raises InputError, naming the data by `where`, on classes that the model has not.
    """
    if not data:
        return None, "the data does not name its classes: a label is the output of that number"
    if head is not None:
        names = _plain(head)
        found = {name: column for column, name in enumerate(names) if names.count(name) == 1}
        columns = [found.get(name) for name in _plain(data)]
        odd = [name for name, column in zip(data, columns, strict=True) if column is None]
        if not odd:
            few = f", {len(data)} of {outputs}" if len(data) < outputs else ""
            return np.array(columns), f"labels go by the names of the classes{few}"
        if len(odd) < len(data):
            raise InputError(f"{where} has classes that are not the model's ({odd[0]!r}); use data with its classes")
    if len(data) != outputs:
        raise InputError(
            f"{where} has {len(data)} classes and the model {outputs}; use data with the classes that it was trained on"
        )
    if all(re.fullmatch(r"\d{1,9}", name) for name in data) and {int(name) for name in data} == set(range(outputs)):
        return np.array([int(name) for name in data]), "labels are the numbers that the class folders are called by"
    if len(data) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in data):  # as ImageNet's are called
        if list(data) != subsets.imagenet_wnids():
            raise InputError(f"{where} has 1000 wnids that are not ImageNet's; use data with the model's classes")
        return None, "labels are ImageNet's, in the order of the wnids"
    return None, (
        f"names of classes cannot be compared: output 0 of the model is taken to be {data[0]!r}, the data's first, and"
        " so on in the order of the names"
    )


def order(head: Sequence[str], data: Sequence[str], where: str) -> tuple[np.ndarray | None, str]:
    """(the output of each class of masks, None: of the same number; how that is known, for people).

    By name where both lists have the same names, else by position. Raises InputError, naming the data by `where`, if
    by position a name would become another class's.
    """
    names, wanted = _plain(head), _plain(data)
    if len(set(names)) == len(names) and sorted(names) == sorted(wanted):
        columns = np.array([names.index(name) for name in wanted])
        is_same = names == wanted
        return (
            None if is_same else columns,
            f"classes go by their names{'' if is_same else ', which are in another order'}",
        )
    for i, name in enumerate(wanted):
        if name in names and name not in names[i : i + 1]:
            raise InputError(
                f"{where}: class {data[i]!r} is number {i} there and {names.index(name)} of the model's, whose other"
                " names are not the data's; give its classes.txt the names of the model's classes"
            )
    return None, f"not all names of classes are the model's: output 0 of it is taken to be {data[0]!r}, and so on"


def _plain(names: Sequence[str]) -> list[str]:
    """Names without what a folder's name cannot keep: case, and whether blanks or underscores part the words."""
    plain = [re.sub(r"[\s_]+", " ", name).strip().casefold() for name in names]
    return plain if len(set(plain)) == len(names) else list(names)
