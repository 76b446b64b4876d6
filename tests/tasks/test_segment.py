"""The task that gives each pixel a class: its loss by definition, its state, and a run from start to end."""

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

import tinymim_jax
from tests.conftest import tiny_mae, tiny_segment
from tinymim_jax.__main__ import main
from tinymim_jax.bridge import convert
from tinymim_jax.experiment import segmentation, stage_file
from tinymim_jax.experiment.config import Config, Init, Linear, Masks
from tinymim_jax.experiment.segmentation import upernet
from tinymim_jax.experiment.validate import check
from tinymim_jax.report import pictures
from tinymim_jax.runtime import keys
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.preemption import Interrupted
from tinymim_jax.tasks.contract import STREAMS, Context
from tinymim_jax.training.loop import run_stage
from tinymim_jax.training.setup import make_setup
from tinymim_jax.training.step import create_state, host_keys, make_train_step
from tinymim_jax.weights import checkpoint, handoff
from tinymim_jax.weights.parameters import flatten, shapes_of

RNGS = {name: jax.random.key(i) for i, name in enumerate(STREAMS)}


def a_batch(rows=4):
    rng = np.random.default_rng(0)
    mask = rng.choice([*range(11), 255], (rows, 32, 32)).astype(np.uint8)
    mask[0, 16:] = 255
    return {
        "image": rng.integers(0, 256, (rows, 32, 32, 3), np.uint8),
        "mask": mask,
        "extent": np.tile(np.int32([32, 24]), (rows, 1)),
        "is_valid": np.arange(rows) != 1,
        "index": np.arange(rows, dtype=np.int32),
        "stop": np.zeros(rows, np.uint8),
    }


def task_of(**changes):
    stage = tiny_segment()
    stage.task = dataclasses.replace(stage.task, **changes)
    return stage.task.build(Context(stage.model, stage.data))


@pytest.fixture(scope="module")
def compiled():
    """A task, its variables, and a batch whose second row could not be read."""
    task, batch = task_of(), a_batch()
    variables, _ = jax.jit(task.init)(jax.random.key(0), batch)
    return task, variables, batch


@pytest.mark.parametrize("average", ["all", "counted"])
def test_the_loss_is_a_mean_over_pixels_of_readable_images(average, compiled):
    task, variables, batch = copy.copy(compiled[0]), *compiled[1:]
    task.task = dataclasses.replace(task.task, average=average)
    params, state = variables["params"], {"batch_stats": variables["batch_stats"]}
    loss, aux = task.loss(params, state, {}, batch, RNGS, train=False)
    seen, terms = batch["is_valid"], {}
    maps = task._maps(task.model.apply({"params": params["encoder"]}, task.images(batch), capture=(1, 2, 3, 4)))
    heads = task.decode.apply({"params": params["pretext"], **state}, maps, False)
    for name, logits in heads.items():
        fine = functional.interpolate(torch.tensor(np.asarray(logits)).permute(0, 3, 1, 2), (32, 32), mode="bilinear")
        target = torch.tensor(batch["mask"].astype(int))
        each = functional.cross_entropy(fine, target, ignore_index=255, reduction="none")[seen]
        terms[name] = float(each.sum() / (each.numel() if average == "all" else (target[seen] != 255).sum()))
    assert float(loss) == pytest.approx(terms["head"] + 0.4 * terms["aux"], rel=1e-5)
    assert float(aux.metrics["loss_aux"].value()) == pytest.approx(terms["aux"], rel=1e-5)


def test_what_lies_outside_an_image_is_seen_as_zero(compiled):
    task, _, batch = compiled
    images = np.asarray(task.images(batch))
    assert not images[:, :, 24:].any() and images[:, :, :24].any()


def test_all_parameters_get_a_gradient_and_statistics_follow(compiled):
    task, variables, batch = compiled
    params, state = variables["params"], {"batch_stats": variables["batch_stats"]}
    loss = lambda p: task.loss(p, state, {}, batch, RNGS, train=True)  # noqa: E731
    grads, aux = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert all(np.asarray(grad).any() for grad in flatten(grads).values())
    assert [name for name in flatten(params) if task.is_untrained(name)] == ["encoder/pos_embed"]
    moved = jax.tree.map(lambda old, new: bool(np.any(old != new)), state, aux.model_state)
    assert all(flatten(moved)[name] for name in flatten(moved) if not name.endswith("count"))


def test_no_parameter_of_the_published_models_is_left_out():
    for size in ("t_star", "tiny"):
        stage = upernet(size, None, "x")
        setup = make_setup(stage, size, {}, 100)
        assert setup.untrained() == []
        rates = flatten(setup.labels)
        assert rates["encoder/pos_embed"] == rates["encoder/block1/attn/relative_position/kernel"] == "decay"


