"""The strictness of `from_dict` on small dataclasses; tests/test_config.py tries it on the schema itself."""

import dataclasses
import json
from typing import Literal

import pytest

from tinymim_jax.runtime.codec import differences, from_dict, to_dict
from tinymim_jax.runtime.errors import InputError


@dataclasses.dataclass
class Cat:
    lives: int
    kind: Literal["cat"] = "cat"


@dataclasses.dataclass
class Dog:
    bark: float = 1.0
    kind: Literal["dog"] = "dog"


@dataclasses.dataclass
class Home:
    pet: Cat | Dog
    names: tuple[str, ...] = ()
    size: tuple[int, int] = (1, 2)
    rooms: dict[str, int] = dataclasses.field(default_factory=dict)
    owner: str | None = None


HOME = Home(Cat(9), ("a", "b"), (3, 4), {"kitchen": 1}, "me")


def test_a_round_trip_through_json():
    assert from_dict(Home, json.loads(json.dumps(to_dict(HOME)))) == HOME


def test_the_copy_shares_nothing():
    copy = from_dict(Home, to_dict(HOME))
    copy.rooms["bath"] = 2
    assert "bath" not in HOME.rooms and copy.pet is not HOME.pet


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"garden": 1}, "home.garden: no such field; Home has pet, names"),
        ({"pet": {"kind": "cow"}}, "home.pet.kind: unknown choice 'cow'; choose one of 'cat', 'dog'"),
        ({"pet": {"kind": "cat"}}, "home.pet.lives: Cat needs this field"),
        ({"pet": {"kind": "cat", "lives": 1.5}}, "home.pet.lives: expected int, got 1.5"),
        ({"pet": {"kind": "cat", "lives": True}}, "home.pet.lives: expected int, got True"),
        ({"size": [1]}, "home.size: expected a tuple"),
        ({"names": "ab"}, "home.names: expected a tuple"),
        ({"rooms": {"x": "y"}}, "home.rooms.x: expected int, got 'y'"),
    ],
)
def test_errors_name_the_field(change, message):
    with pytest.raises(InputError) as error:
        from_dict(Home, {**to_dict(HOME), **change}, "home")
    assert str(error.value).startswith(message)


def test_whole_numbers_are_floats_where_floats_are_wanted():
    assert from_dict(Dog, {"bark": 2}) == Dog(2.0)


def test_differences_leave_out_what_changes_no_weights():
    old = {"lr": 1.0, "data": {"threads": 2, "split": "train"}}
    new = {"lr": 2.0, "data": {"threads": 4, "split": "val"}, "more": None}
    assert differences(old, new) == ["lr: 1.0 -> 2.0", 'data.split: "train" -> "val"']
