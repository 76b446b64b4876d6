"""Masked autoencoder in the official full layout (spec B.1, B.3)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .vit import Block, Config, ViT, init_linear, sincos, take


@dataclass
class Decoder:
    """Shape of the decoder; the defaults are MAE's, (96, 1, 3) is MAE-Tiny's (spec B.1, C.1)."""

    width: int = 512
    depth: int = 8
    num_heads: int = 16


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, 3, S, S] -> [B, L, p * p * 3], each patch flattened as (row, column, channel) (spec B.1.4)."""
    batch, channels, size, _ = images.shape
    grid = size // patch_size
    x = images.view(batch, channels, grid, patch_size, grid, patch_size).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(batch, grid * grid, patch_size * patch_size * channels)


def random_masking(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Noise [B, L] -> kept patches [B, K], inverse of the shuffle [B, L], mask [B, L] (1 = removed) (spec B.1.1)."""
    shuffle = noise.argsort(dim=1, stable=True)
    restore = shuffle.argsort(dim=1)
    keep = shuffle[:, : int(noise.shape[1] * (1 - ratio))]
    mask = torch.ones_like(noise).scatter(1, keep, 0.0)
    return keep, restore, mask


def normalise_patches(target: Tensor) -> Tensor:
    """Each patch [.., P] to zero mean and unit (unbiased) variance, 1e-6 added to the variance (spec B.1.4)."""
    var, mean = torch.var_mean(target, dim=-1, correction=1, keepdim=True)
    return (target - mean) / (var + 1e-6).sqrt()


def masked_loss(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Squared error of pred and target [B, L, P], averaged over the removed patches of the batch (spec B.1.5)."""
    error = (pred - target).square().mean(dim=-1)
    return (error * mask).sum() / mask.sum()


class MAE(ViT):
    """ViT encoder (pool "cls", no head) and a decoder beside it under flat keys."""

    def __init__(self, cfg: Config, decoder: Decoder, mask_ratio: float = 0.75, norm_pix_loss: bool = True):
        if cfg.pool != "cls" or cfg.num_classes or cfg.dist_token:
            raise ValueError("MAE's encoder has pool 'cls', no classes and no dist_token")
        super().__init__(cfg)
        self.mask_ratio, self.norm_pix_loss = mask_ratio, norm_pix_loss
        width = decoder.width
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.decoder_pos_embed = nn.Parameter(sincos(cfg.grid, width), requires_grad=False)
        self.decoder_embed = nn.Linear(cfg.width, width)
        blocks = [Block(width, decoder.num_heads, cfg.mlp_ratio, cfg.norm_eps) for _ in range(decoder.depth)]
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(width, eps=cfg.norm_eps)
        self.decoder_pred = nn.Linear(width, 3 * cfg.patch_size**2)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(init_linear)

    def decode(self, tokens: Tensor, restore: Tensor) -> Tensor:
        """Encoded CLS and kept patches [B, 1 + K, D], inverse shuffle [B, L] -> pixels [B, L, P] (spec B.1.3)."""
        x = self.decoder_embed(tokens)
        removed = self.mask_token.expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
        patches = take(torch.cat([x[:, 1:], removed], dim=1), restore)
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x).out
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, S, S] and uniform noise [B, L] -> loss, pred [B, L, P], mask [B, L] (1 = removed) (spec B.1)."""
        keep, restore, mask = random_masking(noise, self.mask_ratio)
        tokens, _ = self.encode(images, keep)
        pred = self.decode(tokens, restore)
        target = patchify(images, self.cfg.patch_size)
        if self.norm_pix_loss:
            target = normalise_patches(target)
        return masked_loss(pred, target, mask), pred, mask
