import ast
import copy
import dataclasses
import json
import typing
from pathlib import Path

import pytest

import tinymim_jax
from tinymim_jax.experiment.config import (
    Classification,
    Classify,
    Compare,
    Config,
    Corruptions,
    Data,
    Decoder,
    Distill,
    Init,
    Knn,
    LabelTeacher,
    Logistic,
    Mae,
    Mesh,
    Optim,
    Run,
    Stage,
    Teacher,
    ViT,
    sources,
)
from tinymim_jax.models.vit import VisionTransformer
from tinymim_jax.runtime import codec, config
from tinymim_jax.runtime.codec import differences, from_dict, to_dict
from tinymim_jax.runtime.errors import InputError

EVAL_DATA = Data("digits", split="test", image_size=8, transform="eval")


def make_stage(**changes):
    parts = {
        "task": Classify(mixup=0.0),
        "model": ViT(8, 2, 2, image_size=8, patch_size=4, num_classes=10),
        "data": Data("digits", image_size=8),
        "optim": Optim(lr=1e-3),
        "run": Run(batch_size=4, epochs=1.0),
    }
    return Stage(**{**parts, **changes})


def make_distill(teacher, block=2):
    return make_stage(
        task=Distill(Teacher(teacher, block=1), student_block=block), model=ViT(8, 2, 2, image_size=8, patch_size=4)
    )


def full_config():
    """Every dataclass and every kind of every union, no field at its default where that is easy."""
    mae = make_stage(
        task=Mae(decoder=Decoder(16, 1, 2), mask_ratio=0.5, norm_pix_loss=False),
        model=ViT(8, 2, 2, image_size=8, patch_size=4),
        evals={"knn": Knn(EVAL_DATA, dataclasses.replace(EVAL_DATA, split="train"), k=(3,), temperature=0.1)},
    )
    distill = make_distill(Init("mae", rename={"a": "b"}, skip=("x", "y"), fresh=("z",), regroup_heads=True))
    tuned = make_stage(
        init=Init(path="/somewhere", resize_posembed=True),
        optim=Optim(1e-3, lr_batch=None, clip_norm=1.0, ema=0.9, freeze=("q",)),
        run=Run(4, steps=7),
        evals={
            "val": Classification(EVAL_DATA, batch_size=3),
            "logistic": Logistic(EVAL_DATA, dataclasses.replace(EVAL_DATA, split="train"), c=0.1),
            "corruptions": Corruptions(EVAL_DATA, severities=(1, 3)),
        },
        task=Classify(teacher=LabelTeacher(Init("mae"), labels="soft", weight=0.3, temperature=2.0)),
    )
    stages = {"mae": mae, "distill": distill, "tuned": tuned}
    return Config("all", stages, Mesh(2, 4), {"T": Compare("val/top1", {"row": ("tuned",)})})


def dataclasses_of_config():
    return [v for v in vars(config).values() if dataclasses.is_dataclass(v) and v.__module__ == config.__name__]


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
    assert back.stages["distill"].task.teacher.init.skip == ("x", "y")  # a tuple again
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
    assert seen == set(dataclasses_of_config())


def test_every_field_survives_when_changed():
    """No field is lost or mixed up: each is changed alone and comes back."""
    cases = [
        (ViT, to_dict(ViT(8, 2, 2))),
        (Data, to_dict(Data("digits"))),
        (Optim, to_dict(Optim(1.0))),
        (Run, to_dict(Run(1))),
        (Init, to_dict(Init("a"))),
        (Mae, to_dict(Mae())),
        (Distill, to_dict(Distill(Teacher(Init("a"), 1)))),
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
                new = type(value)(value + 1)
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
    assert from_dict(Data, {"source": "digits", "crop_scale": [0, 1]}).crop_scale == (0.0, 1.0)
    assert type(from_dict(Data, {"source": "digits", "crop_scale": [0, 1]}).crop_scale[0]) is float


# Errors of from_dict


ERRORS = [
    ("stages.mae.optim.typo", 1, ["config.stages.mae.optim.typo: no such field", "Optim has lr, lr_batch,"]),
    ("nmae", "x", ["config.nmae: no such field", "Config has name, stages, mesh, compare"]),
    ("stages.mae.model.pool", "max", ["config.stages.mae.model.pool: unknown choice 'max'", "'cls', 'mean'"]),
    (
        "stages.distill.task.relations",
        ["qk", "kv"],
        ["config.stages.distill.task.relations[1]: unknown choice 'kv'", "'qk', 'vv', 'qq', 'kk'"],
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
        "stages.distill.task.teacher.init.rename.a",
        1,
        ["config.stages.distill.task.teacher.init.rename.a: expected str, got 1"],
    ),
    ("compare.T.rows.row", "mae", ["config.compare.T.rows.row: expected a tuple", "'mae'"]),
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


# check


# What else would end in a traceback, or in an error only after the training


# sources and differences


def test_sources_are_the_initial_weights_then_the_teacher():
    own, teacher = Init(path="own"), Init(path="teacher")
    assert list(sources(make_stage())) == []
    assert list(sources(make_stage(init=own))) == [own]
    assert list(sources(make_distill(teacher))) == [teacher]
    both = make_distill(teacher)
    both.init = own
    assert [s.path for s in sources(both)] == ["own", "teacher"]


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
    assert set(codec.RUNTIME_FIELDS) == {
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
    names = {f.name for kind in dataclasses_of_config() for f in dataclasses.fields(kind)}
    assert set(codec.RUNTIME_FIELDS) <= names


# Style rule 15: nothing unused survives


def attributes_read():
    """Every attribute name that the package reads outside config.py."""
    root = Path(tinymim_jax.__file__).parent
    names = set()
    for file in root.rglob("*.py"):
        if file != root / "config.py":
            nodes = ast.walk(ast.parse(file.read_text()))
            names |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    return names


# Fields that are read by a name in a string: optim.rules looks up "decay" and "no_decay".
READ_BY_NAME = {("Optim", "decay"), ("Optim", "no_decay")}


def test_every_field_is_read():
    read = attributes_read()
    for kind in dataclasses_of_config():
        if kind is ViT:  # expanded whole into VisionTransformer
            continue
        for field in dataclasses.fields(kind):
            assert field.name in read or (kind.__name__, field.name) in READ_BY_NAME, f"{kind.__name__}.{field.name}"


def test_the_fields_of_a_vit_are_those_of_the_module():
    ours = {f.name: f.default for f in dataclasses.fields(ViT)}
    theirs = {f.name: f.default for f in dataclasses.fields(VisionTransformer) if f.name not in ("parent", "name")}
    assert ours == theirs


def test_the_fields_of_a_vit_are_read():
    assert {f.name for f in dataclasses.fields(ViT)} <= attributes_read()