def test_the_neck_of_a_fine_tuned_tinymim_star_becomes_the_layer_of_its_pyramid():
    stage = upernet("t_star", segmentation.weights(Init(path="x")), "x")
    tuned = dataclasses.replace(stage.model, image_size=224, num_classes=1000, neck=1280, relative_position=False)
    source = shapes_of(convert.shapes(dataclasses.replace(tuned, layer_scale=0.0), None))
    target = shapes_of(make_setup(stage, "stage", {}, 100).params)
    moves = handoff.match(target, source, stage.init).moves
    taken = {"fc/kernel": "neck/kernel", "fc/bias": "neck/bias", "fc_norm/scale": "neck_norm/scale",
             "fc_norm/bias": "neck_norm/bias"}  # fmt: skip
    assert {key: old for key, old in moves.items() if key.startswith("pretext/")} == {
        f"pretext/pyramid/{new}": f"encoder/{old}" for new, old in taken.items()
    }


@pytest.mark.slow
def test_micro_batches_leave_the_statistics_of_one_batch():
    """Of the first norm, whose inputs do not depend on another: as of torch's BatchNorm on all of them."""
    states = []
    for parts in (1, 2):
        stage = tiny_segment()
        stage.model.drop_path, stage.optim.accum_steps, stage.optim.warmup_epochs = 0.0, parts, 0
        stage.data.masks.photometric = False
        setup = make_setup(stage, "stage", {}, 40)
        state = create_state(setup, host_keys(setup, keys.INIT))
        states.append(jax.jit(make_train_step(setup))(state, {}, a_batch(8), jax.random.key(1))[0])
    found = [flatten(state.model_state["batch_stats"]) for state in states]
    for name in ("pyramid/level1_norm/mean", "pyramid/level1_norm/var"):
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=1e-5, atol=1e-7)


def test_bad_input():
    for changes, message in (
        ({"taps": (1, 2, 3, 5)}, "pyramid is made of 4 blocks in order, of 1 to 4"),
        ({"taps": (1, 2)}, "pyramid is made of 4 blocks"),
    ):
        stage = tiny_segment()
        with pytest.raises(InputError, match=message):
            dataclasses.replace(stage.task, **changes).check("task", stage.model)
    stage = tiny_segment()
    stage.evals["val"].data.masks = dataclasses.replace(stage.data.masks, num_classes=12)
    with pytest.raises(InputError, match="data.masks.num_classes differs from that of the stage's data"):
        check(Config("x", {"s": stage}))
    stage = dataclasses.replace(tiny_mae(), evals={"val": tiny_segment().evals["val"]}, model=tiny_segment().model)
    stage.model.pool, stage.data = "cls", tiny_segment().data
    with pytest.raises(InputError, match="needs a task that gives each pixel a class"):
        check(Config("x", {"s": stage}))
    stage = tiny_segment()
    for masks, message in ((None, "set data.masks"), (Masks(5), "num_classes is 5 and task.num_classes 11")):
        with pytest.raises(InputError, match=message):
            stage.task.build(Context(stage.model, dataclasses.replace(stage.data, masks=masks)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, mesh):
    workdir = tmp_path_factory.mktemp("segmentation")
    results = run_stage(tiny_segment(), "segment", workdir, mesh)
    return workdir / "segment", results


@pytest.mark.slow
def test_a_run_is_measured_again_the_same_and_paints(finished, tmp_path, capsys):
    folder, results = finished
    assert {"val/mIoU", "val/mAcc", "val/aAcc", "val/images"} <= set(results) and results["val/images"] == 100
    assert main(["eval", str(folder), f"--out={tmp_path / 'e'}"]) == 0  # of a model that segments, that alone
    report = json.loads((tmp_path / "e" / "eval.json").read_text())["results"]
    assert report["segmentation/mIoU"] == pytest.approx(results["val/mIoU"])
    assert (tmp_path / "e" / "segmentation_classes.png").is_file()
    panels = pictures.panels_of(tiny_segment(), "segment", folder.parent)
    assert panels.column_labels == ["image", "truth", "prediction", "dark: wrong"] and len(panels.rows) == 6
    assert {np.shape(image) for row in panels.rows for image in row} == {(32, 32, 3)}
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (2, 60, 90, 3), np.uint8)
    for name, pixels in zip(("a.png", "sub/b.png"), images, strict=True):
        Image.fromarray(pixels[: 40 + 20 * (name == "a.png")]).save(tmp_path / "photos" / name)
    assert main(["predict", str(folder), str(tmp_path / "photos"), f"--out={tmp_path / 'p'}"]) == 0
    assert f"wrote {tmp_path / 'p'}: 2 images" in capsys.readouterr().out
    with Image.open(tmp_path / "p" / "sub" / "b.png") as mask:
        assert (mask.mode, mask.size) == ("P", (90, 40)) and np.asarray(mask).max() < 11
        model = tinymim_jax.load(folder)
        assert model.classes == ["background", *map(str, range(10))]
        found = model.masks([images[0], tmp_path / "photos" / "sub" / "b.png"])
        assert found[0].shape == (60, 90)
        np.testing.assert_array_equal(found[1], mask)
    assert (tmp_path / "p" / "sub" / "b_over.jpg").is_file()
    shutil.copytree(tmp_path / "photos", tmp_path / "more")
    shutil.copy(tmp_path / "more" / "a.png", tmp_path / "more" / "a.jpg")
    bare = tmp_path / "bare"  # whose checkpoint nobody reads before --out is looked at
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("checkpoints"))
    for checkpoint_folder, out, message in (
        (bare, "x.csv", "name a folder"),
        (bare, tmp_path / "more", "lies in the folder of the images"),
        (bare, tmp_path / "more" / "a.png", "is a file; name a folder"),
        (folder, tmp_path / "q", "two images are called a; rename one"),
    ):
        assert main(["predict", str(checkpoint_folder), str(tmp_path / "more"), f"--out={out}"]) == 2
        assert message in capsys.readouterr().err
    subject = stage_file.read_subject(folder)
    assert subject.pixels is not None and not subject.model.num_classes


