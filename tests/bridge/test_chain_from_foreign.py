"""A chain whose teacher, or start, is somebody else's file: converted once, then read like a stage."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch", reason="the teacher is a PyTorch file")

import torch

from tests.conftest import IMAGE, tiny_classify, tiny_distill, tiny_mae
from tests.reference import files, mae, vit
from tests.test_chain import snapshot
from tinymim_jax import chain as chain_lib
from tinymim_jax import handoff
from tinymim_jax.bridge import convert
from tinymim_jax.config import Config, Init, InputError
from tinymim_jax.validate import check

TEACHER = vit.Config(24, 3, 6, last_block_heads=12, **IMAGE)
NAME = "tinymim_vit_tiny_patch16"  # whose 6 and 12 heads are known


def write(path, seed=0):
    path.parent.mkdir(exist_ok=True)
    files.tinymim_pretrained(path, TEACHER, NAME, seed=seed)
    return path


def config(path, *, finetune=False):
    """distill (-> finetune), with the file as the teacher of block 2."""
    stages = {"distill": tiny_distill()}
    stages["distill"].task.teacher.init = Init(path=str(path))
    if finetune:
        stages["finetune"] = tiny_classify()
    return check(Config("tiny", stages))


def classifier(path):
    """A classifier that starts from the file."""
    stage = tiny_classify(None)
    stage.model = dataclasses.replace(stage.model, width=24, depth=3, num_heads=6)
    fresh = ("encoder/fc_norm/.*", "encoder/head/.*")
    stage.init = Init(path=str(path), skip=("encoder/norm/.*",), fresh=fresh, regroup_heads=True)
    return check(Config("tiny", {"finetune": stage}))


def test_a_dry_run_touches_nothing(tmp_path):
    path = write(tmp_path / "files" / "x.pth")
    before = snapshot(tmp_path)
    text = chain_lib.describe_chain(config(path, finetune=True), tmp_path / "work")
    assert f"teacher {path}: block 2 of 3, 6 heads" in text
    assert "skipped: encoder/block3, encoder/norm" in text
    text = chain_lib.describe_chain(classifier(path), tmp_path / "work")
    assert f"init from {path}" in text
    assert "regrouped 12 -> 6 heads: encoder/block3/attn/qkv" in text
    assert "not trained by the source: " in text and "encoder/block3/mlp" in text
    assert snapshot(tmp_path) == before and not (tmp_path / "work").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(the file, the workdir of a chain that ran with it, its results)."""
    root = tmp_path_factory.mktemp("foreign")
    path = write(root / "files" / "x.pth")
    results = chain_lib.run_chain(config(path), root / "work")
    return path, root / "work", results


def test_the_file_is_converted_once(finished, capsys):
    path, workdir, results = finished
    folder = workdir / "converted" / "x"
    assert handoff.finished(folder)
    expected = convert.read(path)
    for key, value in handoff.flatten(handoff.read_params(folder)).items():
        np.testing.assert_array_equal(value, handoff.flatten(expected.params)[key])
    assert list(results["stages"]) == ["distill"] and results["stages"]["distill"]["loss"] > 0
    before = snapshot(workdir)
    assert chain_lib.run_chain(config(path), workdir) == results
    out = capsys.readouterr().out
    assert "distill: finished, skipped" in out and "converted" not in out
    assert snapshot(workdir) == before


def test_the_file_is_the_teacher(finished, tmp_path, capsys):
    """The same as with the converted folder, and other than with another file."""
    _, workdir, results = finished
    assert chain_lib.run_chain(config(workdir / "converted" / "x"), tmp_path / "a")["stages"] == results["stages"]
    assert not (tmp_path / "a" / "converted").exists()
    other = write(tmp_path / "files" / "x.pth", seed=1)
    capsys.readouterr()
    assert chain_lib.run_chain(config(other), tmp_path / "b")["stages"] != results["stages"]
    out = capsys.readouterr().out
    assert f"{other}: TinyMIM, pre-trained\n" in out and "6 heads, as its arguments name" in out
    assert f"converted into {tmp_path}/b/converted/x" in out


def test_the_file_may_be_gone_afterwards(finished, tmp_path):
    import shutil

    _, workdir, results = finished
    shutil.copytree(workdir, tmp_path / "work")
    gone = tmp_path / "files" / "x.pth"
    converted = tmp_path / "work" / "converted" / "x"
    before = snapshot(converted)
    shutil.rmtree(tmp_path / "work" / "distill")
    assert "block 2 of 3, 6 heads" in chain_lib.describe_chain(config(gone), tmp_path / "work")
    assert chain_lib.run_chain(config(gone), tmp_path / "work") == results
    assert snapshot(converted) == before


