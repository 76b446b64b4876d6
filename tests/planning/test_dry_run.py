import dataclasses

import pytest
from etils.epath import Path

from tests.planning.test_preflight import write_tree
from tinymim_jax.commands.run import run_chain
from tinymim_jax.experiment.validate import check
from tinymim_jax.planning import dry_run
from tinymim_jax.planning.dry_run import describe_chain
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.workdir_lock import WorkdirLock


def test_a_description_says_what_would_happen_and_touches_nothing(chain, tmp_path):
    text = describe_chain(chain, tmp_path / "work")
    assert not (tmp_path / "work").exists()
    for line in (
        "mae: MAE pre-training, 4 steps of 8 images",
        "model: ViT, width 12, 2 blocks, 2 heads (6 in the last block), 16 px in patches of 8, no head, drop path 0.1, float32;",
        "teacher mae: qk+vv relations of block 2 of 3, 6 heads",
        "skipped: encoder/block3, encoder/norm, pretext",
        "regrouped 6 -> 2 heads: encoder/block2/attn/qkv",
        "not trained by the source: encoder/block2/attn/proj, encoder/block2/mlp, encoder/block2/norm2",
        "status: would start",
        "devices: 1 x cpu, data 1 x fsdp 1",
        "data: digits, split train: 40 images",
    ):
        assert line in text
    assert describe_chain(chain, tmp_path / "work", "mae").count("status") == 1


def test_a_description_of_other_devices_and_data_elsewhere(chain, tmp_path):
    chain.mesh.fsdp = 3
    optim = chain.stages["distill"].optim
    optim.schedule, optim.warmup_epochs, optim.warmup_steps, chain.stages["distill"].run.replicas = "poly", 0.0, 2, 2
    chain.stages["mae"].optim.accum_steps = 2
    chain.stages["mae"].data = dataclasses.replace(chain.stages["mae"].data, source="folder", path="/gone")
    chain.stages["mae"].data.num_examples = 16
    text = describe_chain(chain, tmp_path)
    assert "relation distillation, student block 2, 4 steps of 8 images, 2 replicas (seeds 0 to 1)" in text
    assert "warm-up 2 steps, poly schedule, min lr 0" in text
    assert "fsdp 3 does not fill 1 devices" in text
    assert "4 steps of 8 images in 2 micro-batches" in text
    assert "data: folder /gone, split train: not at hand" in text
    assert text.splitlines()[-1].startswith("before stage mae can run: /gone: no such folder")


def test_the_owner_of_a_workdir_is_named_before_what_differs(chain, tmp_path):
    (tmp_path / "chain.json").write_text('{"name": "other"}')
    with pytest.raises(InputError, match="belongs to the experiment 'other', and this is 'tiny'"):
        describe_chain(check(chain), tmp_path)


def test_a_description_finds_a_hand_over_that_would_fail(chain, tmp_path):
    chain.stages["finetune"].init.regroup_heads = False
    with pytest.raises(InputError, match="stage finetune: encoder/block2/attn/qkv/.* 6 heads in the source and 2"):
        describe_chain(chain, tmp_path)
    chain.stages["finetune"].init.regroup_heads = True
    chain.stages["distill"].model.width, chain.stages["distill"].model.last_block_heads = 16, None
    with pytest.raises(InputError, match="the student's block 2 has 2 heads, the teacher's block 2 has 6"):
        describe_chain(chain, tmp_path)


def test_an_unfinished_stage_is_described_with_its_step(chain, mesh, tmp_path, stop_at):
    stop_at(3)
    with pytest.raises(KeyboardInterrupt):
        run_chain(chain, tmp_path)
    assert "status: would go on from step 3" in describe_chain(chain, tmp_path)


def test_a_description_refuses_what_no_machine_could_run(chain, tmp_path):
    write_tree(tmp_path / "tree", {"train": "abc", "test": "abc"})
    tuned = chain.stages["finetune"]
    for data in (tuned.data, tuned.evals["val"].data):
        data.source, data.path, data.per_class, data.num_examples = "folder", str(tmp_path / "tree"), None, None
    with pytest.raises(InputError, match="stage finetune: .*3 classes"):
        describe_chain(check(chain), tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_description_says_what_this_machine_lacks(chain, tmp_path):
    chain.stages["mae"].evals["knn"] = dataclasses.replace(chain.stages["mae"].evals["knn"], k=(3, 500))
    text = describe_chain(check(chain), tmp_path)
    assert "before stage mae can run: knn: k 500 is not among the" in text
    assert "before stage finetune can run: takes weights from" in describe_chain(check(chain), tmp_path, "finetune")
    assert "takes weights" not in text


def test_a_workdir_that_is_taken_is_said_in_the_dry_run(tmp_path, monkeypatch):
    dry_run.check_workdir(Path(tmp_path) / "new")
    assert not (tmp_path / "new").exists()
    with WorkdirLock(Path(tmp_path)), pytest.raises(InputError, match="in use by process"):
        dry_run.check_workdir(Path(tmp_path))
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(InputError, match="cannot be written to"):
        dry_run.check_workdir(Path(tmp_path) / "a" / "b")
