"""The reference's patches and mask, written out."""

import pytest

pytest.importorskip("torch", reason="the reference is in PyTorch")

import torch

from tinymim_jax.bridge.torch_reference import mae
from tinymim_jax.experiment.config import Decoder, Mae, ViT


def test_patches_are_read_row_by_row_then_column_then_channel():
    images = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    patches = mae.patchify(images, 2)
    for i in range(2):
        for j in range(2):
            expected = [images[1, c, 2 * i + r, 2 * j + s] for r in range(2) for s in range(2) for c in range(3)]
            assert patches[1, 2 * i + j].tolist() == expected


def test_the_patches_of_the_least_noise_are_kept():
    keep, restore, mask = mae.random_masking(torch.tensor([[0.3, 0.1, 0.9, 0.2]]), 0.5)
    assert keep.tolist() == [[1, 3]] and mask.tolist() == [[1, 0, 1, 0]]
    assert restore.tolist() == [[2, 0, 3, 1]]


def test_the_loss_is_of_the_hidden_patches_alone():
    model = mae.MAE(ViT(24, 1, 3, image_size=8, patch_size=4), Mae(decoder=Decoder(16, 1, 2), norm_pix_loss=False))
    images, noise = torch.randn(1, 3, 8, 8), torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    loss, pred, mask = model(images, noise)
    assert mask.tolist() == [[0, 1, 1, 1]] and pred.shape == (1, 4, 48)
    torch.testing.assert_close(loss, ((pred - mae.patchify(images, 4)) ** 2)[0, 1:].mean())