@pytest.mark.slow
def test_a_model_without_a_head_for_pixels_is_refused(finished, tmp_path, mesh, capsys):
    run_stage(dataclasses.replace(tiny_mae(), evals={}), "mae", tmp_path, mesh)
    assert main(["eval", str(tmp_path / "mae"), "--suite=segmentation"]) == 2
    assert "needs a model with a head for pixels" in capsys.readouterr().err
    with pytest.raises(InputError, match="the model has no head for pixels"):
        tinymim_jax.load(tmp_path / "mae").masks(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.slow
def test_it_starts_from_another_stage_and_resumes_bit_by_bit(tmp_path, mesh, stop_at):
    first = dataclasses.replace(tiny_mae(), evals={})
    first.model, first.data = dataclasses.replace(tiny_segment().model, pool="cls"), tiny_segment().data
    first.data, first.optim.warmup_epochs = dataclasses.replace(first.data, masks=None), 0
    for workdir in (tmp_path / "whole", tmp_path / "cut"):
        run_stage(first, "mae", workdir, mesh)
    stage = tiny_segment("mae")
    run_stage(stage, "segment", tmp_path / "whole", mesh)
    stop_at(2)
    with pytest.raises(Interrupted):
        run_stage(stage, "segment", tmp_path / "cut", mesh)
    run_stage(stage, "segment", tmp_path / "cut", mesh)
    models = [checkpoint.read_model(tmp_path / name / "segment") for name in ("whole", "cut")]
    jax.tree.map(np.testing.assert_array_equal, *models)


@pytest.mark.slow
def test_a_linear_head_reads_the_last_block():
    task = task_of(head=Linear(), aux=None)
    batch = a_batch()
    variables, _ = jax.jit(task.init)(jax.random.key(0), batch)
    assert set(flatten(variables["params"]["pretext"])) == {"head/classifier/kernel", "head/classifier/bias"}
    assert task.predict(variables, {}, batch).pixels.shape == (4, 4, 4, 11)


DEVICES = """
import json, jax, numpy as np
from tests.conftest import tiny_segment
from tests.tasks.test_segment import a_batch
from tinymim_jax.runtime import keys, sharding
from tinymim_jax.runtime.sharding import make_mesh
from tinymim_jax.training.setup import make_setup
from tinymim_jax.training.step import create_state, host_keys, make_train_step
stage = tiny_segment()
setup = make_setup(stage, "stage", {}, 40)
out = []
for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(2, 1, devices=jax.devices()[:2]), make_mesh(2, 2)):
    state = create_state(setup, host_keys(setup, keys.INIT))
    state = sharding.put_tree(state, sharding.state_sharding(mesh, state))
    batch = sharding.put_batch(a_batch(8), mesh, axis=0)
    state, metrics = jax.jit(make_train_step(setup))(state, {}, batch, jax.random.key(1))
    stats = [float(np.abs(np.asarray(x)).sum()) for x in jax.tree.leaves(state.model_state)]
    out.append([float(metrics["loss"].value()), float(metrics["grad_norm"].value()), *stats])
print("RESULT" + json.dumps(out))
"""


@pytest.mark.slow
def test_on_one_two_and_four_devices_statistics_are_of_the_whole_batch():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True, env=env, timeout=400)
    assert done.returncode == 0, done.stderr
    one, two, four = json.loads(done.stdout.split("RESULT")[1])
    assert two == pytest.approx(one, rel=1e-5) and four == pytest.approx(one, rel=1e-5)
