import ast
import copy
import dataclasses
import json
import typing
from pathlib import Path

import pytest

import tinymim_jax
from tests.experiment.stages import EVAL_DATA, full_config, make_distill, make_stage
from tinymim_jax.experiment.config import (
    Classification,
    Classify,
    Config,
    Data,
    Distill,
    Feature,
    Init,
    Knn,
    Mae,
    Masks,
    Mesh,
    Optim,
    Relation,
    Run,
    Stage,
    ViT,
)
from tinymim_jax.runtime.codec import RUNTIME_FIELDS, differences, from_dict, to_dict
from tinymim_jax.runtime.errors import InputError


def kinds_of(value):
    """Every dataclass that a type names, from `Config` down."""
    if dataclasses.is_dataclass(value):
        return {value}.union(*(kinds_of(hint) for hint in typing.get_type_hints(value).values()))
    return set().union(*(kinds_of(arg) for arg in typing.get_args(value)))


def edit(plain, path, value):
    """`plain` with the entry at dotted `path` set (or, for `...`, removed)."""
    *parents, last = path.split(".")
    node = plain
    for key in parents:
        node = node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return plain


def fails(kind, plain, where="config"):
    with pytest.raises(InputError) as error:
        from_dict(kind, plain, where)
    assert "\n" not in str(error.value)
    return str(error.value)


# Round trip


def test_round_trip_through_json():
    cfg = full_config()
    plain = json.loads(json.dumps(to_dict(cfg)))
    back = from_dict(Config, plain)
    assert back == cfg
    assert type(back.stages["mae"].task) is Mae and type(back.stages["distill"].task) is Distill
    assert type(back.stages["tuned"].task) is Classify
    assert type(back.stages["mae"].evals["knn"]) is Knn
    assert type(back.stages["tuned"].evals["val"]) is Classification
    assert type(back.stages["distill"].task.targets["feature"]) is Feature
    assert back.stages["distill"].task.teacher.skip == ("x", "y")  # a tuple again
    assert back.compare["T"].rows["row"] == ("tuned",)
    assert back.stages["mae"].init is None


def test_the_round_trip_meets_every_dataclass():
    seen = set()

    def visit(value):
        if dataclasses.is_dataclass(value):
            seen.add(type(value))
            for field in dataclasses.fields(value):
                visit(getattr(value, field.name))
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ():
            visit(item)

    visit(full_config())
    assert seen == kinds_of(Config)


def changed_number(kind, name, value):
    """Another number within the field's bounds."""
    bounds = next(f for f in dataclasses.fields(kind) if f.name == name).metadata.get("bounds", {})
    limit = bounds.get("at_most", bounds.get("below"))
    return (
        type(value)(value + 1) if limit is None else type(value)((value + limit) / 2) if value != limit else value / 2
    )


def test_every_field_survives_when_changed():
    """No field is lost or mixed up: each is changed alone and comes back."""
    cases = [
        (ViT, to_dict(ViT(8, 2, 2))),
        (Data, to_dict(Data("digits"))),
        (Masks, to_dict(Masks(5, stride=7))),
        (Optim, to_dict(Optim(1.0))),
        (Run, to_dict(Run(1))),
        (Init, to_dict(Init("a"))),
        (Mae, to_dict(Mae())),
        (Distill, to_dict(Distill(Init("a"), {"relation": Relation(1)}))),
        (Relation, to_dict(Relation(1))),
        (Classify, to_dict(Classify())),
        (Mesh, to_dict(Mesh())),
        (Knn, to_dict(Knn(EVAL_DATA, EVAL_DATA))),
    ]
    for kind, plain in cases:
        hints = typing.get_type_hints(kind)
        for name, value in plain.items():
            if isinstance(value, bool):
                new = not value
            elif isinstance(value, (int, float)):
                new = changed_number(kind, name, value)
            elif isinstance(value, str) and hints[name] is str:
                new = value + "x"
            else:
                continue
            back = from_dict(kind, {**plain, name: new})
            assert getattr(back, name) == new and to_dict(back) == {**plain, name: new}


def test_to_dict_gives_plain_json_types():
    plain = to_dict(full_config())

    def visit(value):
        assert type(value) in (dict, list, str, int, float, bool, type(None))
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            visit(item)

    visit(plain)
    assert plain["stages"]["mae"]["data"]["crop_scale"] == [0.2, 1.0]
    assert plain["stages"]["mae"]["task"]["kind"] == "mae"


def test_fields_left_out_take_their_defaults():
    assert from_dict(Optim, {"lr": 2}) == Optim(2.0)
    assert from_dict(ViT, {"width": 8, "depth": 2, "num_heads": 2}).mlp_ratio == 4.0
    first, second = from_dict(Init, {"stage": "a"}), from_dict(Init, {"stage": "a"})
    assert first.rename is not second.rename


