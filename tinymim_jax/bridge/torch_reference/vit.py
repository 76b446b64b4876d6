"""Vision Transformer under the official MAE state-dict layout, with every block's queries, keys and values in reach."""

import math
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tinymim_jax.experiment import config


class BlockTrace(NamedTuple):
    """What one block computed: q, k, v [B, H, N, E] and its output [B, N, D] (None: stopped after q, k, v)."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor | None


class Output(NamedTuple):
    """tokens [B, N, D] (normed if pool is "cls"; width `neck` if there is one), trace per block, logits [B, C]."""

    tokens: Tensor
    trace: list[BlockTrace]
    logits: Tensor | None


def sincos(grid: int, width: int) -> Tensor:
    """Fixed position table [1, 1 + grid * grid, width]: zeros for CLS, column half, row half."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # [grid, width / 2]
    table = torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), table])[None].float()


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [B, L, D] at index [B, K], sample by sample: [B, K, D]."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weight and zero bias if `module` is a Linear; for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def drop_rates(cfg: config.ViT) -> list[float]:
    """Drop-path rate of each block: a ramp from 0, or flat but for the last."""
    if cfg.drop_path_shape == "linear":
        return torch.linspace(0, cfg.drop_path, cfg.depth, dtype=torch.float64).tolist()
    return [cfg.drop_path] * (cfg.depth - 1) + [0.0]


class Attention(nn.Module):
    """Multi-head self-attention whose fused projection is ordered (q, k, v), each head-major."""

    is_fused = False  # as the released code: written out; True: PyTorch's own kernel

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, D] -> queries, keys, values, each [B, H, N, E]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(E)) v, heads joined and projected: [B, N, D]."""
        if self.is_fused:
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block that hands out its queries, keys and values."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float = 4.0, drop: float = 0.0, eps: float = 1e-6):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        layers = {"fc1": nn.Linear(width, hidden), "gelu": nn.GELU(), "fc2": nn.Linear(hidden, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.drop = drop

    def drop_path(self, x: Tensor) -> Tensor:
        """A residual branch [B, N, D], in training zeroed for whole samples, the rest scaled by 1 / (1 - rate)."""
        if not self.training or self.drop == 0:
            return x
        return x * x.new_empty(len(x), 1, 1).bernoulli_(1 - self.drop) / (1 - self.drop)

    def forward(self, x: Tensor) -> BlockTrace:
        """[B, N, D] -> q, k, v and the block's output."""
        q, k, v = self.attn.split(self.norm1(x))
        x = x + self.drop_path(self.attn(q, k, v))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return BlockTrace(q, k, v, x)


class ViT(nn.Module):
    """The model that `cfg` describes, but for `head_norm`, under MAE's keys and with its initialisation."""

    def __init__(self, cfg: config.ViT):
        super().__init__()
        self.cfg = cfg
        self.cls_token = nn.Parameter(torch.randn(1, 1, cfg.width) * 0.02)
        positions = sincos(cfg.image_size // cfg.patch_size, cfg.width)
        if cfg.dist_token:
            self.dist_token = nn.Parameter(torch.randn(1, 1, cfg.width) * 0.02)
            positions = torch.cat([torch.zeros(1, 1, cfg.width), positions], dim=1)
        self.pos_embed = nn.Parameter(positions, requires_grad=cfg.posembed == "trainable")
        projection = nn.Conv2d(3, cfg.width, cfg.patch_size, stride=cfg.patch_size)
        nn.init.xavier_uniform_(projection.weight.data.view(cfg.width, -1))
        self.patch_embed = nn.ModuleDict({"proj": projection})
        heads = [cfg.num_heads] * (cfg.depth - 1) + [cfg.last_block_heads or cfg.num_heads]
        blocks = zip(heads, drop_rates(cfg), strict=True)
        eps = cfg.layer_norm_eps
        self.blocks = nn.ModuleList(Block(cfg.width, h, cfg.mlp_ratio, rate, eps) for h, rate in blocks)
        if cfg.neck:
            self.conv1x1 = nn.Sequential(nn.LayerNorm(cfg.width, eps=1e-5), nn.Linear(cfg.width, cfg.neck), nn.GELU())
        width = cfg.neck or cfg.width
        setattr(self, "norm" if cfg.pool == "cls" else "fc_norm", nn.LayerNorm(width, eps=eps))
        self.apply(init_linear)
        if cfg.num_classes:
            for name in ("head", "head_dist") if cfg.dist_token else ("head",):
                setattr(self, name, nn.Linear(width, cfg.num_classes))
                nn.init.trunc_normal_(getattr(self, name).weight, std=2e-5)
                nn.init.zeros_(getattr(self, name).bias)

    def embed(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """[B, 3, S, S] and optional kept patches [B, K] -> tokens [B, N, D], CLS (and DIST) first."""
        first = torch.cat([self.cls_token, self.dist_token], dim=1) if self.cfg.dist_token else self.cls_token
        count = first.shape[1]
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.pos_embed[:, count:]
        if keep is not None:
            patches = take(patches, keep)
        return torch.cat([(first + self.pos_embed[:, :count]).expand(images.shape[0], -1, -1), patches], dim=1)

    def encode(self, images: Tensor, keep: Tensor | None = None) -> tuple[Tensor, list[BlockTrace]]:
        """All blocks, then `norm` or the neck where the model has one: tokens [B, N, D] and a trace per block."""
        x, trace = self.embed(images, keep), []
        for block in self.blocks:
            trace.append(block(x))
            x = trace[-1].out
        if self.cfg.pool == "cls":
            x = self.norm(x)
        return (self.conv1x1(x) if self.cfg.neck else x), trace

    def qkv_at(self, images: Tensor, block: int) -> BlockTrace:
        """q, k, v of a block (1-based) without computing anything past them; `out` is None."""
        x = self.embed(images)
        for earlier in self.blocks[: block - 1]:
            x = earlier(x).out
        last = self.blocks[block - 1]
        return BlockTrace(*last.attn.split(last.norm1(x)), None)

    def forward(self, images: Tensor) -> Output:
        """[B, 3, S, S] -> tokens, trace, logits (None without classes; with a DIST token, the mean of two heads)."""
        tokens, trace = self.encode(images)
        if not self.cfg.num_classes:
            return Output(tokens, trace, None)
        patches = tokens[:, 1 + self.cfg.dist_token :]
        logits = self.head(tokens[:, 0] if self.cfg.pool == "cls" else self.fc_norm(patches.mean(dim=1)))
        if self.cfg.dist_token:
            logits = (logits + self.head_dist(tokens[:, 1])) / 2
        return Output(tokens, trace, logits)
