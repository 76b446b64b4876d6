"""What parity does not show of the reference: it drops paths, trains positions, and stops where it is told."""

import pytest

pytest.importorskip("torch", reason="the reference is in PyTorch")

import torch

from tinymim_jax.bridge.torch_reference import vit
from tinymim_jax.experiment.config import ViT

CFG = ViT(24, 3, 3, last_block_heads=4, image_size=16, patch_size=4)


def pictures(count=2):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("shape", "rates"), [("constant", [0.2, 0.2, 0.0]), ("linear", [0.0, 0.1, 0.2])])
def test_paths_are_dropped(shape, rates):
    model = vit.ViT(ViT(24, 3, 3, image_size=16, patch_size=4, drop_path=0.2, drop_path_shape=shape))
    assert [block.drop for block in model.blocks] == pytest.approx(rates)


def test_a_dropped_path_is_of_a_whole_sample():
    block = vit.Block(8, 2, drop=0.25)
    x = torch.ones(4000, 3, 8)
    torch.testing.assert_close(block.eval().drop_path(x), x)
    out = block.train().drop_path(x)
    assert out.flatten(1).std(dim=1).max() < 1e-6  # all of a sample, or nothing
    assert out[:, 0, 0].unique().tolist() == pytest.approx([0, 4 / 3])
    assert abs(float(out.mean()) - 1) < 0.05


@pytest.mark.parametrize("posembed", ["fixed", "trainable"])
def test_positions(posembed):
    model = vit.ViT(ViT(24, 1, 3, posembed=posembed, dist_token=True, num_classes=2, image_size=16, patch_size=4))
    assert model.pos_embed.requires_grad == (posembed == "trainable")
    assert model.pos_embed.shape == (1, 18, 24) and not model.pos_embed[:, :2].any()


def test_the_kernel_computes_the_same():
    written_out, fused = vit.Attention(24, 3), vit.Attention(24, 3)
    fused.is_fused = True
    fused.load_state_dict(written_out.state_dict())
    qkv = written_out.split(torch.randn(2, 5, 24))
    torch.testing.assert_close(fused(*qkv), written_out(*qkv), rtol=1e-5, atol=1e-6)


def test_a_block_may_be_the_last_that_is_computed(monkeypatch):
    model = vit.ViT(CFG).eval()
    trace = model(pictures()).trace
    assert [part.q.shape[1] for part in trace] == [3, 3, 4]
    monkeypatch.setattr(model.blocks[1], "forward", None)
    found = model.qkv_at(pictures(), 2)
    assert found.out is None
    for ours, theirs in zip(found[:3], trace[1][:3], strict=True):
        torch.testing.assert_close(ours, theirs)