def test_an_int_is_a_float_but_not_the_reverse():
    optim = from_dict(Optim, {"lr": 1, "clip_norm": 3})
    assert (optim.lr, optim.clip_norm) == (1.0, 3.0)
    assert type(optim.lr) is float and type(optim.clip_norm) is float
    assert from_dict(Data, {"source": "digits", "crop_ratio": [1, 2]}).crop_ratio == (1.0, 2.0)
    assert type(from_dict(Data, {"source": "digits", "crop_ratio": [1, 2]}).crop_ratio[0]) is float


# Errors of from_dict


ERRORS = [
    ("stages.mae.optim.typo", 1, ["config.stages.mae.optim.typo: no such field", "Optim has lr, lr_batch,"]),
    ("nmae", "x", ["config.nmae: no such field", "Config has name, stages, mesh, compare"]),
    ("stages.mae.model.pool", "max", ["config.stages.mae.model.pool: unknown choice 'max'", "'cls', 'mean'"]),
    (
        "stages.distill.task.targets.relation.relations",
        ["qk", "kv"],
        ["config.stages.distill.task.targets.relation.relations[1]: unknown choice 'kv'", "'qk', 'vv', 'qq', 'kk'"],
    ),
    (
        "stages.mae.task.kind",
        "mea",
        ["config.stages.mae.task.kind: unknown choice 'mea'", "'mae', 'distill', 'classify'"],
    ),
    ("stages.mae.task.kind", ..., ["config.stages.mae.task.kind: unknown choice None", "'mae'"]),
    ("stages.mae.task", None, ["config.stages.mae.task.kind: unknown choice None", "'mae'"]),
    (
        "stages.mae.evals.knn.kind",
        "nnk",
        ["config.stages.mae.evals.knn.kind: unknown choice 'nnk'", "'classification', 'knn'"],
    ),
    ("stages.mae.optim.lr", "1e-3", ["config.stages.mae.optim.lr: expected float, got '1e-3'"]),
    ("stages.mae.optim.lr", True, ["config.stages.mae.optim.lr: expected float, got True"]),
    ("stages.mae.optim.lr", None, ["config.stages.mae.optim.lr: expected float, got None"]),
    ("stages.mae.run.seed", True, ["config.stages.mae.run.seed: expected int, got True"]),
    ("stages.mae.run.seed", 1.0, ["config.stages.mae.run.seed: expected int, got 1.0"]),
    ("stages.mae.run.steps", 1.5, ["config.stages.mae.run.steps: expected int, got 1.5"]),
    ("stages.mae.run.steps", False, ["config.stages.mae.run.steps: expected int, got False"]),
    ("stages.mae.model.remat", 1, ["config.stages.mae.model.remat: expected bool, got 1"]),
    ("stages.mae.data.path", 3, ["config.stages.mae.data.path: expected str, got 3"]),
    ("stages.mae.optim.freeze", "abc", ["config.stages.mae.optim.freeze: expected a tuple", "'abc'"]),
    ("stages.mae.optim.freeze", ["a", 1], ["config.stages.mae.optim.freeze[1]: expected str, got 1"]),
    ("stages.mae.data.mean", [0.1, 0.2], ["config.stages.mae.data.mean: expected a tuple", "[0.1, 0.2]"]),
    ("stages.mae.data.mean", [0.1, 0.2, "3"], ["config.stages.mae.data.mean[2]: expected float, got '3'"]),
    ("stages.mae.evals", ["knn"], ["config.stages.mae.evals: expected a dict, got ['knn']"]),
    ("stages.mae.init", "distill", ["config.stages.mae.init: expected the fields of Init, got 'distill'"]),
    (
        "stages.distill.task.teacher.rename.a",
        1,
        ["config.stages.distill.task.teacher.rename.a: expected str, got 1"],
    ),
    ("compare.T.rows.row", "mae", ["config.compare.T.rows.row: expected a tuple", "'mae'"]),
    ("stages.mae.optim.b1", 1.0, ["config.stages.mae.optim.b1 is 1.0; it must be at least 0 and below 1"]),
    ("stages.mae.optim.b1", float("nan"), ["config.stages.mae.optim.b1 is nan; it must be finite"]),
    ("stages.mae.task.decoder.width", 0, ["config.stages.mae.task.decoder.width is 0; it must be at least 1"]),
    ("stages.mae.evals.knn.k", [3, 0], ["config.stages.mae.evals.knn.k is (3, 0); it must be at least 1"]),
    ("mesh", [1, 2], ["config.mesh: expected the fields of Mesh, got [1, 2]"]),
    ("name", ..., ["config.name: Config needs this field"]),
    ("stages.mae.optim.lr", ..., ["config.stages.mae.optim.lr: Optim needs this field"]),
    ("stages.mae.model.depth", ..., ["config.stages.mae.model.depth: ViT needs this field"]),
    ("stages.distill.task.teacher", ..., ["config.stages.distill.task.teacher: Distill needs this field"]),
    ("stages.mae.evals.knn.bank", ..., ["config.stages.mae.evals.knn.bank: Knn needs this field"]),
    ("stages.mae.data.source", ..., ["config.stages.mae.data.source: Data needs this field"]),
]


