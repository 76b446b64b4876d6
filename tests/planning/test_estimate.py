import contextlib
import importlib.util
import json
import subprocess
import sys
import threading
import types
from pathlib import Path

import jax
import pytest

from tests.conftest import tiny_classify, tiny_distill, tiny_mae
from tests.processes import ROOT, environment
from tinymim_jax.experiment.config import Config, Data
from tinymim_jax.objectives import relation_kl
from tinymim_jax.planning import estimate
from tinymim_jax.runtime import sharding as mesh_lib
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.training.setup import make_setup


@pytest.fixture
def cfg():
    return Config("tiny", {"mae": tiny_mae(), "distill": tiny_distill(), "finetune": tiny_classify()})


def test_a_chain_on_the_devices_at_hand(cfg, tmp_path):
    report = estimate.run(cfg, None, "", tmp_path)
    assert list(report["stages"]) == ["mae", "distill", "finetune"]
    for name, f in report["stages"].items():
        assert f["devices"] == 1 and f["collectives"] == {} and f["steps"] == 4
        assert f["total_bytes"] >= f["argument_bytes"] > 0 and 0.9 < f["xla_flops"] / f["model_flops"] < 4, name
        assert "step_s" not in f  # nothing is published of this CPU
    lines = estimate.table(report).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:-2]] == ["| mae", "| distill", "| finetune"]
    assert lines[-1].startswith("no bounds: the limits of cpu are not known") and "(0.0" not in "".join(lines)
    assert json.loads(json.dumps(report)) == report


def test_two_stages_are_compiled_at_once_and_told_in_order(cfg, tmp_path, monkeypatch, capsys):
    """The second is done before the first; a third begins then."""
    both, second = threading.Barrier(2, timeout=60), threading.Event()

    def forecast(plan, mesh):
        if plan.name != "finetune":
            both.wait()
            assert plan.name == "distill" or second.wait(60)
        second.set()
        return {"fits": True, "name": plan.name}

    monkeypatch.setattr(estimate, "forecast", forecast)
    found = estimate.run(cfg, None, "", tmp_path)["stages"]
    assert [(name, f["name"]) for name, f in found.items()] == [(name, name) for name in ("mae", "distill", "finetune")]
    said = [line.split(":")[0] for line in capsys.readouterr().err.splitlines() if "compiling for" in line]
    assert said == ["mae", "distill", "finetune"]


def test_the_first_stage_that_fails_is_told(cfg, tmp_path, monkeypatch):
    """Though a later one failed before it."""
    failed = threading.Event()

    def forecast(plan, mesh):
        if plan.name == "mae":
            failed.wait(60)
        failed.set()
        raise InputError("too large")

    monkeypatch.setattr(estimate, "forecast", forecast)
    with pytest.raises(InputError, match="stage mae: too large"):
        estimate.run(cfg, None, "", tmp_path)


def test_one_program_is_traced_at_a_time(cfg, tmp_path, monkeypatch):
    for_other_devices, inside, most = estimate.layers.for_other_devices, [], []

    @contextlib.contextmanager
    def noted():
        inside.append(1)
        most.append(len(inside))
        with for_other_devices():
            yield
        inside.pop()

    monkeypatch.setattr(estimate.layers, "for_other_devices", noted)
    estimate.run(cfg, None, "", tmp_path)
    assert most == [1, 1, 1] and not estimate.layers._is_for_others


def test_small_numbers_are_not_shown_as_0():
    assert [estimate._decimals(x, 1) for x in (0, 0.00123, 0.04, 0.06, 12.34)] == [
        "0.0",
        "0.0012",
        "0.04",
        "0.1",
        "12.3",
    ]


@pytest.mark.slow
def test_micro_batches_are_all_counted(cfg, mesh):
    for name in cfg.stages:
        found = {}
        for accum in (1, 4):
            cfg.stages[name].optim.accum_steps = accum
            ((_, plan),) = estimate.plans(cfg, Path("none"), name)
            found[accum] = estimate.forecast(plan, mesh)
        assert found[4]["matmul_flops"] == found[1]["matmul_flops"] == pytest.approx(found[1]["model_flops"]), name
        assert all(f["xla_flops"] > f["matmul_flops"] for f in found.values()), name


def test_blocks_of_the_relation_loss_are_all_counted(cfg, mesh, monkeypatch):
    ((_, plan),) = estimate.plans(cfg, Path("none"), "distill")
    monkeypatch.setattr(relation_kl, "DENSE", 1)
    monkeypatch.setattr(relation_kl, "ROWS", 2)  # 3 blocks for 5 tokens
    padded = plan.task.flops_per_image() + sum(target.flops(4) for target in plan.task.targets.values()) / 5
    assert estimate.forecast(plan, mesh)["matmul_flops"] == pytest.approx(8 * padded)


