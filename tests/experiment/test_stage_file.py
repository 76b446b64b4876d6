"""What `stage.json` says; format_1.json has those that version 0.1 wrote for tests/tiny_chain.py, and its shapes."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import tinymim_jax
from tests.tiny_chain import get_config
from tests.weights.test_handoff import SMALL, make_stage, write_stage
from tinymim_jax.experiment import stage_file
from tinymim_jax.planning import dry_run
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.training import start
from tinymim_jax.weights import checkpoint, handoff
from tinymim_jax.weights.parameters import flatten, unflatten


@pytest.fixture(scope="module")
def params():
    images = np.zeros((1, 8, 8, 3), np.float32)
    return {"encoder": jax.jit(SMALL.build().init)(jax.random.key(0), images)["params"]}


def test_read_stage(tmp_path, params):
    write_stage(tmp_path, make_stage(), params, untrained=["encoder/pos_embed"])
    assert stage_file.read_stage(tmp_path) == make_stage()
    assert stage_file.read_untrained(tmp_path) == ["encoder/pos_embed"]
    assert handoff.finished(tmp_path)


def test_read_stage_where_there_is_none(tmp_path):
    for read in (stage_file.read_stage, stage_file.read_untrained):
        with pytest.raises(InputError, match=r"is not the folder of a stage: it has no stage\.json"):
            read(tmp_path)
    with pytest.raises(InputError, match="nowhere does not exist"):
        stage_file.read_stage(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", '{"stage": {', "[]", "3", "null", "{}", '{"other": 1}', "\xff\xfe"])
def test_a_damaged_stage(tmp_path, text):
    (tmp_path / "stage.json").write_bytes(text.encode("latin1"))
    for read in (stage_file.read_stage, stage_file.read_untrained):
        with pytest.raises(
            InputError, match=r"stage\.json is damaged; bring back a copy of it: the weights beside it may be"
        ):
            read(tmp_path)


def test_a_stage_of_another_version(tmp_path):
    content = stage_file.describe(make_stage(), [])
    file = tmp_path / "stage.json"
    file.write_text(json.dumps({**content, "stage": {**content["stage"], "optim": {"lr": 1.0, "amsgrad": True}}}))
    with pytest.raises(InputError, match=r"stage\.json\.optim\.amsgrad: no such field; Optim has lr"):
        stage_file.read_stage(tmp_path)
    file.write_text(json.dumps({**content, "stage": None}))
    with pytest.raises(InputError, match=r"stage\.json: expected the fields of Stage"):
        stage_file.read_stage(tmp_path)
    file.write_text(json.dumps({**content, "format": 3}))
    with pytest.raises(InputError, match=r"written by a newer tinymim_jax \(format 3, this one reads 2\); update it"):
        stage_file.read_stage(tmp_path)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables, images):
    return model.apply(variables, images, capture=(1,))


def test_load(tmp_path, params):
    write_stage(tmp_path, make_stage(), params)
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    expected = apply(SMALL.build(), {"params": params["encoder"]}, images)
    for path in (tmp_path, str(tmp_path)):
        model, variables = tinymim_jax.load(path)
        assert set(variables) == {"params"}
        out = apply(model, variables, images)
        np.testing.assert_array_equal(out.tokens, expected.tokens)
        np.testing.assert_array_equal(out.trace[1].q, expected.trace[1].q)
        assert out.trace[1].q.shape == (2, 5, 2, 6) and out.logits is None


def test_load_where_there_is_nothing(tmp_path):
    with pytest.raises(InputError, match="is not the folder of a stage"):
        tinymim_jax.load(tmp_path)


# Stages that version 0.1 ran


MADE = json.loads(Path(__file__).with_name("format_1.json").read_text())


def arrays(name, seed=0):
    draw = np.random.default_rng(seed)
    return {key: draw.normal(size=shape).astype(np.float32) for key, shape in MADE[name]["params"].items()}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Finished stages; the last one kept an average."""
    folder = tmp_path_factory.mktemp("format_1")
    for name, made in MADE.items():
        average = unflatten(arrays(name, 1)) if name == "finetune" else None
        checkpoint.save_model(folder / name, unflatten(arrays(name)), ema=average)
        for file in ("stage.json", "DONE"):
            (folder / name / file).write_text(json.dumps(made[file]))
    return folder


def test_a_finished_chain_is_that_of_today_s_config(workdir):
    """Distillation had one target, written into the task, and MAE's decoder lay beside the encoder."""
    cfg = get_config()
    tuned = cfg.stages["finetune"]
    tuned.task.mix_group = None  # the recipe had one draw a batch, and a rule for a token that this model lacks
    tuned.optim.decay, tuned.optim.no_decay = (
        (".*/kernel",),
        (".*/bias", ".*/scale", ".*/(pos_embed|cls_token|dist_token)"),
    )
    for name in ("mae", "distill"):
        assert stage_file.read_stage(workdir / name) == cfg.stages[name]
    assert stage_file.read_untrained(workdir / "mae") == ["pretext/decoder/pos_embed", "encoder/pos_embed"]
    text = dry_run.describe_chain(cfg, workdir)
    assert text.count("status: finished, would be skipped") == 3
    cfg.stages["distill"].task.targets["relation"].teacher_block = 1
    with pytest.raises(InputError, match=r"another config \(task\.targets\.relation\.teacher_block: 2 -> 1\)"):
        dry_run.describe_chain(cfg, workdir)


