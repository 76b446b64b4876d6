"""Every file in configs/ loads and fits together; one chain of each kind of stage runs, shrunk to a few pixels, and resumes.

That all files do is the slow tests' part.
"""

import ast
import dataclasses
import functools
import importlib.util
import math
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinymim_jax.data.sources import open_source
from tinymim_jax.experiment import recipes, study
from tinymim_jax.experiment.config import Classification, Config, Data, Decoder, Distill, Hiera, Knn, Mae, Segment
from tinymim_jax.experiment.validate import check
from tinymim_jax.planning import dry_run
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.preemption import Interrupted
from tinymim_jax.runtime.sharding import make_mesh
from tinymim_jax.training.loop import run_stage

ROOT = Path(__file__).parent.parent / "configs"
FILES = sorted(str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py"))
CHAINS = [
    "own.py",
    "own.py:size=s,short,image_size=32",
    "cifar10/chain.py",
    "cifar10/chain.py:short",
    "cifar10/hiera.py",
    "cifar10/hiera.py:short",
    "cifar10/study.py",
    "cifar10/study.py:table=5,short",
    "cifar10/study.py:table=6,short",
    "cifar10/study.py:table=11,short",
    "cifar10/study.py:table=12,short",
    "cifar10/study.py:table=13,row=relation_drop_0.1_0.1,short",
    "ade20k/semantic_fpn.py",
    "ade20k/upernet.py",
    "ade20k/upernet.py:size=t_star",
    "camvid/segment.py",
    "digits/chain.py",
    "digits/scenes.py",
    "digits/targets.py",
    "imagenet/chain.py",
    "imagenet/chain.py:code",
    "imagenet/hiera.py",
    "imagenet/mae_lite.py",
    "imagenet/study.py:table=8",
    "imagenet/study.py:table=10",
    "imagenet/study.py",
]
# Those whose stages others of them have as well, or differ in little, are not run.
TO_RUN = [name for name in CHAINS if name not in (
    "cifar10/study.py", "cifar10/study.py:table=5,short", "cifar10/study.py:table=6,short", "imagenet/study.py:table=8",
    "imagenet/study.py:table=10", "ade20k/upernet.py:size=t_star", "cifar10/chain.py", "imagenet/chain.py:code",
    "own.py:size=s,short,image_size=32", "cifar10/study.py:table=11,short", "cifar10/hiera.py",
    "imagenet/hiera.py",
)]  # fmt: skip
OPTIONS = [
    "imagenet/hiera.py:row=finetune,size=small",
    "imagenet/tables.py:row=deit_t",
    "imagenet/tables.py:row=tinymim_star_t,teacher=x/finetune_b",
    "imagenet/transfer.py:sgd",
]
SINGLE = [*(f for f in FILES if f not in CHAINS), *OPTIONS]
WIDTH = 48  # every head count in use divides it


@functools.cache
def own_images():
    """A tree of three classes, not split, for configs/own.py, which counts its images."""
    root = Path(tempfile.mkdtemp())
    for i in range(60):
        (root / f"class {i % 3}").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20 + i), (i, 2 * i, 3 * i)).save(root / f"class {i % 3}" / f"{i}.png")
    return root


