"""Masked autoencoder in the official full layout."""

import torch
from torch import Tensor, nn

from tinymim_jax.bridge.torch_reference.vit import Block, ViT, init_linear, sincos, take
from tinymim_jax.experiment import config


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, 3, S, S] -> [B, L, p * p * 3], each patch flattened as (row, column, channel)."""
    x = images.unflatten(2, (-1, patch_size)).unflatten(4, (-1, patch_size))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def random_masking(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Noise [B, L] -> kept patches [B, K], inverse of the shuffle [B, L], mask [B, L] (1 = removed)."""
    shuffle = noise.argsort(dim=1, stable=True)
    keep = shuffle[:, : int(noise.shape[1] * (1 - ratio))]
    mask = torch.ones_like(noise).scatter(1, keep, 0.0)
    return keep, shuffle.argsort(dim=1), mask


def normalise_patches(target: Tensor) -> Tensor:
    """Each patch [.., P] to zero mean and unit (unbiased) variance, 1e-6 added to the variance."""
    var, mean = torch.var_mean(target, dim=-1, correction=1, keepdim=True)
    return (target - mean) / (var + 1e-6).sqrt()


class MAE(ViT):
    """ViT encoder (pool "cls", no head) and a decoder beside it under flat keys."""

    def __init__(self, cfg: config.ViT, task: config.Mae):
        super().__init__(cfg)
        self.mask_ratio, self.norm_pix_loss = task.mask_ratio, task.norm_pix_loss
        width = task.decoder.width
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.decoder_pos_embed = nn.Parameter(sincos(cfg.image_size // cfg.patch_size, width), requires_grad=False)
        self.decoder_embed = nn.Linear(cfg.width, width)
        eps, decoder = cfg.layer_norm_eps, task.decoder
        blocks = [Block(width, decoder.num_heads, decoder.mlp_ratio, eps=eps) for _ in range(decoder.depth)]
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(width, eps=eps)
        self.decoder_pred = nn.Linear(width, 3 * cfg.patch_size**2)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(init_linear)

    def decode(self, tokens: Tensor, restore: Tensor) -> Tensor:
        """Encoded CLS and kept patches [B, 1 + K, D], inverse shuffle [B, L] -> pixels [B, L, P]."""
        x = self.decoder_embed(tokens)
        removed = self.mask_token.expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
        patches = take(torch.cat([x[:, 1:], removed], dim=1), restore)
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x).out
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, S, S] and uniform noise [B, L] -> loss, pred [B, L, P], mask [B, L] (1 = removed)."""
        keep, restore, mask = random_masking(noise, self.mask_ratio)
        pred = self.decode(self.encode(images, keep)[0], restore)
        target = patchify(images, self.cfg.patch_size)
        if self.norm_pix_loss:
            target = normalise_patches(target)
        error = (pred - target).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum(), pred, mask
