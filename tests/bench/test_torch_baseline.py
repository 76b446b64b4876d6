import dataclasses
import functools
import json
import shutil
import sys

import numpy as np
import pytest

from tests.conftest import tiny_classify, tiny_distill, tiny_mae
from tinymim_jax.__main__ import main
from tinymim_jax.bench import torch_baseline
from tinymim_jax.bridge import formats
from tinymim_jax.experiment.config import Init, LabelTeacher
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.training.setup import make_setup
from tinymim_jax.weights.handoff import flatten

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(
    ("stage", "teacher"), [(tiny_mae(), None), (tiny_distill(), tiny_mae().model), (tiny_classify(), None)]
)
def test_a_step_has_our_parameters_and_changes_them(stage, teacher):
    step = torch_baseline.TorchStep(stage, {"teacher": teacher}, "eager")
    student = step.models[-1]
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    ours = flatten(make_setup(stage, "stage", {"teacher": teacher} if teacher else {}, 40).params)
    assert sum(p.numel() for p in before.values()) == sum(np.prod(leaf.shape) for leaf in ours.values())
    assert {formats.mae_name(key) for key in ours} == set(before)
    step()
    assert any(not torch.equal(p, before[name]) for name, p in student.named_parameters())
    assert step.dtype == torch.float32 and step.peak_memory() is None


def test_a_teacher_drops_no_paths():
    teacher = dataclasses.replace(tiny_mae().model, drop_path=0.5)
    step = torch_baseline.TorchStep(tiny_distill(), {"teacher": teacher}, "eager")
    assert [model.training for model in step.models] == [False, True]
    first, second = (step.models[0](step.images).tokens for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_fused_attention_computes_the_same():
    stage, teacher = tiny_distill(), tiny_mae().model
    eager = torch_baseline.TorchStep(stage, {"teacher": teacher}, "eager")
    for model in eager.models:
        model.eval()  # no drop path
    expected = eager.loss(eager.images)
    for model in eager.models:
        for module in model.modules():
            module.is_fused = True
    torch.testing.assert_close(eager.loss(eager.images), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_bench_step_compares(capsys, monkeypatch):
    monkeypatch.setattr(torch_baseline, "VARIANTS", {"eager": None})
    call = ["bench", "step", "--config=configs/digits/chain.py", "--stage=distill_t", "--batch_size=4", "--rounds=1"]
    assert main([*call, "--vs=torch"]) == 0
    result = json.loads(capsys.readouterr().out)
    theirs = result["torch_eager"]
    assert 1e8 < result["torch_matmul_flops_per_s"] < 1e13
    assert theirs["images_per_s"] == pytest.approx(4 / theirs["step_s"])
    assert theirs["ratio"] == pytest.approx(result["images_per_s"] / theirs["images_per_s"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("variant", ["compiled", "graphs"])
def test_a_compiled_step_computes_the_same(variant):
    stage, teacher = tiny_distill(), tiny_mae().model
    stage.model.drop_path = 0.0
    eager, compiled = (torch_baseline.TorchStep(stage, {"teacher": teacher}, how) for how in ("eager", variant))
    losses = []
    for step in (eager, compiled):
        step.optimizer.param_groups[0]["lr"] = 1e-2
        losses.append([])
        for _ in range(2):
            losses[-1].append(float(step.loss(step.images).detach()))
            step()
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    assert abs(losses[0][1] / losses[0][0] - 1) > 1e-2


def test_gradients_are_clipped_as_ours():
    stage = tiny_classify()
    stage.optim.clip_norm = 1e-6
    step = torch_baseline.TorchStep(stage, {}, "eager")
    step()
    norms = torch.stack([p.grad.norm() for p in step.trained if p.grad is not None])
    torch.testing.assert_close(norms.norm(), torch.tensor(1e-6), rtol=0.05, atol=0)  # PyTorch adds 1e-6 to the norm


def test_a_variant_that_does_not_run_is_named(capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda loss, mode: (_ for _ in ()).throw(RuntimeError("no C++ compiler")))
    assert list(torch_baseline.steps(tiny_mae(), {})) == ["eager"]
    assert "torch compiled does not run here: RuntimeError: no C++ compiler" in capsys.readouterr().err


def test_cuda_graphs_are_for_gpus(monkeypatch):
    monkeypatch.setattr(torch_baseline, "_tried", lambda stage, teacher, variant: variant)
    assert list(torch_baseline.steps(tiny_mae(), {})) == ["eager", "compiled"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert list(torch_baseline.steps(tiny_mae(), {})) == ["eager", "compiled", "graphs"]


def test_a_task_without_counterpart():
    stage = tiny_mae()
    stage.task.kind = "segment"
    with pytest.raises(InputError, match="--vs=torch has no step for segment; choose one of mae, distill, classify"):
        torch_baseline.check("x", stage, "cpu", 1)


@pytest.mark.parametrize(
    ("stage", "field", "value"),
    [
        (tiny_mae(), "model.remat", True),
        (tiny_mae(), "optim.accum_steps", 2),
        (tiny_mae(), "optim.ema", 0.9),
        (tiny_mae(), "optim.name", "lars"),
        (tiny_distill(), "task.targets.relation.relations", ["qk"]),
        (tiny_distill(), "task.targets.relation.student_block", 1),
        (tiny_classify(), "optim.freeze", [".*"]),
        (tiny_classify(), "model.head_norm", True),
        (tiny_classify(), "task.teacher", LabelTeacher(Init("x"))),
    ],
)
def test_a_step_that_pytorch_does_not_have_is_refused(stage, field, value):
    torch_baseline.check("x", stage, "cpu", 1)
    *parts, name = field.split(".")
    owner = functools.reduce(
        lambda node, part: node[part] if isinstance(node, dict) else getattr(node, part), parts, stage
    )
    setattr(owner, name, value)
    with pytest.raises(InputError, match=rf"PyTorch's step knows {field}=.* only, .* set --config\.stages\.x\.{field}"):
        torch_baseline.check("x", stage, "cpu", 1)


def test_the_device_of_both_is_one():
    for platform, devices in (("gpu", 1), ("cpu", 2)):
        with pytest.raises(InputError, match=f"our step would run on {devices} x {platform}, PyTorch's on one cpu"):
            torch_baseline.check("x", tiny_mae(), platform, devices)


def test_without_pytorch(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["bench", "step", "--config=configs/digits/chain.py", "--stage=distill_t", "--vs=torch"]) == 2
    assert capsys.readouterr().err.startswith("error: --vs=torch needs torch: pip install 'tinymim_jax[torch]'")


def test_a_variant_that_fails_later_is_left_out(capsys):
    def fail():
        raise RuntimeError("CUDA out of memory")

    others = {"eager": lambda: None, "compiled": fail}
    assert torch_baseline.timed(others, "eager") > 0
    for _ in range(2):
        assert np.isnan(torch_baseline.timed(others, "compiled"))
    assert list(others) == ["eager"]
    said = "torch compiled is left out from here: RuntimeError: CUDA out of memory\n"
    assert capsys.readouterr().err == said