@pytest.mark.parametrize(("path", "value", "expected"), ERRORS, ids=[f"{p}={v!r}" for p, v, _ in ERRORS])
def test_errors_name_the_field(path, value, expected):
    message = fails(Config, edit(to_dict(full_config()), path, value))
    assert message.startswith(expected[0])
    for part in expected[1:]:
        assert part in message


def test_the_place_can_be_named():
    assert fails(Stage, {}, "/w/stage.json").startswith("/w/stage.json.task: Stage needs this field")
    assert fails(Optim, 3, "here") == "here: expected the fields of Optim, got 3"


def test_a_kind_that_is_not_a_string_is_bad_input():
    assert "unknown choice ['mae']" in fails(Config, edit(to_dict(full_config()), "stages.mae.task.kind", ["mae"]))


def test_an_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)


# sources and differences


def test_the_checkpoints_that_feed_a_stage_by_field():
    own, teacher = Init(path="own"), Init(path="teacher")
    assert list(make_stage().inits()) == []
    assert list(make_stage(init=own).inits()) == [("init", own)]
    both = make_distill(teacher)
    assert list(both.inits()) == [("task.teacher", teacher)]
    both.init = own
    assert {where: init.path for where, init in both.inits()} == {"init": "own", "task.teacher": "teacher"}
    assert both.task_inits() == {"teacher": teacher} and both.eval_inits("val") == {}
    tuned = full_config().stages["tuned"]
    fields = [where for where, _ in tuned.inits()]
    assert fields == [
        "task.teacher",
        "init",
        "evals.cka.other",
        "evals.relation.teacher",
    ]  # a LabelTeacher's by its place
    assert tuned.eval_inits("cka") == {"other": Init("mae")}


def test_differences():
    old = to_dict(make_stage())
    assert differences(old, to_dict(make_stage())) == []
    new = copy.deepcopy(old)
    new["optim"]["lr"] = 0.5
    new["data"]["crop_scale"] = [0.1, 1.0]
    new["init"] = to_dict(Init("a"))
    lines = differences(old, new)
    assert "optim.lr: 0.001 -> 0.5" in lines
    assert "data.crop_scale: [0.2, 1.0] -> [0.1, 1.0]" in lines
    assert len(lines) == 3 and any(line.startswith("init: null -> {") for line in lines)
    assert differences({}, {"a": 1}) == ["a: null -> 1"]
    assert differences({"a": {"b": 1}}, {"a": {}}) == ["a.b: 1 -> null"]
    assert differences({"a": {"b": 1}}, {}) == ['a: {"b": 1} -> null']


def test_differences_ignore_what_changes_no_result():
    old, new = to_dict(make_stage()), to_dict(make_stage())
    new["data"].update(threads=7, workers=7, prefetch=7, num_examples=7)
    new["run"].update(log_every=7, checkpoint_every=7, keep=7)
    assert differences(old, new) == []
    assert set(RUNTIME_FIELDS) == {
        "threads",
        "workers",
        "prefetch",
        "num_examples",
        "log_every",
        "checkpoint_every",
        "keep",
    }
    for path, value in (("run.seed", 1), ("run.eval_every", 1), ("run.batch_size", 8), ("optim.accum_steps", 2)):
        assert len(differences(old, edit(copy.deepcopy(old), path, value))) == 1


def test_runtime_fields_exist():
    names = {f.name for kind in kinds_of(Config) for f in dataclasses.fields(kind)}
    assert set(RUNTIME_FIELDS) <= names


# Style rule 15: nothing unused survives


def attributes_read():
    """Every attribute name that the package reads."""
    names = set()
    for file in Path(tinymim_jax.__file__).parent.rglob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text()))
        names |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    return names


# Fields that are read by a name in a string.
READ_BY_NAME = {("Optim", "decay"), ("Optim", "no_decay")}


def test_every_field_is_read():
    read = attributes_read()
    for kind in kinds_of(Config):
        for field in dataclasses.fields(kind):
            assert field.name in read or (kind.__name__, field.name) in READ_BY_NAME, f"{kind.__name__}.{field.name}"