def test_a_data_set_in_the_devices_memory_is_there(cfg, mesh):
    stage = cfg.stages["mae"]
    found = {}
    for stage.data.resident in (False, True):
        ((_, plan),) = estimate.plans(cfg, Path("none"), "mae")
        found[stage.data.resident] = estimate.forecast(plan, mesh)
    # Beside the images is_valid and a key, or stop; what a step does not read, such as MAE's labels, is no argument.
    images, batch = 40 * (8 * 8 * 3 + 1) + 8, 8 * (16 * 16 * 3 + 1 + 1)
    more = found[True]["argument_bytes"] - found[False]["argument_bytes"]
    assert more == images + 8 * 4 * 4 - batch
    assert found[True]["matmul_flops"] > found[False]["matmul_flops"]  # crops are matmuls


def test_a_data_set_for_the_devices_memory_that_is_not_at_hand(cfg, mesh, tmp_path):
    cfg.stages["mae"].data = Data("folder", path=str(tmp_path / "none"), image_size=16, num_examples=40, resident=True)
    with pytest.raises(InputError, match=r"stage mae: .*none: no such folder; .* the size of an image must be known"):
        estimate.run(cfg, "mae", "", tmp_path)


EIGHT = """
import json
from pathlib import Path
from tests.conftest import tiny_classify, tiny_distill, tiny_mae
from tinymim_jax.experiment.config import Config
from tinymim_jax.planning import estimate
stages = {"mae": tiny_mae(), "distill": tiny_distill(), "finetune": tiny_classify()}
stages |= {"accumulated": tiny_distill(), "resident": tiny_mae()}
stages["accumulated"].optim.accum_steps = 4
stages["resident"].data.resident = True
for stage in stages.values():
    stage.run.batch_size = 64
    stage.data.per_class = 16
report = estimate.run(Config("tiny", stages), None, "", Path("none"))
if report["stages"]["mae"]["devices"] > 1:
    estimate.mesh_lib.batch_sharding = lambda mesh, axis=0: estimate.mesh_lib.replicated(mesh)
    report["twice"] = estimate.run(Config("tiny", stages), "distill", "", Path("none"))["stages"]["distill"]
print(json.dumps(report))
"""


@pytest.mark.slow
def test_eight_devices_share_the_work_and_reduce_gradients_alone():
    """No matmul twice (the optimiser's work each device does for itself); all that is sent are sums."""
    reports = {}
    for devices in (1, 8):
        argv = [sys.executable, "-c", EIGHT]
        run = subprocess.run(argv, env=environment(devices), cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-2000:]
        reports[devices] = json.loads(run.stdout.splitlines()[-1])
    one, eight = (reports[devices]["stages"] for devices in (1, 8))
    for name, found in eight.items():
        assert found["matmul_flops"] == pytest.approx(one[name]["matmul_flops"], rel=0.03), name
        assert set(found["collectives"]) == {"all-reduce"} and one[name]["collectives"] == {}, name
    # Where each device is given the whole batch, the same measure says so.
    assert reports[8]["twice"]["matmul_flops"] == pytest.approx(8 * one["distill"]["matmul_flops"])
    gradients, accumulated = (eight[name]["collectives"]["all-reduce"] for name in ("distill", "accumulated"))
    assert accumulated["bytes"] > 3 * gradients["bytes"]  # a CPU's program reduces those of each micro-batch
    assert gradients["sent_bytes"] == pytest.approx(gradients["bytes"] * 2 * 7 / 8)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("v5e:2x2x2", "v5e has 2 numbers of at most 16"),
        ("v4:2x2", "v4 has 3 numbers"),
        ("v5e:32x32", "at most 16 chips"),
    ],
)
def test_a_topology_that_there_is_not(name, why):
    with pytest.raises(InputError, match=f"--topology={name}: there is none; .*{why}"):
        estimate.devices_of(name)


@pytest.mark.parametrize("name", ["v5e", "v5e:0x", "v5e:0x2", "v3:2x2", "gpu", "v5e:16x16x"])
def test_an_unknown_topology(name):
    with pytest.raises(InputError, match=r"write it like v5e:16x16; the chips are v4, v5e, v5p, v6e"):
        estimate.devices_of(name)


def test_chips_by_the_names_that_jax_has_for_them():
    kinds = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "NVIDIA H200": "H200"}
    for kind, name in kinds.items():
        assert estimate.chip_of(types.SimpleNamespace(device_kind=kind)) == estimate.CHIPS[name]
    assert estimate.chip_of(jax.devices()[0]) is None


def test_bounds_are_those_of_the_chip(cfg, mesh, monkeypatch):
    """A chip that computes nothing fast, then one that fits nothing."""
    plan = make_setup(cfg.stages["mae"], "mae", {}, 40)
    monkeypatch.setattr(
        estimate, "chip_of", lambda _: estimate.Chip(flops=1e3, memory=1e12, bandwidth=1e15, links=1e15)
    )
    slow = estimate.forecast(plan, mesh)
    assert slow["step_s"] == pytest.approx(slow["model_flops"] / 1e3) and slow["fits"]
    assert slow["hours"] == pytest.approx(slow["step_s"] * 4 / 3600)
    monkeypatch.setattr(estimate, "chip_of", lambda _: estimate.Chip(1e18, 1.0, 1e3, 1e15))
    small = estimate.forecast(plan, mesh)
    assert not small["fits"] and small["step_s"] == small["bounds_s"]["memory"]
    sent = {"all-gather": {"count": 1, "bytes": 8, "sent_bytes": 7.0}, "all-to-all": {"sent_bytes": 1.0}}
    monkeypatch.setattr(estimate.hlo_stats, "collectives", lambda _: sent)
    monkeypatch.setattr(estimate, "chip_of", lambda _: estimate.Chip(1e18, 1e12, 1e18, 4.0))
    linked = estimate.forecast(plan, mesh)
    assert linked["step_s"] == linked["bounds_s"]["links"] == 8 / 4


