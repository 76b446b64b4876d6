"""Students of one teacher that are trained in one program: each ends like its single run."""

import copy
import dataclasses

import jax
import numpy as np
import pytest

from tests.conftest import tiny_classify, tiny_distill, tiny_mae
from tests.processes import log
from tinymim_jax.bench.step import compile_step
from tinymim_jax.commands.run import run_chain
from tinymim_jax.experiment.config import ClassToken, Config, Feature, Init, Relation, Stage
from tinymim_jax.experiment.validate import check
from tinymim_jax.runtime import hlo_stats
from tinymim_jax.runtime.errors import Unavailable
from tinymim_jax.runtime.preemption import Interrupted
from tinymim_jax.runtime.sharding import state_sharding
from tinymim_jax.training import chain, loop
from tinymim_jax.training.setup import make_setup
from tinymim_jax.training.step import jit_step, side_by_side
from tinymim_jax.weights import checkpoint, handoff
from tinymim_jax.weights.parameters import flatten


def student(targets, **run) -> Stage:
    stage = tiny_distill()
    stage.task.targets, stage.evals = targets, {}
    stage.optim.eps = 1e-4  # Adam divides what is rounding alone by its own size
    stage.run = dataclasses.replace(stage.run, data_name="study", **run)
    return stage


def rows(**run) -> dict[str, Stage]:
    """Other targets, blocks of the teacher, heads and drop path."""
    stages = {
        "relation": student({"relation": Relation(2, 2)}, **run),
        "feature": student({"feature": Feature(3, 2, ("mlp_out",))}, **run),
        "cls": student({"cls": ClassToken(1, 2)}, **run),
    }
    stages["feature"].model.last_block_heads = None
    stages["cls"].model.drop_path = 0.0
    return stages


def study(**run) -> Config:
    mae = tiny_mae()
    mae.evals = {}
    return check(Config("study", {"mae": mae, **rows(**run)}))