def test_another_file_under_the_same_name_is_an_error(tmp_path):
    path, workdir = write(tmp_path / "x.pth"), tmp_path / "work"
    chain_lib.convert_sources(config(path), ["distill"], workdir)
    before, size = snapshot(workdir), path.stat().st_size
    write(path, seed=1)
    assert path.stat().st_size == size  # only the contents differ
    message = "stage distill: .*converted/x was converted from another file than .*x.pth; delete it to convert again"
    for call in (chain_lib.describe_chain, chain_lib.run_chain):
        with pytest.raises(InputError, match=message):
            call(config(path, finetune=True), workdir)
    assert snapshot(workdir) == before
    write(path)  # the first one again
    assert "block 2 of 3, 6 heads" in chain_lib.describe_chain(config(path), workdir)


def test_two_files_of_one_name_in_a_chain(tmp_path):
    cfg = config(write(tmp_path / "a" / "x.pth"))
    cfg.stages |= classifier(write(tmp_path / "b" / "x.pth", seed=1)).stages
    with pytest.raises(InputError, match="was converted from another file than .*b/x.pth"):
        chain_lib.run_chain(cfg, tmp_path / "work")
    assert not (tmp_path / "work" / "distill").exists()


def test_a_stage_starts_from_a_file(tmp_path):
    """Of no steps, it ends with the weights of the file."""
    path = tmp_path / "x.pth"
    model = files.mae_full(path, vit.Config(24, 3, 6, **IMAGE), mae.Decoder(16, 1, 2))
    known = {"made_by": "tinymim_jax", "model": {"width": 24, "depth": 3, "num_heads": 6}, "decoder": {"num_heads": 2}}
    torch.save({"model": model.state_dict(), "tinymim_jax": known}, path)
    stage = tiny_mae()
    stage.init, stage.evals, stage.run.steps = Init(path=str(path)), {}, 0
    chain_lib.run_chain(check(Config("tiny", {"mae": stage})), tmp_path / "work")
    ours, theirs = (
        handoff.flatten(p) for p in (handoff.read_params(tmp_path / "work" / "mae"), convert.read(path).params)
    )
    assert ours.keys() == theirs.keys() and len(ours) == 62
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key])


def test_a_folder_is_converted_too(tmp_path, capsys):
    path = tmp_path / "vit.small"
    path.mkdir()
    files.timm_safetensors(path / "model.safetensors", vit.Config(24, 3, 6, **IMAGE))
    (path / "config.json").write_text('{"architecture": "vit_base_patch16_224", "model_args": {"num_heads": 6}}')
    cfg = config(path)
    assert f"teacher {path}: block 2 of 3, 6 heads" in chain_lib.describe_chain(cfg, tmp_path / "work")
    chain_lib.convert_sources(cfg, ["distill"], tmp_path / "work")
    assert f"converted into {tmp_path}/work/converted/vit.small" in capsys.readouterr().out
    assert handoff.read_model(tmp_path / "work" / "converted" / "vit.small").num_heads == 6
    assert "block 2 of 3, 6 heads" in chain_lib.describe_chain(cfg, tmp_path / "work")


def test_only_what_is_needed_is_converted(tmp_path):
    """The file of a stage that is not asked for."""
    cfg = config(write(tmp_path / "x.pth"))
    cfg.stages = {"mae": tiny_mae(), **cfg.stages}
    cfg.stages["mae"].evals, cfg.stages["mae"].run.steps = {}, 0
    chain_lib.run_chain(cfg, tmp_path / "work", only="mae")
    assert handoff.finished(tmp_path / "work" / "mae")
    assert not (tmp_path / "work" / "converted").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "stage distill: .*x.pth does not exist; give a .pth or .safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "stage distill: .*x.pth is not a whole PyTorch checkpoint"),
        (lambda path: torch.save([], path), "stage distill: .*x.pth holds a list, not a dict of weights"),
        (lambda path: files.mae_encoder(path, TEACHER), "how many heads .* cannot be seen .* convert it with --num_heads=N"),
        (
            lambda path: files.tinymim_pretrained(path, vit.Config(24, 1, 6, **IMAGE), NAME),
            "stage distill: teacher.block 2 is beyond the teacher's 1 blocks",
        ),
        (
            lambda path: files.tinymim_pretrained(path, vit.Config(24, 3, 6, image_size=16, patch_size=4), NAME),
            "stage distill: .*patch",
        ),
    ],
)  # fmt: skip
def test_a_file_that_will_not_do_is_found_before_anything_runs(damage, message, tmp_path):
    path = write(tmp_path / "x.pth")
    damage(path)
    cfg = config(path)
    cfg.stages = {"mae": tiny_mae(), **cfg.stages}
    with pytest.raises(InputError, match=message) as error:
        chain_lib.run_chain(cfg, tmp_path / "work")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "work").exists()