def test_data_and_the_size_of_evaluations_may_change(tmp_path, params):
    stage = make_stage()
    write_stage(tmp_path, stage, params)
    moved = dataclasses.replace(stage, data=dataclasses.replace(stage.data, path="/elsewhere"))
    moved.evals = {}
    for name, cfg in stage.evals.items():
        moved.evals[name] = dataclasses.replace(cfg, batch_size=7, data=dataclasses.replace(cfg.data, path="/x"))
    assert stage_file.changes(tmp_path, moved) == []
    moved.data.split = "other"
    moved.run = dataclasses.replace(moved.run, batch_size=stage.run.batch_size + 1)
    assert [line.split(":")[0] for line in stage_file.changes(tmp_path, moved)] == ["data.split", "run.batch_size"]


def test_where_weights_come_from_is_what_a_stage_is(tmp_path, params):
    stage, other = (dataclasses.replace(make_stage(), init=handoff.Init(path=path)) for path in ("/a", "/b"))
    write_stage(tmp_path, stage, params)
    assert stage_file.changes(tmp_path, other) == ['init.path: "/a" -> "/b"']


def test_load_of_format_1(workdir):
    for name, seed in (("mae", 0), ("distill", 0), ("finetune", 1)):
        model, variables = tinymim_jax.load(workdir / name)
        expected = {key: value for key, value in arrays(name, seed).items() if key.startswith("encoder/")}
        found = flatten({"encoder": variables["params"]})
        assert set(found) == set(expected)
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value)
    out = model.apply(variables, np.zeros((1, 16, 16, 3), np.float32), capture=(2,))
    assert out.logits.shape == (1, 10) and out.trace[2].q.shape == (1, 5, 2, 6)


def test_a_teacher(workdir, mesh):
    """Its decoder, its third block and its norm are left out."""
    loaded = start.load(get_config().stages["distill"], "new", workdir, mesh)
    teacher = flatten(loaded.frozen["teacher"])
    assert len(teacher) == 28 and not [key for key in teacher if "block3" in key or "norm/" in key[:13]]
    for key, value in teacher.items():
        np.testing.assert_array_equal(value, arrays("mae")[key])


def test_initial_weights(workdir, mesh):
    """6 heads of the last block become 2 of the same channels; norm is left out, fc_norm and head are new."""
    stage = get_config().stages["finetune"]
    begun = start.begin(start.load(stage, "new", workdir, mesh), workdir)
    params, source = flatten(jax.device_get(begun.state.params)), arrays("distill")
    taken = [key for key in params if "/fc_norm/" not in key and "/head/" not in key]
    assert len(taken) == 28
    for key in taken:
        np.testing.assert_array_equal(params[key], source[key].reshape(params[key].shape))
    with_decoder = dataclasses.replace(stage, model=dataclasses.replace(stage.model, width=24, depth=3, num_heads=6))
    with_decoder.init.stage = "mae"
    target = flatten(
        jax.eval_shape(with_decoder.model.build().init, jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
    )
    target = {key.replace("params/", "encoder/", 1): leaf.shape for key, leaf in target.items()}
    report = handoff.match(target, handoff.read_shapes(workdir / "mae"), with_decoder.init)
    assert "skipped: encoder/norm, pretext" in report.lines()


def test_one_that_is_half_done_is_refused(workdir, tmp_path):
    shutil.copytree(workdir / "mae", tmp_path / "mae")
    (tmp_path / "mae" / "DONE").unlink()
    with pytest.raises(InputError) as error:
        dry_run.describe_chain(get_config(), tmp_path)
    assert str(error.value) == (
        f"stage mae: {tmp_path}/mae was begun by tinymim_jax 0.1, whose checkpoints this version does not go on from;"
        f" finish it with that, or delete {tmp_path}/mae to run the stage again"
    )
    (tmp_path / "mae" / "stage.json").write_text("{")
    with pytest.raises(InputError, match=r"mae/stage\.json is damaged; bring back a copy"):
        dry_run.describe_chain(get_config(), tmp_path)


def test_names_of_the_outputs(tmp_path):
    for name, classes in (("named", ("b", "a")), ("unnamed", None)):
        (tmp_path / name).mkdir()
        content = stage_file.describe(make_stage(), [], classes)
        (tmp_path / name / "stage.json").write_text(json.dumps(content))
    assert stage_file.read(Path(tmp_path / "named")).get("classes") == ["b", "a"]
    assert stage_file.read(Path(tmp_path / "unnamed")).get("classes") is None
    del content["classes"]  # as the versions before wrote it
    (tmp_path / "unnamed" / "stage.json").write_text(json.dumps(content))
    assert stage_file.read(Path(tmp_path / "unnamed")).get("classes") is None
