"""The reference's loss against PyTorch's own divergence."""

import dataclasses

import pytest

pytest.importorskip("torch", reason="the reference is in PyTorch")

import torch

from tinymim_jax.bridge.torch_reference import distill, vit
from tinymim_jax.experiment.config import ViT

CFG = ViT(24, 2, 3, image_size=16, patch_size=8)


def test_the_divergence():
    t, s = (tuple(torch.randn(2, 3, 4, 8) for _ in range(2)) for _ in range(2))
    log_t, log_s = ((a @ b.mT / 8**0.5).log_softmax(-1) for a, b in (t, s))
    expected = torch.nn.functional.kl_div(log_s, log_t, reduction="sum", log_target=True) / (2 * 3 * 4)
    torch.testing.assert_close(distill.relation_kl(t, s), expected)
    assert distill.relation_kl(t, t).abs() < 1e-6


def test_gradients_are_the_students_alone():
    teacher, student = vit.ViT(dataclasses.replace(CFG, width=48)), vit.ViT(CFG)
    images = torch.randn(2, 3, 16, 16)
    distill.loss(teacher, 1, student, images, images).backward()
    assert all(p.grad is None for p in teacher.parameters())
    trained = {name for name, p in student.named_parameters() if p.grad is not None}
    assert "blocks.1.attn.qkv.weight" in trained and "blocks.1.attn.proj.weight" not in trained
