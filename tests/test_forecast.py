import importlib.util
import json
import types

import jax
import pytest

from tests.conftest import tiny_classify, tiny_distill, tiny_mae
from tests.processes import ROOT, environment
from tinymim_jax import forecast
from tinymim_jax.config import Config, InputError
from tinymim_jax.plan import make_plan


@pytest.fixture
def cfg():
    return Config("tiny", {"mae": tiny_mae(), "distill": tiny_distill(), "finetune": tiny_classify()})


def test_a_chain_on_the_devices_at_hand(cfg, tmp_path):
    report = forecast.run(cfg, None, "", tmp_path)
    assert list(report["stages"]) == ["mae", "distill", "finetune"]
    for name, f in report["stages"].items():
        assert f["devices"] == 1 and f["collectives"] == {} and f["steps"] == 4
        assert f["total_bytes"] >= f["argument_bytes"] > 0 and 0.9 < f["xla_flops"] / f["model_flops"] < 4, name
        assert "step_s" not in f  # nothing is published of this CPU
    lines = forecast.table(report).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| mae", "| distill", "| finetune"]
    assert json.loads(json.dumps(report)) == report


def test_collectives_are_read_from_the_program():
    text = """
  %all-reduce.1 = f32[4,8]{1,0} all-reduce(f32[4,8]{1,0} %x), replica_groups={}
  %ar = (bf16[10]{0}, f32[]) all-reduce-start(bf16[10]{0} %a, f32[] %b), channel_id=1
  %ard = (bf16[10]{0}, f32[]) all-reduce-done(%ar)
  ROOT %ag = u8[3,3]{1,0} all-gather(u8[1,3]{1,0} %y), dimensions={0}
  %f = f32[2]{0} fusion(%all-reduce.1), calls=%all-gather
"""
    assert forecast.find_collectives(text) == {
        "all-reduce": {"count": 2, "bytes": 4 * 32 + 20 + 4},
        "all-gather": {"count": 1, "bytes": 9},
    }


EIGHT = """
import json, sys
from pathlib import Path
from tests.conftest import tiny_classify, tiny_distill, tiny_mae
from tinymim_jax import forecast
from tinymim_jax.config import Config
stages = {"mae": tiny_mae(), "distill": tiny_distill(), "finetune": tiny_classify()}
for stage in stages.values():
    stage.run.batch_size = 64
    stage.data.num_examples = 128
print(json.dumps(forecast.run(Config("tiny", stages), None, "", Path("none"))))
"""


def test_eight_devices_share_the_work_and_reduce_gradients_alone():
    """No compute twice; the only collectives of a data-parallel step are sums of gradients and metrics."""
    import subprocess
    import sys

    found = {}
    for devices in (1, 8):
        run = subprocess.run(
            [sys.executable, "-c", EIGHT], env=environment(devices), cwd=ROOT, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr[-2000:]
        found[devices] = json.loads(run.stdout.splitlines()[-1])["stages"]
    for name, eight in found[8].items():
        one = found[1][name]
        # The optimiser's work, which every device does for itself, is no matmul and small.
        assert eight["xla_flops"] / one["xla_flops"] < 1.25, name
        assert set(eight["collectives"]) <= {"all-reduce"} and one["collectives"] == {}, (name, eight["collectives"])


@pytest.mark.parametrize("name", ["v5e", "v5e:0x", "v3:2x2", "gpu", "v5e:16x16x"])
def test_an_unknown_topology(name):
    with pytest.raises(InputError, match=r"write it like v5e:16x16; the chips are v4, v5e, v5p, v6e"):
        forecast.devices_of(name)


def test_chips_by_the_names_that_jax_has_for_them():
    kinds = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "NVIDIA H200": "H200"}
    for kind, name in kinds.items():
        assert forecast.chip_of(types.SimpleNamespace(device_kind=kind)) == forecast.CHIPS[name]
    assert forecast.chip_of(jax.devices()[0]) is None


def test_bounds_are_those_of_the_chip(cfg, mesh, monkeypatch):
    """A chip that computes nothing fast, then one that fits nothing."""
    plan = make_plan(cfg.stages["mae"], None, 40)
    monkeypatch.setattr(
        forecast, "chip_of", lambda _: forecast.Chip(flops=1e3, memory=1e12, bandwidth=1e15, links=1e15)
    )
    slow = forecast.forecast(plan, mesh)
    assert slow["step_s"] == pytest.approx(slow["model_flops"] / 1e3) and slow["fits"]
    assert slow["hours"] == pytest.approx(slow["step_s"] * 4 / 3600)
    monkeypatch.setattr(forecast, "chip_of", lambda _: forecast.Chip(1e18, 1.0, 1e3, 1e15))
    small = forecast.forecast(plan, mesh)
    assert not small["fits"] and small["step_s"] == small["bounds_s"]["memory"]


def test_advice_is_what_was_seen_to_fit(cfg, mesh, monkeypatch, tmp_path):
    plan = make_plan(cfg.stages["mae"], None, 40)
    total = forecast.forecast(plan, mesh)["total_bytes"]

    def chip(limit):
        monkeypatch.setattr(forecast, "chip_of", lambda _: forecast.Chip(1e12, limit, 1e12, 1e12))
        return forecast.run(cfg, "mae", "", tmp_path)["stages"]["mae"]

    assert "advice" not in chip(total)
    assert chip(total - 1)["advice"] in [words for words, _ in forecast.changes(cfg, "mae", 1)]
    assert chip(10)["advice"] == "more or larger devices, or a smaller batch"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu")
def test_a_real_topology(cfg):
    devices = forecast.devices_of("v5e:2x2")
    assert len(devices) == 4 and forecast.chip_of(devices[0]) == forecast.CHIPS["v5e"]
    assert len(forecast.devices_of("v4:2x2x1")) == 4