def close(folder, other):
    arrays = [flatten(checkpoint.read_model(one)["params"]) for one in (folder, other)]
    assert arrays[0].keys() == arrays[1].keys()
    for name, array in arrays[0].items():
        if name.endswith("/qkv/bias"):  # softmax cancels those of keys: what moves them is rounding
            continue
        np.testing.assert_allclose(array, arrays[1][name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("per_call", [1, 2])
def test_each_ends_like_its_single_run(per_call, tmp_path, capsys):
    cfg = study(steps_per_call=per_call, checkpoint_every=2, log_every=2)
    alone = run_chain(copy.deepcopy(cfg), tmp_path / "alone")
    capsys.readouterr()
    together = run_chain(cfg, tmp_path / "together", beside=3)
    assert "side by side: relation, feature, cls" in capsys.readouterr().out
    for name in rows():
        assert together["stages"][name] == pytest.approx(alone["stages"][name], rel=1e-4)
        close(tmp_path / "together" / name, tmp_path / "alone" / name)
        logs = [log(tmp_path / workdir / name) for workdir in ("alone", "together")]
        assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]


@pytest.mark.slow
def test_interrupted_they_end_like_uninterrupted_ones(tmp_path, stop_at, mesh):
    cfg = study()
    loop.run_stage(cfg.stages["mae"], "mae", tmp_path, mesh)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mae").symlink_to(tmp_path / "mae")
    whole = loop.run_side_by_side(rows(), tmp_path / "whole", mesh)
    stop_at(2)
    with pytest.raises(Interrupted, match="relation and feature and cls stopped at step 2 of 4"):
        loop.run_side_by_side(rows(), tmp_path / "cut", mesh)
    assert all(checkpoint.steps(tmp_path / "cut" / name)[-1] == 2 for name in rows())
    assert loop.run_side_by_side(rows(), tmp_path / "cut", mesh) == whole
    for name in rows():
        models = [checkpoint.read_model(tmp_path / side / name) for side in ("whole", "cut")]
        jax.tree.map(np.testing.assert_array_equal, *models)


@pytest.mark.slow
def test_those_at_different_steps_go_on_one_by_one(tmp_path, stop_at, capsys, mesh):
    cfg = study()
    loop.run_stage(cfg.stages["mae"], "mae", tmp_path, mesh)
    stop_at(1)
    with pytest.raises(Interrupted):
        loop.run_stage(cfg.stages["cls"], "cls", tmp_path, mesh)
    with pytest.raises(Unavailable, match="relation and the stages beside it are at different steps"):
        loop.run_side_by_side(rows(), tmp_path, mesh)
    run_chain(cfg, tmp_path, beside=3)
    assert "side by side: relation, feature\n" in capsys.readouterr().out and handoff.finished(tmp_path / "cls")


@pytest.mark.slow
def test_the_teacher_computes_once(mesh):
    """As XLA counts operations: one program has those of the three less those of two passes of the teacher."""
    stages, teacher = rows(), tiny_mae().model
    setups = [make_setup(stage, name, {"teacher": teacher}, 40) for name, stage in stages.items()]
    compiled, arguments = zip(*(compile_step(setup, mesh) for setup in setups), strict=True)
    states, rngs = (tuple(one[i] for one in arguments) for i in (0, 3))
    frozen = max((one[1] for one in arguments), key=lambda tree: len(jax.tree.leaves(tree)))
    shardings = tuple(state_sharding(mesh, state) for state in states)
    step = jit_step(side_by_side(setups), mesh, shardings)
    together = step.lower(states, frozen, arguments[0][2], rngs).compile()
    passes = [setup.task.teacher_cfg.forward_flops(block=i) for setup, i in zip(setups, (2, 3, 1), strict=True)]
    spared = sum(hlo_stats.all_flops(one) for one in compiled) - hlo_stats.all_flops(together)
    assert spared == pytest.approx(8 * (sum(passes) - max(passes)), rel=0.15)


def test_who_may_run_beside_whom():
    stages = rows()
    cfg = Config("study", {"mae": tiny_mae(), **stages, "tuned": tiny_classify("cls")})
    assert chain.groups(cfg, dict.fromkeys(cfg.stages), 1) == [[name] for name in cfg.stages]
    assert chain.groups(cfg, dict.fromkeys(cfg.stages), 3) == [["mae"], ["relation", "feature", "cls"], ["tuned"]]
    assert chain.groups(cfg, dict.fromkeys(cfg.stages), 2) == [["mae"], ["relation", "feature"], ["cls"], ["tuned"]]
    assert chain.groups(cfg, dict.fromkeys(["cls", "tuned", "feature"]), 2) == [["cls", "feature"], ["tuned"]]
    begun = {**{name: [] for name in stages}, "relation": [4]}
    assert chain.groups(cfg, begun, 3) == [["relation"], ["feature", "cls"]]
    base = stages["relation"]

    def other(**changes):
        stage = copy.deepcopy(stages["cls"])
        for path, value in changes.items():
            node, _, field = path.rpartition("__")
            setattr(getattr(stage, node), field, value)
        return stage

    assert chain.can_share(base, other())
    for changes in (
        {"run__data_name": None}, {"run__seed": 1}, {"run__steps": 5}, {"run__replicas": 2},
        {"optim__accum_steps": 2}, {"model__dtype": "bfloat16"}, {"data__crop_scale": (0.5, 1.0)},
        {"task__teacher": Init("x")}, {"task__mask_ratio": 0.5}, {"task__teacher_drop_path": 0.1},
        {"task__targets": {"f": Feature(1, 2, ("normed",))}},
    ):  # fmt: skip
        assert not chain.can_share(base, other(**changes)), changes
    assert not chain.can_share(tiny_mae(), tiny_mae()) and not chain.can_share(base, tiny_classify("cls"))
    reading = student({"f": Feature(2, 2)})
    reading.task.teacher = Init("relation")
    cfg.stages = {"relation": base, "reading": reading, "cls": stages["cls"]}
    assert chain.groups(cfg, dict.fromkeys(cfg.stages), 3) == [["relation", "cls"], ["reading"]]
    started = copy.deepcopy(base)
    started.init = Init("cls")
    cfg.stages = {"cls": stages["cls"], "started": started, "relation": base}
    assert chain.groups(cfg, dict.fromkeys(cfg.stages), 3) == [["cls", "relation"], ["started"]]
