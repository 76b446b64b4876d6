"""What stops a stage before it starts; tests/test_chain.py and tests/commands/test_run.py try it through `run`."""

import dataclasses
import re

import numpy as np
import pytest
from etils.epath import Path as EPath
from PIL import Image

from tinymim_jax.evals.contract import Context
from tinymim_jax.experiment import stage_file
from tinymim_jax.experiment.config import Knn
from tinymim_jax.planning import preflight
from tinymim_jax.runtime import metric_log
from tinymim_jax.runtime.errors import InputError


def write_tree(root, classes):
    for split, names in classes.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(root / split / name / f"{i}.png")
    return str(root)


def from_folder(data, path, split=None):
    return dataclasses.replace(data, source="folder", path=path, split=split or data.split)


def test_everything_that_a_stage_reads(chain):
    stage = chain.stages["mae"]
    assert stage.data_sets() == [stage.data, stage.evals["knn"].data, stage.evals["knn"].bank]


def test_classes_are_compared_where_labels_are(chain, tmp_path):
    """Training on one tree, tested on a split of the same name of another."""
    stage = chain.stages["finetune"]
    stage.model.num_classes = 2
    stage.data = from_folder(stage.data, write_tree(tmp_path / "a", {"test": "ab"}), "test")
    stage.evals["val"].data = from_folder(stage.evals["val"].data, write_tree(tmp_path / "b", {"test": "ac"}))
    with pytest.raises(InputError, match=r"a/test and .*b/test differ in their classes \(b\)"):
        preflight.check_classes(stage)


def test_pre_training_needs_no_labels(chain, tmp_path):
    stage = chain.stages["mae"]
    stage.data = from_folder(stage.data, write_tree(tmp_path, {"train": "x"}))
    preflight.check_classes(stage)  # its kNN compares digits with digits


@pytest.mark.parametrize("is_converted", [False, True])
def test_pixels_that_the_source_saw_otherwise(chain, tmp_path, is_converted):
    pytest.importorskip("safetensors")
    from tests.bridge import arrays
    from tinymim_jax.bridge import convert, files
    from tinymim_jax.experiment.config import Init
    from tinymim_jax.runtime import metric_log

    weights = arrays.weights(24, 3)
    folder = tmp_path / "timm"
    folder.mkdir()
    files.save_safetensors(weights, folder / "model.safetensors")
    settings = {"architecture": "vit", "model_args": {"num_heads": 3}}
    settings["pretrained_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3}
    metric_log.write_json(folder / "config.json", settings)
    init = Init(path=str(folder))
    if is_converted:
        convert.write(lambda: convert.read(folder), preflight.handoff.source_folder(init, tmp_path))
    stage = chain.stages["distill"]
    with pytest.raises(InputError, match=r"normalised with mean \(0\.5, 0\.5, 0\.5\); set data\.mean to that"):
        preflight.check_source(chain, stage, "teacher", init, tmp_path)
    stage.data.mean = stage.data.std = (0.5, 0.5, 0.5)
    assert not any("normalised" in line for line in preflight.check_source(chain, stage, "teacher", init, tmp_path))


def test_differences_from_a_stage_are_said(chain, tmp_path):
    """As the config has it before it has run; what the run says is of tests/training."""
    init, stage = chain.stages["distill"].task.teacher, chain.stages["distill"]
    before = preflight.check_source(chain, stage, "teacher", init, tmp_path)
    assert not any("normalised" in line or "px" in line for line in before)
    chain.stages["mae"].data.mean = (0.5, 0.25, 0.5)
    chain.stages["mae"].model = dataclasses.replace(chain.stages["mae"].model, image_size=32)
    (line,) = preflight.check_source(chain, stage, "teacher", init, tmp_path)
    assert line.startswith("note: teacher was trained with ")
    assert "pixels normalised with mean (0.5, 0.25, 0.5), here data.mean (0.485" in line
    assert "images of 32 px, here 16 px" in line
    chain.stages["mae"].model = dataclasses.replace(chain.stages["mae"].model, num_heads=3, layer_norm_eps=1e-5)
    (line,) = preflight.check_source(chain, stage, "init", init, tmp_path)
    assert "3 heads, here" in line and "LayerNorm eps 1e-05, here model.layer_norm_eps 1e-06" in line


def test_classes_in_another_order(chain, tmp_path):
    """A head that is taken over names outputs that the labels of the data would not mean."""
    from tests.weights.test_handoff import write_stage
    from tinymim_jax.experiment.config import Init

    stage = chain.stages["finetune"]
    write_stage(tmp_path / "other", stage, {"encoder": {}}, classes=list("1023456789"))
    init = Init(path=str(tmp_path / "other"))
    with pytest.raises(InputError, match="init has the data's classes in another order: its first is '1', the data's"):
        preflight.check_source(chain, stage, "init", init, tmp_path)
    head = ("encoder/head/.*",)
    preflight.check_source(chain, stage, "init", dataclasses.replace(init, fresh=head, skip=head), tmp_path)
    write_stage(tmp_path / "same", stage, {"encoder": {}}, classes=list("0123456789"))
    preflight.check_source(chain, stage, "init", Init(path=str(tmp_path / "same")), tmp_path)


def unlabelled(root, n=16):
    for split in ("train", "val"):
        (root / split).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.fromarray(np.full((20, 20, 3), i, np.uint8)).save(root / split / f"{i}.png")
    return str(root)


def test_labels_are_needed_where_they_are_learnt(chain, tmp_path, mesh):
    path = unlabelled(tmp_path)
    mae, tuned = chain.stages["mae"], chain.stages["finetune"]
    mae.data, mae.evals = from_folder(mae.data, path, "train"), {}
    mae.data.per_class = None
    preflight.check_classes(mae)
    tuned.data, tuned.evals = from_folder(tuned.data, path, "train"), {}
    tuned.data.per_class = None
    with pytest.raises(InputError, match="have no classes; sort them"):
        preflight.check_classes(tuned)
    knn = Knn(from_folder(mae.data, path, "val"), mae.data)
    with pytest.raises(InputError, match="have no classes; sort them"):
        knn.build(Context(mesh, preflight._no_model, mae.model))


def test_a_begun_stage_goes_on_with_as_many_images(chain, tmp_path):
    stage = chain.stages["mae"]
    content = stage_file.describe(stage, [], images=39)
    for inside in ("checkpoints/3/model", "checkpoints/3/_CHECKPOINT_METADATA"):
        (tmp_path / "mae" / inside).mkdir(parents=True)
    metric_log.write_json(EPath(tmp_path / "mae" / "stage.json"), content)
    with pytest.raises(InputError, match=r"mae was begun with 39 images, not 40; give those"):
        preflight.check_data(stage, EPath(tmp_path / "mae"))
    metric_log.write_json(EPath(tmp_path / "mae" / "stage.json"), {**content, "images": 40})
    preflight.check_data(stage, EPath(tmp_path / "mae"))


def test_everything_that_is_lacking_is_said(chain, tmp_path, mesh):
    stage = chain.stages["distill"]
    stage.optim.accum_steps, stage.data = 3, from_folder(stage.data, "/gone")
    stage.evals = {"knn": dataclasses.replace(chain.stages["mae"].evals["knn"], k=(1000,))}
    found = list(preflight.lacking(chain, "distill", ["distill"], tmp_path, mesh))
    for words, line in zip(
        ("accum_steps|micro", "mae, which has no finished stage", "/gone", "k 1000"), found, strict=True
    ):
        assert re.search(words, line), (words, line)
    assert len(list(preflight.lacking(chain, "distill", ["mae", "distill"], tmp_path, mesh))) == 3
