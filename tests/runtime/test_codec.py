"""The strictness of `from_dict` on small dataclasses; tests/test_config.py tries it on the schema itself."""

import dataclasses
import json
from typing import Literal

import pytest

from tinymim_jax.runtime.codec import differences, from_dict, ranged, to_dict, walk
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


@dataclasses.dataclass
class Cage:
    height: float = ranged(above=0, below=2)
    door: int | None = ranged(None, at_least=1)
    bars: tuple[int, ...] = ranged((2, 3), at_least=1, at_most=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 0}, "cage.height is 0.0; it must be above 0 and below 2"),
        ({"height": 2}, "cage.height is 2.0; it must be above 0 and below 2"),
        ({"height": float("nan")}, "cage.height is nan; it must be finite"),
        ({"height": float("-inf")}, "cage.height is -inf; it must be finite"),
        ({"height": None}, "cage.height: expected float, got None"),
        ({"door": 0}, "cage.door is 0; it must be at least 1"),
        ({"door": 1.5}, "cage.door: expected int, got 1.5"),
        ({"bars": [1, 6]}, "cage.bars is (1, 6); it must be at least 1 and at most 5"),
    ],
)
def test_numbers_keep_within_their_range(change, message):
    with pytest.raises(InputError) as error:
        from_dict(Cage, {"height": 1.0, **change}, "cage")
    assert str(error.value) == message


def test_what_lies_within_a_range():
    assert from_dict(Cage, {"height": 1.999, "door": None, "bars": [1, 5]}) == Cage(1.999, None, (1, 5))
    assert from_dict(Cage, {"height": 1, "door": 1, "bars": []}) == Cage(1.0, 1, ())
    with pytest.raises(InputError, match="config.height: Cage needs this field"):
        from_dict(Cage, {})


@dataclasses.dataclass
class Zoo:
    first: Home
    homes: dict[str, Home]
    guest: Dog | None = None


def test_walk_finds_every_instance_with_its_path_in_the_order_of_the_fields():
    other = Home(Dog(2.0))
    zoo = Zoo(HOME, {"b": other, "a": HOME}, Dog(3.0))
    assert list(walk(zoo, Cat)) == [("first.pet", Cat(9)), ("homes.a.pet", Cat(9))]
    assert list(walk(zoo, Dog)) == [("homes.b.pet", Dog(2.0)), ("guest", Dog(3.0))]
    assert [where for where, _ in walk(zoo, Home)] == ["first", "homes.b", "homes.a"]
    assert list(walk(HOME, Home)) == [("", HOME)] and list(walk(zoo, Cage)) == []
    assert next(walk(zoo, Cat))[1] is HOME.pet


@pytest.mark.parametrize("seed", [2**63, 2**64, -1])
def test_seeds_are_whole_numbers_of_63_bits(seed):
    from tinymim_jax.experiment.config import Data, Run

    for kind, fields in (
        (Run, ({"batch_size": 1}, "seed", "data_seed")),
        (Data, ({"source": "digits"}, "subset_seed")),
    ):
        given, *names = fields
        for name in names:
            assert getattr(from_dict(kind, {**given, name: 2**63 - 1}), name) == 2**63 - 1
            with pytest.raises(InputError, match=f"{name} is {seed}; it must be"):
                from_dict(kind, {**given, name: seed})
