"""A chain whose teacher, or start, is somebody else's file: converted once, then read like a stage."""

import dataclasses
import functools
import weakref

import numpy as np
import pytest

from tinymim_jax.experiment import stage_file
from tinymim_jax.weights.parameters import flatten

pytest.importorskip("torch", reason="the teacher is a PyTorch file")

import torch

from tests import torch_files as files
from tests.conftest import IMAGE, tiny_classify, tiny_distill, tiny_mae
from tests.training.test_chain import snapshot
from tinymim_jax.bridge import convert
from tinymim_jax.commands.run import run_chain
from tinymim_jax.experiment.config import Config, Decoder, Init, ViT
from tinymim_jax.experiment.validate import check
from tinymim_jax.planning import dry_run, preflight
from tinymim_jax.runtime import multihost
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.training import chain as chain_lib
from tinymim_jax.weights import handoff

TEACHER = ViT(24, 3, 6, last_block_heads=12, **IMAGE)
NAME = "tinymim_vit_tiny_patch16"  # whose 6 and 12 heads are known


def write(path, seed=0):
    path.parent.mkdir(exist_ok=True)
    files.tinymim_pretrained(path, TEACHER, NAME, seed=seed)
    return path


def converted(path, workdir):
    """Where the file is converted to."""
    return handoff.source_folder(Init(path=str(path)), workdir)


def config(path, *, finetune=False):
    """distill (-> finetune), with the file as the teacher of block 2."""
    stages = {"distill": tiny_distill()}
    stages["distill"].task.teacher = Init(path=str(path))
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
    text = dry_run.describe_chain(config(path, finetune=True), tmp_path / "work")
    assert f"teacher {path}: qk+vv relations of block 2 of 3, 6 heads" in text
    assert "skipped: encoder/block3, encoder/norm" in text
    text = dry_run.describe_chain(classifier(path), tmp_path / "work")
    assert f"init from {path}" in text
    assert "regrouped 12 -> 6 heads: encoder/block3/attn/qkv" in text
    assert "not trained by the source: " in text and "encoder/block3/mlp" in text
    assert snapshot(tmp_path) == before and not (tmp_path / "work").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(the file, the workdir of a chain that ran with it, its results)."""
    root = tmp_path_factory.mktemp("foreign")
    path = write(root / "files" / "x.pth")
    results = run_chain(config(path), root / "work")
    return path, root / "work", results


def test_the_file_is_converted_once(finished, capsys):
    path, workdir, results = finished
    folder = converted(path, workdir)
    assert handoff.finished(folder) and folder.parent == workdir / "converted" and folder.name.startswith("x-")
    expected = convert.read(path)
    for key, value in flatten(handoff.read_variables(folder)["params"]).items():
        np.testing.assert_array_equal(value, flatten(expected.params)[key])
    assert list(results["stages"]) == ["distill"] and results["stages"]["distill"]["loss"] > 0
    before = snapshot(workdir)
    assert run_chain(config(path), workdir) == results
    out = capsys.readouterr().out
    assert "distill: finished, skipped" in out and "converted" not in out
    assert snapshot(workdir) == before


def test_the_file_is_the_teacher(finished, tmp_path, capsys):
    """The same as with the converted folder, and other than with another file."""
    path, workdir, results = finished
    assert run_chain(config(converted(path, workdir)), tmp_path / "a")["stages"] == results["stages"]
    assert not (tmp_path / "a" / "converted").exists()
    other = write(tmp_path / "files" / "x.pth", seed=1)
    capsys.readouterr()
    assert run_chain(config(other), tmp_path / "b")["stages"] != results["stages"]
    out = capsys.readouterr().out
    assert f"{other}: TinyMIM, pre-trained\n" in out and "6 heads, as its arguments name" in out
    assert f"converted into {converted(other, tmp_path / 'b')}" in out


def test_the_file_may_be_gone_afterwards(tmp_path):
    path, workdir = write(tmp_path / "x.pth"), tmp_path / "work"
    preflight.convert_sources(config(path), ["distill"], workdir)
    path.unlink()
    before = snapshot(converted(path, workdir))
    assert "block 2 of 3, 6 heads" in dry_run.describe_chain(config(path), workdir)
    assert run_chain(config(path), workdir)["stages"]["distill"]["loss"] > 0
    assert snapshot(converted(path, workdir)) == before


def test_another_file_under_the_same_name_is_an_error(tmp_path):
    path, workdir = write(tmp_path / "x.pth"), tmp_path / "work"
    preflight.convert_sources(config(path), ["distill"], workdir)
    before, size = snapshot(workdir), path.stat().st_size
    write(path, seed=1)
    assert path.stat().st_size == size  # only the contents differ
    message = "stage distill: .*converted/x-.* was converted from another file than .*x.pth; delete it to convert again"
    for call in (dry_run.describe_chain, run_chain):
        with pytest.raises(InputError, match=message):
            call(config(path, finetune=True), workdir)
    assert snapshot(workdir) == before
    write(path)  # the first one again
    assert "block 2 of 3, 6 heads" in dry_run.describe_chain(config(path), workdir)


def test_no_process_keeps_what_it_has_read(tmp_path, monkeypatch):
    """Here as a process that is not the first, which alone converts: a teacher's gigabytes lie in the memory of both."""
    path, held, during = write(tmp_path / "x.pth"), [], []
    read = convert.read

    def noted(path):
        held.append(weakref.ref(converted := read(path)))
        return converted

    def in_the_first_process(action):
        with monkeypatch.context() as other:
            other.setattr(preflight, "read_foreign", functools.lru_cache(noted))
            return action()

    monkeypatch.setattr(convert, "read", noted)
    monkeypatch.setattr(multihost, "run_on_primary", in_the_first_process)
    monkeypatch.setattr(chain_lib, "run_side_by_side", lambda *_: during.append([ref() for ref in held]))
    run_chain(config(path), tmp_path / "work")
    assert handoff.finished(converted(path, tmp_path / "work"))
    assert during == [[None, None]]