@pytest.mark.slow
def test_advice_is_what_was_seen_to_fit(cfg, mesh, monkeypatch, tmp_path):
    plan = make_setup(cfg.stages["mae"], "mae", {}, 40)
    total = estimate.forecast(plan, mesh)["total_bytes"]

    def chip(limit):
        monkeypatch.setattr(estimate, "chip_of", lambda _: estimate.Chip(1e12, limit, 1e12, 1e12))
        return estimate.run(cfg, "mae", "", tmp_path)["stages"]["mae"]

    assert "advice" not in chip(total)
    assert chip(total - 1)["advice"] in [words for words, _ in estimate.changes(cfg, "mae", 1)]
    assert chip(10)["advice"] == "more or larger devices, or a smaller batch"


def test_where_the_compiler_itself_finds_no_room(cfg, tmp_path, monkeypatch):
    """As that of TPUs does; other errors of it stay what they are."""
    compile_for = estimate.compile_for

    def without_room(plan, mesh):
        if plan.stage.optim.accum_steps < 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM")
        return compile_for(plan, mesh)

    monkeypatch.setattr(estimate, "compile_for", without_room)
    with pytest.raises(jax.errors.JaxRuntimeError):
        estimate.run(cfg, "mae", "", tmp_path)
    monkeypatch.setattr(estimate, "chip_of", lambda _: estimate.Chip(1e12, 2e9, 1e12, 1e12))
    report = estimate.run(cfg, "mae", "", tmp_path)
    advice = "--config.stages.mae.optim.accum_steps=4"
    assert not report["stages"]["mae"]["fits"] and report["stages"]["mae"]["advice"] == advice
    assert f"| mae | 8 | **over 2**; {advice} |" in estimate.table(report)


def test_advice_can_be_followed(cfg):
    """More micro-batches than now, of whole shares of the devices."""
    stage = cfg.stages["mae"]
    stage.run.batch_size, stage.optim.accum_steps = 24, 2
    flags = [words for words, _ in estimate.changes(cfg, "mae", 2)]
    assert flags == ["--config.stages.mae.optim.accum_steps=4", "--config.stages.mae.model.remat=True"]


def test_a_batch_that_the_devices_do_not_share(cfg, mesh):
    stage = cfg.stages["mae"]
    stage.run.batch_size, stage.optim.accum_steps = 10, 4
    with pytest.raises(
        InputError, match=r"batch_size 10 is not a multiple of the 1 devices times accum_steps 4; use 8"
    ):
        estimate.compile_for(make_setup(stage, "stage", {}, 40), mesh)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu")
@pytest.mark.usefixtures("optimised")
def test_a_real_topology(cfg):
    devices = estimate.devices_of("v5e:2x2")
    assert len(devices) == 4 and estimate.chip_of(devices[0]) == estimate.CHIPS["v5e"]
    assert len(estimate.devices_of("v4:2x2x1")) == 4
    with pytest.raises(InputError, match=r"--topology=v5e:3x5: not known to libtpu, .* choose a topology that exists"):
        estimate.devices_of("v5e:3x5")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu")
@pytest.mark.usefixtures("optimised")
def test_too_much_for_a_real_topology(cfg):
    stage = cfg.stages["mae"]
    stage.run.batch_size = stage.data.num_examples = 2**22
    plan = make_setup(stage, "stage", {}, 2**22)
    assert not estimate.forecast(plan, mesh_lib.make_mesh(devices=estimate.devices_of("v5e:2x2")))["fits"]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu")
@pytest.mark.parametrize("fsdp", [1, 4])
@pytest.mark.usefixtures("optimised")
def test_micro_batches_on_a_real_topology(cfg, fsdp, monkeypatch):
    """All matmuls are found in what a TPU makes of them, and no device does another's."""
    monkeypatch.setattr(mesh_lib, "FSDP_MIN_SIZE", 64)
    stage = cfg.stages["distill"]
    stage.run.batch_size, stage.optim.accum_steps, stage.data.per_class = 64, 4, 16
    ((_, plan),) = estimate.plans(cfg, Path("none"), "distill")
    found = estimate.forecast(plan, mesh_lib.make_mesh(fsdp=fsdp, devices=estimate.devices_of("v5e:2x4")))
    assert found["matmul_flops"] == pytest.approx(found["model_flops"], rel=0.03)
    assert set(found["collectives"]) >= ({"all-reduce"} if fsdp == 1 else {"all-reduce", "all-gather"})
