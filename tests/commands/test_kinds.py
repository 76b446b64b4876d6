"""Stages of the kinds that the demo has not, from `run` to what is made of them: D-MAE, MoCo, relative positions."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

import tinymim_jax
from tests.conftest import tiny_classify, tiny_mae
from tinymim_jax.bridge import card, export
from tinymim_jax.commands.run import run_chain
from tinymim_jax.experiment.config import (
    AttentionLogits,
    Compare,
    Config,
    Decoder,
    Distill,
    Feature,
    Init,
    Moco,
    Reconstruction,
)
from tinymim_jax.experiment.validate import check
from tinymim_jax.report import page, tables
from tinymim_jax.runtime.errors import InputError

DECODER = Decoder(16, 1, 2)

pytestmark = pytest.mark.slow


def short(stage):
    stage.evals = {}
    stage.run.steps = 2
    return stage


def distilled(targets):
    stage = short(tiny_mae())
    stage.task = Distill(Init("mae"), targets, color_jitter=0.0, mask_ratio=0.5)
    return stage


def chain():
    """D2-MAE with MAE-Lite's hidden states, and what else comes of MAE-Lite's study."""
    mae = short(tiny_mae())
    d2_mae = distilled({"pixels": Reconstruction(2, DECODER), "logits": AttentionLogits(3, 3)})
    hidden = distilled({"hidden": Feature(2, 2, ("norm1",), "mse", norm=False, bias=False)})
    moco = short(tiny_mae())
    moco.task = Moco(dim=8, hidden=16)
    again = dataclasses.replace(moco, init=Init("moco"))
    tuned = short(tiny_classify())
    evals = tiny_classify().evals
    model = dataclasses.replace(tuned.model, width=24, num_heads=6, depth=2, relative_position=True)
    fresh = ("encoder/(fc_norm|head|.*/relative_position)/.*",)
    tuned = dataclasses.replace(tuned, model=model, evals=evals, init=Init("d2_mae", keep_blocks=2, fresh=fresh))
    stages = {"mae": mae, "d2_mae": d2_mae, "hidden": hidden, "moco": moco, "again": again, "tuned": tuned}
    rows = dict.fromkeys("abc", ("tuned",))
    return check(Config("kinds", stages, compare={"T": Compare("val/top1", rows, {"a": 1.0, "b": 2.0, "c": 3.0})}))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, results)."""
    workdir = tmp_path_factory.mktemp("kinds")
    return workdir, run_chain(chain(), workdir)


def test_pictures_and_tables_are_made(run):
    workdir, results = run
    page.write(workdir)
    names = {path.name for path in (workdir / "report").iterdir()}
    names_of_pictures = {"d2_mae_distill.png", "hidden_distill.png", "moco_moco.png", "compare_t.png", "compare_t.svg"}
    assert names_of_pictures | {"tables.md", "index.html"} <= names
    results["compare"]["T"] = {**results["compare"]["T"], "rank_correlation": 0.5}  # as an earlier version wrote it
    results["compare"]["T"].pop("clear", None)
    assert "of single runs nothing tells" in tables.markdown(results)


def test_what_is_said_of_them(run):
    workdir, _ = run
    said = {name: "\n".join(card.lines(workdir / name)) for name in ("d2_mae", "hidden", "moco", "tuned")}
    assert "block 3: only its norm1 and q, k, v were trained; its projection and MLP were not" in said["d2_mae"]
    assert "block 2: only its norm1 was trained; its attention and MLP (and the final norm)" in said["hidden"]
    assert "MoCo v3 pre-training" in said["moco"] and "relative positions" in said["tuned"]
    with pytest.raises(InputError, match="--format=timm cannot hold this encoder of kind 'vit' .*relative positions"):
        export.export(workdir / "tuned", workdir / "out", "timm")


def test_features_are_of_the_token_that_was_trained(run):
    workdir, _ = run
    folder = workdir / "images"
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    model = tinymim_jax.load(workdir / "moco")
    own, on_cls, on_mean = (model.features(folder, **how)[1] for how in ({}, {"pool": "cls"}, {"pool": "mean"}))
    np.testing.assert_array_equal(own, on_cls)
    assert not np.allclose(own, on_mean)


def test_a_student_without_the_norm_that_is_read(run):
    workdir, _ = run
    cfg = chain()
    cfg.stages["hidden"].task.targets["hidden"].tensors = ("normed",)
    cfg.stages["hidden"].model.pool = "mean"
    from tinymim_jax.planning import dry_run

    with pytest.raises(InputError, match="stage hidden: task.targets, the student: model.pool 'mean' has no norm"):
        dry_run.describe_chain(cfg, workdir / "other")