def config_file(path):
    spec = importlib.util.spec_from_file_location("config_file", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(name):
    path, _, arg = name.partition(":")
    if path == "own.py" and "data=" not in arg:
        arg = ",".join([f"data={own_images()}", *filter(None, [arg])])
    return check(config_file(path).get_config(arg))


def shrink_block(block, depth, shallow):
    return math.ceil(block * shallow(depth) / depth)


def shrink_data(data):
    split = "test" if data.transform == "eval" else "train"
    kept = {
        name: getattr(data, name) for name in ("transform", "rand_augment", "crop_scale", "resident", "subset_seed")
    }
    if data.masks:
        kept["masks"] = dataclasses.replace(
            data.masks, num_classes=11, zero_is_ignored=False, ignored=(), scale=(32, 24)
        )
    source = {"source": "scenes"} if data.masks else {"source": "digits", "per_class": 2}
    return Data(split=split, image_size=16, **source, **kept)


def shrink(stage, teacher_depth, blocks=2):
    """The same stage on 16 px digits in four patches, 48 wide, two steps of 8, at least so many blocks deep."""

    def shallow(depth):
        return max(blocks, depth // 6)

    depth, is_hiera = stage.model.depth, isinstance(stage.model, Hiera)
    if is_hiera:  # four units
        stage.model = dataclasses.replace(stage.model, width=8, stages=(1, 1, 2, 1), image_size=16, stride=1)
    else:
        stage.model = dataclasses.replace(stage.model, width=WIDTH, depth=shallow(depth), image_size=16, patch_size=8)
    if stage.model.num_classes:
        stage.model.num_classes = 10
    if isinstance(stage.task, Mae):
        stage.task.decoder = Decoder(16, 1, 4, posembed=stage.task.decoder.posembed)
    if isinstance(stage.task, Segment):
        taps = {"taps": (1, 2, 3, 4), "num_classes": 11, "head": dataclasses.replace(stage.task.head, width=8)}
        stage.task = dataclasses.replace(stage.task, **taps)
    if isinstance(stage.task, Distill):
        for target in stage.task.targets.values():
            last = stage.model.depth
            target.student_block = last if is_hiera else shrink_block(target.student_block, depth, shallow)
            if target.captures()[0].blocks:
                target.teacher_block = last if is_hiera else shrink_block(target.teacher_block, teacher_depth, shallow)
    stage.data = shrink_data(stage.data)
    steps, replicas = 0 if stage.run.epochs == 0 else 2, min(stage.run.replicas, 2)
    short = {"epochs": None, "steps": steps, "steps_per_call": 1, "eval_every": 0, "replicas": replicas}
    stage.run = dataclasses.replace(stage.run, batch_size=8, **short)
    stage.optim.warmup_epochs, stage.optim.warmup_steps = 0.02, 0
    for cfg in stage.evals.values():
        for name, data in cfg.sets().items():
            setattr(cfg, name, shrink_data(data))
        cfg.batch_size = 16
        if isinstance(cfg, Knn):
            cfg.k = (3,)
    return stage


def shrink_chain(cfg):
    """All stages but repetitions with another seed. What lies in another chain's folder is named as its stage."""
    depths = {name: stage.model.depth for name, stage in cfg.stages.items()}
    stages, blocks = {}, 4 if any(isinstance(stage.task, Segment) for stage in cfg.stages.values()) else 2
    for name, stage in cfg.stages.items():
        if re.search(r"_[1-9]$", name):
            continue
        for _, init in stage.inits():
            if init.path is not None:
                init.stage, init.path = Path(init.path).name, None
                depths[init.stage] = 24 if init.stage == "mae_l" else 12
        is_distilled = isinstance(stage.task, Distill)
        stages[name] = shrink(stage, depths[stage.task.teacher.stage] if is_distilled else 0, blocks)
    return Config(cfg.name, stages)


def run_interrupted(cfg, workdir, stop_at):
    mesh = make_mesh(cfg.mesh.data, cfg.mesh.fsdp)
    for name, stage in cfg.stages.items():
        if stage.run.steps:
            stop_at(1)
            with pytest.raises(Interrupted):
                run_stage(stage, name, workdir, mesh)
        results = run_stage(stage, name, workdir, mesh)
        assert all(math.isfinite(value) for value in results.values())
        assert any("/" in key for key in results) == bool(stage.evals)


@pytest.fixture(scope="module")
def imagenet():
    """The stages of the ImageNet chain, shrunk."""
    return shrink_chain(load("imagenet/chain.py")).stages


def behind(imagenet, name):
    """The stages of a file, and before them those of ImageNet's chain that it starts from."""
    cfg = shrink_chain(load(name))
    return check(Config(cfg.name, {**imagenet, **cfg.stages})), list(cfg.stages)


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_stage_fits_what_it_starts_from(name, imagenet, tmp_path):
    cfg, names = behind(imagenet, name)
    for stage in names[:2]:
        assert f"{stage}: " in dry_run.describe_chain(cfg, tmp_path, stage)


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_fits_together(name, tmp_path):
    cfg = shrink_chain(load(name))
    assert dry_run.describe_chain(check(cfg), tmp_path).count("status: would start") == len(cfg.stages)


def test_a_stage_of_each_kind_runs_and_resumes(imagenet, tmp_path, stop_at):
    names = ("mae_l", "distill_b", "finetune_b")
    run_interrupted(Config("imagenet", {name: imagenet[name] for name in names}), tmp_path, stop_at)


@pytest.fixture(scope="module")
def trained(imagenet, tmp_path_factory, mesh):
    """Where the shrunk ImageNet chain was run, for the files that start from one of its stages."""
    workdir = tmp_path_factory.mktemp("imagenet")
    for name, stage in imagenet.items():
        run_stage(stage, name, workdir, mesh)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("name", TO_RUN)
def test_a_chain_runs_and_resumes(name, tmp_path, stop_at):
    run_interrupted(shrink_chain(load(name)), tmp_path, stop_at)


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE)
def test_a_single_stage_runs_and_resumes(name, trained, tmp_path, stop_at):
    cfg = shrink_chain(load(name))
    for _, init in (found for stage in cfg.stages.values() for found in stage.inits()):
        init.stage, init.path = None, str(trained / init.stage)
    assert "status: would start" in dry_run.describe_chain(check(cfg), tmp_path)
    run_interrupted(cfg, tmp_path, stop_at)


def test_the_single_stages_are_those_of_the_chain():
    chain = load("imagenet/chain.py")
    names = [f"imagenet/{n}.py" for n in ("mae_l", *(f"{a}_{b}" for a in ("tinymim", "finetune") for b in "bst"))]
    others = {*(f"imagenet/{n}.py" for n in ("tables", "transfer", "linear_probe")), *CHAINS}
    assert sorted(names) == [f for f in FILES if f.startswith("imagenet/") and f not in others]
    for name in names:
        for stage_name, stage in load(name).stages.items():
            for _, init in stage.inits():
                init.stage, init.path = Path(init.path).name, None
            assert stage == chain.stages[stage_name], name


@pytest.mark.parametrize("name", FILES)
def test_a_header_gives_command_cost_and_expectation(name):
    header = ast.get_docstring(ast.parse((ROOT / name).read_text()))
    assert f"python -m tinymim_jax run --config=configs/{name}" in header
    assert "Cost" in header and ("xpected" in header or "result" in header)


def test_the_plan_of_the_imagenet_chain(tmp_path):
    text = dry_run.describe_chain(load("imagenet/chain.py"), tmp_path)
    for line in (
        "distill_b: relation distillation, student block 12, 300 epochs x 312 steps = 93600 steps of 4096 images",
        "optimiser: adamw, lr 0.0024 (0.00015 x 4096 / 256), warm-up 15 epochs, min lr 1e-05",
        "teacher mae_l: qk+vv relations of block 18 of 24, 16 heads",
        "teacher distill_b: qk+vv relations of block 12 of 12, 12 heads",
        "regrouped 16 -> 12 heads: encoder/block12/attn/qkv",
        "regrouped 12 -> 3 heads: encoder/block12/attn/qkv",
        "85,798,656 parameters",
    ):
        assert line in text
    assert [line.split(":")[0] for line in text.splitlines() if not line.startswith((" ", "before"))] == [
        "devices", "mae_l", "distill_b", "distill_s", "distill_t", "finetune_b", "finetune_s", "finetune_t",
    ]  # fmt: skip


def test_a_trained_teacher_replaces_the_first_stage():
    chain = load("imagenet/chain.py:teacher=somewhere/mae_l,data=tree")
    assert "mae_l" not in chain.stages
    assert chain.stages["distill_b"].task.teacher.path == "somewhere/mae_l"
    assert chain.stages["distill_b"].data.source == "folder" and chain.stages["distill_b"].data.path == "tree"


def test_classification_is_what_finetuning_is_judged_by():
    for stage in load("imagenet/chain.py").stages.values():
        assert all(isinstance(e, Classification) for e in stage.evals.values())


def test_every_row_of_the_tables_loads():
    rows = load("imagenet/tables.py").stages
    assert list(rows) == ["tinymim_t"]
    spec = importlib.util.spec_from_file_location("tables", ROOT / "imagenet" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for row in tables.EXPECTED:
        assert list(check(tables.get_config(f"row={row}")).stages) == [row]
    with pytest.raises(InputError, match="row=x: unknown; choose one of deit_t"):
        tables.get_config("row=x")


def test_every_row_of_the_study_loads():
    for name in ("imagenet/study.py:teacher=t", "cifar10/study.py:short"):
        whole = load(f"{name},table=all")
        assert len(whole.compare) == 8
        for table, rows in study.rows("all").items():
            cfg = load(f"{name},table={table}")
            (compared,) = cfg.compare.values()
            assert list(compared.rows) == list(rows) == list(compared.paper)
            assert {stage for (stage,) in compared.rows.values()} <= set(cfg.stages)
            for stage, made in cfg.stages.items():  # the same row is the same stage in each table
                assert made == whole.stages[stage]
    feature = load("cifar10/study.py:short,table=6,row=output").stages["output_b"].task.targets["feature"]
    assert (feature.teacher_block, feature.student_block) == (6, 6)
    blocks = [
        s.task.targets["relation"].teacher_block
        for s in load("imagenet/study.py:table=10").stages.values()
        if s.task.kind == "distill"
    ]
    assert blocks == [12, 15, 18, 21, 24]
    for options, message in (
        ("table=9", "table=9: unknown; choose one of 5, 6, 7, 8, 10, 11, 12, 13, all"),
        ("table=12,row=x", "choose one of relation, relation_masked"),
    ):
        with pytest.raises(InputError, match=message):
            load(f"imagenet/study.py:{options}")


def test_a_path_with_a_comma_reaches_the_config_beside():
    for name in ("study.py:table=7,", "first_blocks.py:"):
        stages = load(f"cifar10/{name}data=/a\\,b,short").stages
        assert {stage.data.path for stage in stages.values()} == {"/a,b"}


def test_the_first_blocks_are_swept():
    stages = load("cifar10/first_blocks.py:short").stages
    assert [stage.init.keep_blocks for stage in stages.values()] == list(range(7))


def test_the_first_blocks_of_several_are_curves_with_errors():
    config = load("cifar10/first_blocks.py:short,init=/a\\,/b,seeds=3")
    assert len(config.stages) == 14 and {stage.run.replicas for stage in config.stages.values()} == {3}
    assert [stage.init.path for stage in config.stages.values()] == ["/a"] * 7 + ["/b"] * 7
    assert [list(table.rows) for table in config.compare.values()] == [list("0123456")] * 2
    with pytest.raises(InputError, match="seeds=many: not a number of seeds"):
        load("cifar10/first_blocks.py:short,seeds=many")


def test_blocks_of_the_paper_that_are_one_block_of_a_shallow_teacher_are_one_row():
    config = load("cifar10/study.py:table=10,short")
    rows = config.compare["TinyMIM, Table 10"].rows
    assert rows["block_24"] == rows["block_21"] == ("relation_block_21_b_finetuned",)
    assert not [name for name in config.stages if "24" in name]
    assert "relation_block_24_b" in load("cifar10/study.py:table=10").stages


def test_weights_of_mae_have_a_layer_decay_of_their_own():
    decays = [load(f"ade20k/upernet.py:{word}size=b").stages["upernet_b"].optim.layer_decay for word in ("", "mae,")]
    assert decays == [0.75, 0.65]


def test_every_small_data_set_loads():
    for name, num_classes in (("cifar10", 10), ("cifar100", 100), ("flowers", 102), ("pets", 37)):
        (stage,) = load(f"imagenet/transfer.py:data_set={name},size=small").stages.values()
        assert (stage.model.num_classes, stage.model.width, stage.optim.name) == (num_classes, 384, "adamw")
        (stage,) = load(f"imagenet/transfer.py:data_set={name},data=/d,sgd").stages.values()
        assert (stage.data.path, stage.data.split, stage.evals["val"].data.split) == ("/d", "train", "test")
        assert stage.optim.name == "sgd"
    with pytest.raises(InputError, match="unknown data set 'x'; choose one of cifar10, cifar100, flowers, pets"):
        load("imagenet/transfer.py:data_set=x")


def test_own_images_without_surgery(finished, tmp_path):
    chain = load("own.py").stages
    assert list(chain) == ["teacher", "student", "finetune"]
    teacher, student, finetune = chain.values()
    assert (teacher.model.width, student.model.width, finetune.model.num_classes) == (768, 192, 3)
    assert student.model.last_block_heads == 12 and student.task.targets["relation"].teacher_block == 9
    assert [stage.run.epochs for stage in chain.values()] == [1600, 400, 200]
    assert [stage.run.batch_size for stage in chain.values()] == [32] * 3
    sets = [open_source(data) for data in (finetune.data, finetune.evals["val"].data)]
    assert len(sets[0]) + len(sets[1]) == 60 and all(np.bincount(one.labels()).min() > 0 for one in sets)
    # A tree with train/ alone is split, one with both is not.
    shutil.copytree(own_images(), tmp_path / "train")
    alone = load(f"own.py:data={tmp_path}").stages["finetune"]
    assert [len(open_source(d)) for d in (alone.data, alone.evals["val"].data)] == [len(one) for one in sets]
    shutil.copytree(own_images(), tmp_path / "test")
    both = load(f"own.py:data={tmp_path}").stages["finetune"]
    assert [len(open_source(d)) for d in (both.data, both.evals["val"].data)] == [60, 60]
    # Images without classes, or in a single folder, are not fine-tuned on.
    for folder in ("flat", "one/photos"):
        shutil.copytree(own_images() / "class 1", tmp_path / folder)
        found = load(f"own.py:data={tmp_path / folder.split('/')[0]}").stages
        assert list(found) == ["teacher", "student"] and not any(stage.evals for stage in found.values())
    for options, message in (
        ("data=", "your images are needed: --config=configs/own.py:data=PATH"),
        (f"data={tmp_path},size=l", "unknown size 'l'; choose one of t, s"),
        (f"data={tmp_path},image_size=2x", "config option image_size=2x: not a number of pixels"),
        (f"data={tmp_path},teacher=gone", "gone does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            load(f"own.py:{options}")


def test_own_images_with_a_teacher(finished, tmp_path):
    for name, heads, block in (("mae", 6, 2), ("distill", 6, 2)):
        cfg = load(f"own.py:teacher={finished / name},data={own_images()}")
        student = cfg.stages["student"]
        assert list(cfg.stages) == ["student", "finetune"] and student.task.teacher.path == str(finished / name)
        assert (student.model.image_size, student.model.patch_size) == (16, 8)
        assert (student.model.last_block_heads, student.task.targets["relation"].teacher_block) == (heads, block)
        assert "status: would start" in dry_run.describe_chain(cfg, tmp_path)
    other = load(f"own.py:teacher={finished / 'mae'},data={own_images()},image_size=32")
    assert other.stages["student"].task.teacher.resize_posembed
    assert "status: would start" in dry_run.describe_chain(other, tmp_path)


@pytest.mark.parametrize(
    ("images", "epochs", "batch"), [(60, 1600, 32), (9, 1600, 8), (20_000, 200, 512), (4_000, 1000, 512)]
)
def test_epochs_are_scaled_to_the_images(images, epochs, batch):
    own = config_file("own.py")
    stage = own.scaled(recipes.mae(recipes.vit("base"), Data("digits")), "mae", images, False)
    assert (stage.run.epochs, stage.run.batch_size) == (epochs, batch)
    rate = stage.optim.lr * batch / stage.optim.lr_batch
    assert rate == pytest.approx(1.5e-4 * max(batch, 128) / 256)