def test_two_files_of_one_name_in_a_chain(tmp_path):
    """checkpoint.pth is a common name."""
    paths = [write(tmp_path / "a" / "x.pth"), write(tmp_path / "b" / "x.pth", seed=1)]
    cfg = config(paths[0])
    cfg.stages |= classifier(paths[1]).stages
    preflight.convert_sources(cfg, ["distill", "finetune"], tmp_path / "work")
    tokens = [
        handoff.read_variables(converted(path, tmp_path / "work"))["params"]["encoder"]["cls_token"] for path in paths
    ]
    assert not np.array_equal(*tokens)
    for path, token in zip(paths, tokens, strict=True):
        np.testing.assert_array_equal(convert.read(path).params["encoder"]["cls_token"], token)


def test_a_stage_starts_from_a_file(tmp_path):
    """Of no steps, it ends with the encoder of the file; a decoder is pretext, which no hand-over takes."""
    path = tmp_path / "x.pth"
    model = files.mae_full(path, ViT(24, 3, 6, **IMAGE), Decoder(16, 1, 2))
    known = {"made_by": "tinymim_jax", "model": {"width": 24, "depth": 3, "num_heads": 6}, "decoder": {"num_heads": 2}}
    torch.save({"model": model.state_dict(), "tinymim_jax": known}, path)
    stage = tiny_mae()
    stage.init, stage.evals, stage.run.steps = Init(path=str(path)), {}, 0
    run_chain(check(Config("tiny", {"mae": stage})), tmp_path / "work")
    ours, theirs = (
        flatten(p) for p in (handoff.read_variables(tmp_path / "work" / "mae")["params"], convert.read(path).params)
    )
    assert ours.keys() == theirs.keys() and len(ours) == 62
    encoder = [key for key in ours if key.startswith("encoder/")]
    for key in encoder:
        np.testing.assert_array_equal(ours[key], theirs[key])
    assert len(encoder) == 42 and np.any(ours["pretext/decoder/mask_token"] != theirs["pretext/decoder/mask_token"])


def test_a_folder_is_converted_too_and_may_be_gone_afterwards(tmp_path, capsys):
    import shutil

    path, workdir = tmp_path / "vit.small", tmp_path / "work"
    path.mkdir()
    files.timm_safetensors(path / "model.safetensors", ViT(24, 3, 6, **IMAGE))
    (path / "config.json").write_text('{"architecture": "vit_base_patch16_224", "model_args": {"num_heads": 6}}')
    folder = converted(path, workdir)
    assert folder.name.startswith("vit.small-")
    assert f"teacher {path}: qk+vv relations of block 2 of 3, 6 heads" in dry_run.describe_chain(config(path), workdir)
    preflight.convert_sources(config(path), ["distill"], workdir)
    assert f"converted into {folder}" in capsys.readouterr().out
    assert stage_file.read_model(folder).num_heads == 6
    shutil.rmtree(path)
    assert converted(path, workdir) == folder
    assert "block 2 of 3, 6 heads" in dry_run.describe_chain(config(path), workdir)


def test_only_what_is_needed_is_converted(tmp_path):
    """The file of a stage that is not asked for."""
    cfg = config(write(tmp_path / "x.pth"))
    cfg.stages = {"mae": tiny_mae(), **cfg.stages}
    cfg.stages["mae"].evals, cfg.stages["mae"].run.steps = {}, 0
    run_chain(cfg, tmp_path / "work", only="mae")
    assert handoff.finished(tmp_path / "work" / "mae")
    assert not (tmp_path / "work" / "converted").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "stage distill: .*x.pth does not exist; give a .pth or .safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "stage distill: .*x.pth is not a whole PyTorch checkpoint"),
        (lambda path: torch.save([], path), "stage distill: .*x.pth holds a list, not a dict of weights"),
        (lambda path: files.mae_encoder(path, TEACHER), "how many heads .* cannot be seen .* convert .* --num_heads=N"),
        (
            lambda path: files.tinymim_pretrained(path, ViT(24, 1, 6, **IMAGE), NAME),
            "stage distill: task.targets.relation: teacher_block 2 is beyond the teacher's 1 blocks",
        ),
        (
            lambda path: files.tinymim_pretrained(path, ViT(24, 3, 6, image_size=16, patch_size=4), NAME),
            "stage distill: .*teacher and student differ in their tokens",
        ),
    ],
)  # fmt: skip
def test_a_file_that_will_not_do_is_found_before_anything_runs(damage, message, tmp_path):
    path = write(tmp_path / "x.pth")
    damage(path)
    cfg = config(path)
    cfg.stages = {"mae": tiny_mae(), **cfg.stages}
    with pytest.raises(InputError, match=message) as error:
        run_chain(cfg, tmp_path / "work")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "work").exists()
